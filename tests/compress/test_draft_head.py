"""A trimmed head: kept logits are the untrimmed ones, the others are one class, the finished model is plain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import VOCABULARY, Loop, difference, logits, small_model, tokens

from edgewright.compress.draft_head import HEAD, DraftHead, DraftHeadConfig
from edgewright.compress.ternary import TernaryConfig
from edgewright.compress.trimmed_head import TrimmedHead, by_frequency
from edgewright.errors import RecipeError
from edgewright.student import check_head, load_model

COUNTS = np.random.default_rng(0).permutation(VOCABULARY) + 1
EOS = int(COUNTS.argmin())
"""The rarest token ends documents: it is kept all the same."""
KEPT = 16


def trimmed(tokens: float = KEPT):  # noqa: ANN201 - a model and its method
    model = small_model()
    method = DraftHeadConfig(tokens=tokens).build()
    method.read_text(lambda: COUNTS, EOS)
    method.prepare(model)
    return model, method


def test_logits_of_kept_tokens_are_the_untrimmed_ones_and_all_others_are_one_class() -> None:
    model, method = trimmed()
    head = model.get_output_embeddings()
    assert isinstance(head, TrimmedHead)
    kept = head.kept_ids()
    before, after = logits(small_model()), logits(model)
    assert torch.equal(after[..., kept], before[..., kept])
    others = [token for token in range(VOCABULARY) if token not in kept]
    assert after.shape[-1] == VOCABULARY and len(others) == VOCABULARY - KEPT
    torch.testing.assert_close(after[..., others], after[..., others[:1]].expand_as(after[..., others]))
    torch.testing.assert_close(after[..., others[0]], before[..., others].mean(-1), rtol=1e-4, atol=1e-5)
    check_head(model, "a test")  # training in chunks computes the same logits


def test_the_most_frequent_tokens_are_kept_each_once_and_the_end_always() -> None:
    kept, rest = by_frequency(COUNTS, KEPT, VOCABULARY, EOS)
    assert EOS in kept and len(set(kept.tolist())) == KEPT and kept.tolist() == sorted(kept.tolist())
    assert sorted([*kept.tolist(), *rest.tolist()]) == list(range(VOCABULARY))
    best = set(np.argsort(-COUNTS)[: KEPT - 1].tolist())
    assert best | {EOS} == set(kept.tolist())
    most = int(COUNTS.argmax())  # the end is the most frequent one: it does not come twice
    assert set(by_frequency(COUNTS, KEPT, VOCABULARY, most)[0].tolist()) == set(np.argsort(-COUNTS)[:KEPT].tolist())


def test_ties_are_broken_by_the_lower_number() -> None:
    kept, _ = by_frequency(np.array([1, 5, 5, 5, 1]), 2, 6, None)
    assert kept.tolist() == [1, 2]


def test_training_moves_the_kept_rows_and_the_one_row_and_finishes_plain(tmp_path: Path) -> None:
    model, method = trimmed()
    head = model.get_output_embeddings()
    before = head.kept_rows.detach().clone(), head.other_row.detach().clone()
    Loop(model, method).run(3)
    assert not torch.equal(before[0], head.kept_rows) and not torch.equal(before[1], head.other_row)
    finished, lattice = method.finish(model)
    assert lattice == {} and type(finished.get_output_embeddings()) is torch.nn.Linear
    assert isinstance(model.get_output_embeddings(), TrimmedHead), "the trained form stays"
    assert difference(logits(finished), logits(model)) < 1e-6
    finished.save_pretrained(tmp_path)
    method.write_beside(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["architectures"] == ["LlamaForCausalLM"]
    (tmp_path / "tokenizer.json").write_text("{}")
    again = load_model(tmp_path)
    assert difference(logits(again), logits(model)) < 1e-6
    kept = json.loads((tmp_path / HEAD).read_text())["kept"]
    assert kept == head.kept_ids() and EOS in kept


def test_all_others_together_learn_one_probability() -> None:
    """Cross-entropy on a rare token raises all of them alike: a class of its own."""
    model, _ = trimmed()
    head = model.get_output_embeddings()
    rare = next(token for token in range(VOCABULARY) if token not in head.kept_ids())
    x = torch.randn(1, head.in_features)
    loss = torch.nn.functional.cross_entropy(head(x), torch.tensor([rare]))
    loss.backward()
    q = torch.softmax(head(x), -1)[0]
    mass = q[head.place == len(head.kept_rows)].sum()
    torch.testing.assert_close(head.other_row.grad, (mass - 1) * x, rtol=1e-4, atol=1e-6)


def test_what_it_costs_is_said() -> None:
    model, method = trimmed()
    numbers = method.describe(model).numbers
    assert numbers["parameters"] == (KEPT + 1) * 256 and numbers["kept"] == KEPT
    assert numbers["added"] == VOCABULARY * 256, "the head was tied"
    kept = model.get_output_embeddings().kept_ids()
    assert numbers["share_of_text"] == pytest.approx(COUNTS[kept].sum() / COUNTS.sum())


def test_it_shares_a_model_with_ternary_layers() -> None:
    model, method = trimmed()
    other = TernaryConfig().build()
    other.prepare(model)
    for first, second in ((method, other), (other, method)):
        plain, lattice = first.finish(model)
        plain, more = second.finish(plain)
        assert (lattice | more).keys() and difference(logits(plain), logits(model)) < 1e-5
    with pytest.raises(RecipeError, match="EW-711"):
        DraftHead(DraftHeadConfig()).prepare(model)


@pytest.mark.parametrize("number", [1.0, 63.0, 64.0, 0.001])
def test_none_or_all_of_the_tokens_are_refused(number: float) -> None:
    with pytest.raises(RecipeError, match="EW-845"):
        DraftHead(DraftHeadConfig(tokens=number)).chosen(small_model())


def test_layers_are_none_of_its_business() -> None:
    with pytest.raises(ValueError, match="remove layers"):
        DraftHeadConfig(layers=("down_proj",))


def test_state_survives_a_stop_bit_for_bit() -> None:
    """Which tokens are kept is in the checkpoint, whatever is counted when a run goes on."""
    model, method = trimmed()
    Loop(model, method).run(2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = small_model()
    other = DraftHeadConfig(tokens=KEPT).build()
    other.read_text(lambda: COUNTS[::-1].copy(), EOS)
    other.prepare(again)
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(model))
    assert tokens().max() < VOCABULARY
