"""What the gate measures, on models that are tables: each way to read a text is wrong once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.errors import BadInput, RecipeError
from edgewright.export.gate.compare import FULL, Comparison, _greedy_shares, compare
from edgewright.export.gate.limits import LIMITS, check_max_kl, limit_for
from edgewright.export.gate.reference import SPECIAL, Reference, read_reference
from edgewright.export.parity import _reasons
from edgewright.export.runtimes.session import Capabilities, Logits, Session
from edgewright.export.targets import TARGETS

VOCABULARY = 256
CONTEXT = 160


class TableSession(Session):
    """The next token depends on this one, the one before it and the position; its text is bytes."""

    runtime = "table"

    def __init__(self, table: np.ndarray, *, context_length: int = CONTEXT) -> None:
        self.path = Path("table")
        self.vocab_size = VOCABULARY
        self.context_length = context_length
        self.capabilities = Capabilities(logits=True, rewind=True, fp32_compute=True, left_padding=True)
        self.start_id = 0
        self.eos_ids = frozenset({0})
        self.table = table
        self.cache: list[int] = []

    @property
    def length(self) -> int:
        return len(self.cache)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        before = self.length
        self.cache += list(tokens)
        rows = self.computed(self.cache, before)
        return None if logits == "none" else rows if logits == "all" else rows[-1:]

    def computed(self, text: list[int], before: int) -> np.ndarray:
        """The rows of the tokens from `before` on."""
        rows = [
            self.table[token] + 0.5 * self.table[text[i - 1] if i else 0][::-1] + (i % 7) * self.table[i % 11]
            for i, token in enumerate(text)
        ]
        return np.array(rows[before:], np.float32)

    def batch_logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [self.computed(list(text), 0) for text in texts]

    def rewind(self, length: int) -> None:
        del self.cache[length:]

    def native_generate(self, tokens: Sequence[int], max_new_tokens: int, **settings: Any) -> list[int]:  # type: ignore[override]
        self.rewind(0)
        rows = self.append(tokens)
        new: list[int] = []
        while rows is not None and len(new) < max_new_tokens:
            new.append(int(rows[-1].argmax()))
            rows = self.append(new[-1:])
        return new

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def close(self) -> None:
        pass


def table(scale: float) -> np.ndarray:
    """Logits of a model: flat when the scale is small, as of one that was never trained."""
    return (np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)) * scale).astype(np.float32)


TRAINED, FLAT = table(1.0), table(0.01)


def noisy(logits: np.ndarray, size: float) -> np.ndarray:
    return logits + (np.random.default_rng(1).standard_normal(logits.shape) * size).astype(np.float32)


def reference_of(logits: np.ndarray) -> Reference:
    return read_reference(TableSession(logits), specials=[0, 255], full_context=CONTEXT)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return reference_of(TRAINED)


def compared(reference: Reference, candidate: Session) -> Comparison:
    return compare(reference, candidate, reference.readings)


# ---------------------------------------------------------------- every way to read


def test_the_same_model_is_the_same_in_every_way(reference):
    found = compared(reference, TableSession(TRAINED))
    assert found.kl == found.kl_weights == found.kl_runtime == found.max_abs_diff == found.top1_regret == 0
    assert (found.perplexity_ratio, found.top1_agreement, found.greedy_agreement) == (1, 1, 1)
    assert found.greedy_identity and found.tokenizer_identity
    assert _reasons(found, {"fp32"}, LIMITS["fp32"]) == []


class WrongInDecoding(TableSession):
    """One token behind others gets the row of another position."""

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        rows = super().append(tokens, logits)
        return rows if rows is None or len(tokens) > 1 or self.length == 1 else rows[:, ::-1]


class WrongInPieces(TableSession):
    """What follows in a second piece forgets the token before it."""

    def computed(self, text: list[int], before: int) -> np.ndarray:
        rows = super().computed(text, before)
        return rows if before == 0 or len(rows) == 1 else np.concatenate([rows[:1] * 0, rows[1:]])


class WrongAfterRewind(TableSession):
    """The cache forgets one token too many."""

    def rewind(self, length: int) -> None:
        super().rewind(max(0, length - 1))


class WrongAtTheEnd(TableSession):
    """Positions wrap around before the context ends."""

    def computed(self, text: list[int], before: int) -> np.ndarray:
        return super().computed([token if i < CONTEXT - 20 else 0 for i, token in enumerate(text)], before)


class WrongInShortTexts(TableSession):
    def computed(self, text: list[int], before: int) -> np.ndarray:
        rows = super().computed(text, before)
        return rows * 0.5 if before == 0 and 1 < len(rows) < 12 else rows


class WrongForSpecials(TableSession):
    def computed(self, text: list[int], before: int) -> np.ndarray:
        return super().computed([1 if token == 255 else token for token in text], before)


class WrongPadding(TableSession):
    """Positions count the padding."""

    def batch_logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        longest = max(map(len, texts))
        return [self.computed([0] * (longest - len(text)) + list(text), longest - len(text)) for text in texts]


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        (WrongInDecoding, {"decoding", "full context, decoding"}),
        (WrongInPieces, {"pieces", "after a rewind", "full context"}),
        (WrongAfterRewind, {"after a rewind", "full context, decoding"}),
        (WrongAtTheEnd, {"full context", "full context, decoding"}),
        (WrongInShortTexts, {"short prefill", "special tokens"}),
        (WrongForSpecials, {"special tokens"}),
        (WrongPadding, {"left-padded batch"}),
    ],
)
def test_a_fault_of_one_way_to_read_is_found_there(reference, kind, ways):
    found = compared(reference, kind(TRAINED))
    assert {way for way, mean in found.kl_by_way.items() if mean is None or mean > 1e-4} == ways
    assert _reasons(found, {"int4", "fp32"}, limit_for({"int4"}, fp32_compute=False)) != []


def test_logits_that_are_not_finite_are_said_so(reference):
    broken = TRAINED.copy()
    broken[101] = np.nan
    found = compared(reference, TableSession(broken))
    assert (found.kl, found.max_abs_diff, found.perplexity_ratio, found.top1_regret) == (None, None, None, None)
    assert _reasons(found, {"int4"}, LIMITS["int4"]) == ["the runtime gives logits that are not finite"]


def test_a_shorter_context_is_compared_as_far_as_it_goes(reference):
    found = compared(reference, TableSession(TRAINED, context_length=48))
    assert found.kl == 0 and found.greedy_identity
    assert FULL not in found.kl_by_way
    assert (found.longest_text, found.context_length) == (48, CONTEXT)
    assert found.skipped == {"full context": "the runtime holds 48 tokens only; the longest text had 48 of 160 tokens"}


@pytest.mark.parametrize(("affordable", "longest"), [(150, 150), (0, 128)])
def test_a_context_that_is_not_read_to_its_end_is_not_called_full(affordable, longest):
    found = compare(read_reference(TableSession(TRAINED), specials=[0], full_context=affordable), TableSession(TRAINED))
    assert FULL not in found.kl_by_way and ("long text" in found.kl_by_way) == (affordable > 0)
    assert (found.longest_text, found.context_length) == (longest, CONTEXT)
    assert found.skipped == {
        "full context": f"it would cost too much time; the longest text had {longest} of 160 tokens"
    }


def test_what_was_not_read_is_said(reference):
    assert compared(reference, TableSession(TRAINED)).skipped == {}
    assert compared(reference, TableSession(TRAINED)).longest_text == CONTEXT
    poor = TableSession(TRAINED)
    poor.capabilities = replace(poor.capabilities, rewind=False, left_padding=False)
    found = compared(replace(reference, readings={k: v for k, v in reference.readings.items() if k != SPECIAL}), poor)
    assert found.skipped.keys() == {"special tokens", "after a rewind", "left-padded batch"}
    assert not found.skipped.keys() & found.kl_by_way.keys()


def test_a_context_without_room_for_an_answer_is_no_error(reference):
    """The longest prompts fill it; what follows the start token alone is still compared."""
    found = compared(reference, TableSession(TRAINED, context_length=12))
    assert found.kl == 0 and found.greedy_identity
    assert _greedy_shares(reference, TableSession(TRAINED, context_length=1)) == [0.0]


def test_a_runtime_without_logits_proves_nothing(reference):
    candidate = TableSession(TRAINED)
    candidate.capabilities = replace(candidate.capabilities, logits=False)
    with pytest.raises(BadInput, match="EW-558"):
        compare(reference, candidate)


def test_a_vocabulary_of_another_size_is_refused(reference):
    candidate = TableSession(TRAINED)
    candidate.vocab_size += 1
    with pytest.raises(BadInput, match="EW-607"):
        compare(reference, candidate)


def test_other_tokens_are_found(reference):
    class Shifted(TableSession):
        def tokenize(self, text: str) -> list[int]:
            return [*super().tokenize(text), 0]

    assert not compared(reference, Shifted(TRAINED)).tokenizer_identity


# ---------------------------------------------------------------- weights apart from the runtime


def test_weights_and_runtime_are_told_apart(reference):
    """Rounded weights, then a runtime that rounds a little more."""
    rounded = noisy(TRAINED, 0.1)
    own = reference_of(rounded).readings
    own = {name: replace(own[name], rows=TableSession(rounded).computed(old.tokens, old.first))
           for name, old in reference.readings.items()}  # fmt: skip
    exact = compare(reference, TableSession(rounded), own)
    assert exact.kl_runtime == 0
    assert exact.kl_weights == pytest.approx(exact.kl_by_way["prefill"], rel=0.2)
    rough = compare(reference, TableSession(rounded + noisy(0 * TRAINED, 0.02)), own)
    assert rough.kl_runtime is not None and rough.kl_weights is not None
    assert 0 < 5 * rough.kl_runtime < rough.kl_weights == exact.kl_weights


def test_a_wrong_computation_cannot_hide_behind_a_coarse_width(reference):
    """A KL that 4 bits may cost is refused when it is the runtime's, not the weights'."""
    found = compared(reference, TableSession(noisy(TRAINED, 0.1)))
    assert found.kl is not None and 0.02 < found.kl < LIMITS["int4"].kl
    (reason,) = _reasons(found, {"int4"}, LIMITS["int4"])
    assert "does not compute what the file's weights say" in reason


# ---------------------------------------------------------------- top-1, judged by its margin


def test_flat_logits_are_not_judged_by_their_first_choice():
    """A model that was never trained changes its first choice at a breath; the file is still right."""
    reference = reference_of(FLAT)
    found = compare(reference, TableSession(noisy(FLAT, 0.002)))
    assert found.top1_agreement < 0.9 and not found.greedy_identity
    assert found.kl is not None and found.kl < 1e-4
    assert _reasons(found, {"int8"}, LIMITS["int8"]) == []


def test_a_flat_model_is_still_judged_by_kl():
    found = compare(reference_of(FLAT), TableSession(noisy(FLAT, 0.2)))
    assert any("mean KL" in reason for reason in _reasons(found, {"int8"}, LIMITS["int8"]))


def test_a_trained_model_must_keep_choices_that_are_clear():
    """A wrong first choice at 2% of the positions, where the checkpoint was sure: hardly any KL, and a refusal."""
    sure = TRAINED.copy()
    reference = reference_of(sure)

    class Misled(TableSession):
        def computed(self, text: list[int], before: int) -> np.ndarray:
            rows = super().computed(text, before)
            for row, position in zip(rows, range(before, len(text)), strict=True):
                if position % 40 == 7:
                    first, other = np.argsort(row)[[-1, -9]]
                    row[[first, other]] = row[[other, first]]
            return rows

    found = compare(reference, Misled(sure))
    assert found.top1_agreement > 0.95
    assert any("first choices" in reason for reason in _reasons(found, {"int8"}, replace(LIMITS["int8"], kl=10.0)))


def test_perplexity_is_judged_in_both_directions(reference):
    found = compared(reference, TableSession(TRAINED))
    for ratio in (1.2, 1 / 1.2):
        (reason,) = _reasons(replace(found, perplexity_ratio=ratio), {"int8"}, LIMITS["int8"])
        assert "perplexity" in reason


@pytest.mark.parametrize("field", ["kl", "kl_runtime", "perplexity_ratio", "top1_regret", "max_abs_diff"])
def test_what_is_no_number_fails(reference, field):
    found = replace(compared(reference, TableSession(TRAINED)), **{field: float("nan")})
    found = replace(found, kl_by_way={"prefill": found.kl})
    assert _reasons(found, {"fp32"}, LIMITS["fp32"]) != []


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("kind", [WrongInShortTexts, WrongForSpecials, WrongAfterRewind, WrongAtTheEnd])
def test_a_users_limit_does_not_hide_a_way_that_is_short(reference, kind):
    """`max_kl` replaces the limit of the mean KL alone."""
    limit = replace(limit_for({"int4"}, fp32_compute=False), kl=100.0)
    assert any("does not compute" in reason for reason in _reasons(compared(reference, kind(TRAINED)), {"int4"}, limit))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(RecipeError, match="EW-560"):
        check_max_kl(value)


def test_a_limit_of_the_user_is_a_number_above_0():
    check_max_kl(None)
    check_max_kl(1e-12)


def test_every_width_of_every_target_has_limits():
    for target in TARGETS.values():
        assert {*target.quants, *target.embedding_quants} <= LIMITS.keys()


def test_a_coarser_width_never_has_a_stricter_limit():
    order = ["f32", "f16", "bf16", "ternary", "q8_0", "q6_k", "q5_0", "q4_0", "q3_k", "q2_k"]
    for finer, coarser in zip(order, order[1:], strict=False):
        one, other = LIMITS[finer], LIMITS[coarser]
        assert one.kl < other.kl and one.runtime <= other.runtime
        assert one.perplexity < other.perplexity and one.regret <= other.regret


@pytest.mark.parametrize("widths", [{"iq1_s"}, {"f32", "iq1_s"}, set()])
def test_a_width_without_limits_is_an_error(widths):
    with pytest.raises(BadInput, match="EW-557"):
        limit_for(widths, fp32_compute=False)


def test_a_file_of_several_widths_may_cost_what_its_coarsest_may():
    assert limit_for({"f32", "q4_0", "q8_0"}, fp32_compute=False) == LIMITS["q4_0"]
    assert limit_for({"ternary", "fp32"}, fp32_compute=False) == LIMITS["ternary"]
    assert limit_for({"ternary", "fp32"}, fp32_compute=True).kl < LIMITS["ternary"].kl
    assert limit_for({"int4"}, fp32_compute=True).runtime == LIMITS["fp32"].runtime
