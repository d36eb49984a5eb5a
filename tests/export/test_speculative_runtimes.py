"""Speculative decoding in every runtime: the shipped teacher as the target, its own first layer as the draft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edgewright.errors import RecipeError
from edgewright.export.pairs.rules import parameters
from edgewright.export.runtimes import Session, open_session
from edgewright.export.source import load_source
from edgewright.inventory import weight_bytes
from edgewright.speculate import speculate
from edgewright.speculative import DraftModel, PromptLookup, Sampler, decode, plain
from edgewright.speculative.divergence import evaluated
from edgewright.vocabulary import check_draft, token_table

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "teacher"
PROMPTS = ["def read_file(path):\n", "import os\nimport sys\n\n\nclass ", "    return self.", '"""Tests for ']
RUNTIMES = {
    "torch": ("hf", "torch"),
    "llamacpp": ("gguf", "llama_cpp"),
    "genai": ("genai", "onnxruntime_genai"),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("openvino", "openvino_genai"),
}
GREEDY = Sampler()
Write = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def first_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher without its later layers: wrong often enough, and right often enough."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("draft") / "first_layer"
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="float32")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TEACHER / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A model in fp32 for a target; the directory itself for torch."""
    from edgewright.export.targets import export

    folder = tmp_path_factory.mktemp("exported")

    def written(model: Path, to: str) -> Path:
        if to == "hf":
            return model
        width = "f32" if to == "gguf" else "fp32"
        return export(model, to=to, quant=width, out=folder / f"{model.name}-{to}", verify=False, threads=1).path

    return written


@pytest.fixture(scope="module", params=RUNTIMES)
def paths(request: pytest.FixtureRequest, first_layer: Path, write: Write) -> tuple[Path, Path]:
    to, package = RUNTIMES[request.param]
    pytest.importorskip(package)
    return write(TEACHER, to), write(first_layer, to)


@pytest.fixture(scope="module")
def pair(paths: tuple[Path, Path]) -> Iterator[tuple[Session, Session]]:
    with ExitStack() as stack:
        target, draft = (stack.enter_context(open_session(path, threads=1)) for path in paths)
        yield target, draft


def test_weights_are_counted_as_they_are_computed_with(paths: tuple[Path, Path], first_layer: Path) -> None:
    """The teacher's directory is stored in half the width of the draft's, which is no smaller there on the disk."""
    large, small = (parameters(load_source(path)) for path in (TEACHER, first_layer))
    assert large == 4_458_752
    found = [weight_bytes(path) for path in paths]
    assert found == [pytest.approx(4 * each, rel=0.03) for each in (large, small)]


def prompts_of(session: Session) -> list[list[int]]:
    return [[session.start_id, *session.tokenize(text)] for text in PROMPTS]


def test_greedy_text_is_the_targets(pair: tuple[Session, Session]) -> None:
    target, draft = pair
    assert check_draft(target, draft) == []
    accepted = drafted = 0
    for prompt in prompts_of(target):
        expected = plain(target, prompt, max_new_tokens=24, sampler=GREEDY, stop_at_eos=False)
        for proposer in (DraftModel(draft, GREEDY), PromptLookup()):
            found = decode(target, proposer, prompt, max_new_tokens=24, gamma=3, sampler=GREEDY, stop_at_eos=False)
            assert found.tokens == expected.tokens
            if isinstance(proposer, DraftModel):
                accepted, drafted = accepted + found.counts.accepted, drafted + found.counts.drafted
    assert 0.05 < accepted / drafted < 0.95


def test_drawn_text_is_reproducible(pair: tuple[Session, Session]) -> None:
    target, draft = pair
    prompt = prompts_of(target)[0]
    one, same, other = (
        decode(target, DraftModel(draft, sampler), prompt, max_new_tokens=24, gamma=3, sampler=sampler)
        for sampler in (Sampler(temperature=0.9, top_p=0.95, seed=seed) for seed in (3, 3, 4))
    )
    assert one.tokens == same.tokens != other.tokens
    assert one.counts.acceptance_rate is not None and 0 < one.counts.acceptance_rate < 1


def test_the_draft_as_its_own_target(paths: tuple[Path, Path]) -> None:
    with open_session(paths[1], threads=1) as one, open_session(paths[1], threads=1) as other:
        for prompt in prompts_of(one)[:2]:
            counts = decode(
                one, DraftModel(other, GREEDY), prompt, max_new_tokens=20, gamma=3, sampler=GREEDY, stop_at_eos=False
            ).counts
            assert (counts.acceptance_rate, counts.block_efficiency) == (1.0, 4.0)
            sampler = Sampler(temperature=1.0, seed=1)
            drawn = decode(
                one, DraftModel(other, sampler), prompt, max_new_tokens=20, gamma=3, sampler=sampler, stop_at_eos=False
            ).counts
            assert drawn.acceptance_rate is not None and drawn.acceptance_rate >= 0.99


def test_to_the_end_of_the_context(pair: tuple[Session, Session]) -> None:
    target, draft = pair
    prompt = [target.start_id, *target.tokenize("value = 1\n" * 200)][: target.context_length - 10]
    expected = plain(target, prompt, max_new_tokens=11, sampler=GREEDY, stop_at_eos=False)
    found = decode(
        target, DraftModel(draft, GREEDY), prompt, max_new_tokens=11, gamma=5, sampler=GREEDY, stop_at_eos=False
    )
    assert found.tokens == expected.tokens and len(found.tokens) == 11


def test_one_and_several_tokens_at_a_time(pair: tuple[Session, Session]) -> None:
    """What `divergence` calls noise is small in fp32, and no row is lost or doubled."""
    target = pair[0]
    prompt = prompts_of(target)[0]
    text = [*prompt, *plain(target, prompt, max_new_tokens=12, sampler=GREEDY, stop_at_eos=False).tokens]
    singly = evaluated(target, prompt, text, 1)
    assert len(singly) == 13
    for width in (2, 3, 5, 13, 20):
        assert np.abs(evaluated(target, prompt, text, width) - singly).max() < 1e-3


def test_tables_of_all_targets_agree(first_layer: Path, write: Write) -> None:
    expected = token_table(TEACHER)
    assert len(expected) == 4096 and None not in expected
    for to, package in RUNTIMES.values():
        pytest.importorskip(package)
        assert token_table(write(first_layer, to)) == expected


def test_any_two_runtimes(first_layer: Path, write: Write) -> None:
    """A target in llama.cpp, its draft in torch."""
    pytest.importorskip("llama_cpp")
    with open_session(write(TEACHER, "gguf"), threads=1) as target, open_session(first_layer, threads=1) as draft:
        assert check_draft(target, draft) == []
        prompt = prompts_of(target)[0]
        expected = plain(target, prompt, max_new_tokens=12, sampler=GREEDY)
        found = decode(target, DraftModel(draft, GREEDY), prompt, max_new_tokens=12, gamma=3, sampler=GREEDY)
        assert found.tokens == expected.tokens


def test_padding_of_a_gguf_file_is_none(tiny_model: Callable[[str], Path], write: Write) -> None:
    """A model whose embedding is wider than its tokenizer: the rows beyond are filled with tokens that nothing has."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("llama_cpp")
    model = tiny_model("llama")
    wider = write(model, "gguf").parent / "wider"
    network = AutoModelForCausalLM.from_pretrained(model)
    rows = network.config.vocab_size
    network.resize_token_embeddings(rows + 7, mean_resizing=False)
    network.save_pretrained(wider)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, wider / name)
    table = token_table(write(wider, "gguf"))
    assert table[rows:] == [None] * 7 and table[: len(token_table(model))] == token_table(model)
    with open_session(model, threads=1) as target, open_session(wider, threads=1) as draft:
        assert check_draft(target, draft) == [f"logits of {rows:,} tokens in the target, of {rows + 7:,} in the draft"]


def test_another_tokenizer_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def f")
    with pytest.raises(RecipeError, match="token 0 is not the same") as stop:
        speculate(TEACHER, tiny_model("llama"), prompts=tmp_path / "prompts.txt", threads=1)
    assert (stop.value.code, stop.value.found) == ("EW-800", repr("<|end|>"))


def test_the_verb_end_to_end(first_layer: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    found = speculate(
        TEACHER,
        first_layer,
        prompts=tmp_path / "prompts.jsonl",
        gamma=(1, 3),
        ngram=2,
        max_new_tokens=12,
        threads=1,
    )
    assert [row.token_identity for row in found.rows] == [1.0] * 4
    assert found.cost_ratio == pytest.approx(1_901_312 / 4_458_752), "both are computed in float32"
    assert found.measured_cost_ratio is not None and found.runtimes == ("torch", "torch")
    by_gamma = [row.counts for row in found.rows[:2]]
    assert by_gamma[0].block_efficiency is not None and by_gamma[1].block_efficiency is not None
    assert 1 <= by_gamma[0].block_efficiency <= by_gamma[1].block_efficiency <= 4
