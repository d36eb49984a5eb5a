"""Evaluation: the likelihood against torch, the windows, bits per byte against a hand-made loop, and its interval."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgewright.errors import BadInput
from edgewright.evaluate import evaluate_session, negative_log_likelihood, windows
from edgewright.export.runtimes.session import Capabilities, Session

VOCABULARY = 50


class BigramSession(Session):
    """Logits that depend on the last token alone, so that every right answer can be computed by hand."""

    runtime = "fake"
    vocab_size = VOCABULARY
    context_length = 32
    capabilities = Capabilities(logits=True, rewind=True, fp32_compute=True)
    start_id = 0
    eos_ids = frozenset({0})

    def __init__(self, path):
        self.path = path
        self.table = np.random.default_rng(0).normal(0, 2, (VOCABULARY, VOCABULARY)).astype(np.float32)
        self.cache = []
        self.lengths = []

    @property
    def length(self):
        return len(self.cache)

    def append(self, tokens, logits="last"):
        self.check_room(tokens)
        self.cache += tokens
        self.lengths.append(len(tokens))
        return self.table[list(tokens)] if logits == "all" else self.table[tokens[-1:]]

    def rewind(self, length):
        del self.cache[length:]

    def native_generate(self, tokens, max_new_tokens, *, temperature=0.0, seed=0, stop_at_eos=True, draft=None):
        return []

    def tokenize(self, text):
        return [1 + byte % (VOCABULARY - 1) for byte in text.encode()]

    def detokenize(self, tokens):
        return ""

    def close(self):
        pass


@pytest.fixture
def session(tmp_path):
    return BigramSession(tmp_path)


def test_likelihood_equals_torchs_cross_entropy_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(20, VOCABULARY, generator=generator)
    targets = torch.randint(VOCABULARY, (20,), generator=generator)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    found = negative_log_likelihood(logits.numpy(), targets.tolist())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 17])
@pytest.mark.parametrize("length", [1, 4, 8])
def test_windows_predict_every_token_but_the_first_once(count, length):
    tokens = list(range(100, 100 + count))
    parts = list(windows(tokens, length))
    assert [token for _, targets in parts for token in targets] == tokens[1:]
    for inputs, targets in parts:
        assert len(inputs) == len(targets) <= length
        assert inputs[1:] == targets[:-1]


def test_a_document_of_its_start_token_alone_predicts_nothing():
    assert list(windows([0], 8)) == []


def test_bits_per_byte_of_whole_documents_by_hand(session):
    texts = ["hello world " * 5, "x", "another text"]
    documents = [(session.tokenize(text), len(text.encode())) for text in texts]
    result = evaluate_session(session, documents, max_tokens=10**6, window=16)
    table = torch.from_numpy(session.table).double()
    nats = 0.0
    for tokens, _ in documents:
        context = torch.tensor([0, *tokens[:-1]])
        nats += float(F.cross_entropy(table[context], torch.tensor(tokens), reduction="sum"))
    count, size = sum(len(tokens) for tokens, _ in documents), sum(bytes_ for _, bytes_ in documents)
    assert (result.tokens, result.bytes, result.documents) == (count, size, 3)
    assert result.loss == pytest.approx(nats / count, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-12)
    assert max(session.lengths) == 16


def test_the_budget_cuts_documents_and_counts_their_bytes_in_part(session):
    documents = [(session.tokenize("ab" * 20), 80), (session.tokenize("cd" * 20), 80), (session.tokenize("ef"), 4)]
    result = evaluate_session(session, documents, max_tokens=50)
    assert (result.tokens, result.bytes, result.documents) == (50, 100, 2)


def test_random_windows_speak_for_the_whole_text(session):
    """All windows in a random order are the whole text; a few of them are near it, and the same for every session."""
    rng = np.random.default_rng(2)
    documents = [(rng.integers(1, VOCABULARY, size).tolist(), size) for size in rng.integers(1, 60, 200)]
    whole = evaluate_session(session, documents, max_tokens=10**6, window=8)
    shuffled = evaluate_session(session, documents, max_tokens=10**6, window=8, seed=3)
    assert (shuffled.tokens, shuffled.bytes, shuffled.documents) == (whole.tokens, whole.bytes, whole.documents)
    assert shuffled.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-12)
    few, again = (evaluate_session(session, documents, max_tokens=1000, window=8, seed=3) for _ in range(2))
    assert few == again and few.tokens == 1000 and few.documents > 50
    assert few.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.05)


def test_one_window_has_no_interval(session):
    assert evaluate_session(session, [([1, 2, 3], 3)], max_tokens=10).ci95 is None


def test_the_interval_is_that_of_independent_windows(session):
    """Its half width against the spread of the mean over many resamples of the same windows."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, VOCABULARY, 8).tolist() for _ in range(400)]
    result = evaluate_session(session, [(tokens, 8) for tokens in texts], max_tokens=10**6)
    low, high = result.ci95
    assert low < result.bits_per_byte < high
    single = [evaluate_session(session, [(tokens, 8)], max_tokens=100).bits_per_byte for tokens in texts]
    means = [rng.choice(single, len(single)).mean() for _ in range(2000)]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(means), rel=0.1)


def test_no_text_is_an_error(session):
    with pytest.raises(BadInput, match="EW-210"):
        evaluate_session(session, [([], 0)], max_tokens=10)
