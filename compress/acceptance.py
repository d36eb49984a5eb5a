"""How much of what a draft says its target would accept: from both distributions, on text that the target wrote.

For every token that the target wrote, p is the target's distribution there and q the draft's, both at the temperature
at which the document was written (Leviathan et al., arXiv 2211.17192):

    sampled    mean of sum_v min(p_v, q_v) = 1 - TV(p, q)    drafts are sampled
    greedy     mean of p(argmax q)                           drafts are best tokens, the target is sampled from
    agreement  share of argmax p == argmax q                 both are greedy

These are the exact expectations for the first draft token of a round, no draws: what a certified pair is compared with
is its acceptance at the first position. The first two are over documents written at a temperature above 0, `agreement`
over greedy ones; where there are none, over all documents, at temperature 1.

`draft_record.py` says how they are kept beside the draft.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgewright.compress.draft_record import DRAFT, PROMPT_TOKENS, PROMPTS
from edgewright.errors import BadInput
from edgewright.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.compress.align import AlignConfig

ROWS = 64
"""Positions whose whole distributions are in memory at once."""


@dataclass(frozen=True, slots=True)
class Written:
    """A document that a target wrote."""

    ids: tuple[int, ...]
    """Prompt and continuation, without the start token."""
    new: int
    """Tokens at its end that the target wrote."""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Expected acceptance of the first draft token of a round."""

    sampled: float
    greedy: float
    agreement: float
    tokens: int
    """That the target wrote, all of them."""
    documents: int

    def to_json(self) -> dict[str, float | int]:
        """As `draft.json` has it."""
        return {
            "acceptance_sampled": self.sampled,
            "acceptance_greedy": self.greedy,
            "agreement": self.agreement,
            "tokens": self.tokens,
            "documents": self.documents,
        }


def read_written(folder: Path) -> list[Written]:
    """The documents of a finished stage of type generate; in corpora of older versions all tokens count as written."""
    from edgewright.compress.generate import TEXT

    lines = (folder / TEXT).read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    return [Written(tuple(d["ids"]), d.get("new", len(d["ids"])), d["temperature"]) for d in documents]


def rates(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """sum(min(p, q)) and p(argmax q) of rows of distributions, [N, V_target] and [N, V_draft] -> [N], [N].

    Rows that only one of the two has are tokens that the other never says.
    """
    both = min(p.shape[-1], q.shape[-1])
    overlap = torch.minimum(p[:, :both], q[:, :both]).sum(-1)
    best = q.argmax(-1)
    of_best = p.gather(-1, best.clamp_max(p.shape[-1] - 1)[:, None])[:, 0]
    return overlap, torch.where(best < p.shape[-1], of_best, torch.zeros_like(of_best))


@torch.no_grad()
def measure_acceptance(
    draft: PreTrainedModel, target: PreTrainedModel, documents: Sequence[Written], start_id: int
) -> Acceptance:
    """Expected acceptance on documents that the target wrote, one after the other, in float32.

    Args:
        draft, target: on one device; vocabularies of the same tokens, perhaps padded otherwise.
        documents: at least one token has to be written in them.
        start_id: the token before a document.
    """
    drawn = [d for d in documents if d.temperature > 0 and d.new]
    greedy = [d for d in documents if d.temperature == 0 and d.new]
    every = [d for d in documents if d.new]
    assert every, "there is text to measure on"
    overlap, of_best, count = 0.0, 0.0, 0
    for document in drawn or every:
        heat = document.temperature or 1.0
        for theirs, ours in _rows(draft, target, document, start_id):
            both = rates(torch.softmax(theirs / heat, -1), torch.softmax(ours / heat, -1))
            overlap, of_best = overlap + float(both[0].double().sum()), of_best + float(both[1].double().sum())
            count += len(theirs)
    same, asked = 0, 0
    for document in greedy or every:
        for theirs, ours in _rows(draft, target, document, start_id):
            same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
            asked += len(theirs)
    return Acceptance(
        sampled=overlap / count,
        greedy=of_best / count,
        agreement=same / asked,
        tokens=sum(document.new for document in every),
        documents=len(every),
    )


def _rows(
    draft: PreTrainedModel, target: PreTrainedModel, document: Written, start_id: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of both at the tokens that the target wrote, float32 [at most ROWS, V], target first."""
    from edgewright.objective import ModelInputs
    from edgewright.student import hidden_states, output_head

    ids = torch.tensor([[start_id, *document.ids[:-1]]], device=draft.device)
    inputs = ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
    first = len(document.ids) - document.new
    states = [(output_head(model), hidden_states(model, inputs)[first:]) for model in (target, draft)]
    for begin in range(0, document.new, ROWS):
        theirs, ours = (head(hidden[begin : begin + ROWS]).float() for head, hidden in states)
        yield theirs, ours


def not_trained_on(documents: Iterable[Written], trained: Iterable[Written]) -> list[Written]:
    """Without those that are in the training text word for word, as greedy answers to a prompt of both."""
    seen = {document.ids for document in trained}
    return [document for document in documents if document.ids not in seen]


def held_out_texts(config: AlignConfig, generated: Path, earlier: dict[str, Path]) -> dict[str, list[Written]]:
    """The documents on which a draft is to be measured, by stage, without those that it is aligned on.

    Args:
        generated: the corpus that it is aligned on.
        earlier: what the stages before it left.

    Raises:
        BadInput: EW-846, all of a stage's text is trained on.
    """
    trained = read_written(generated)
    found = {}
    for name in config.texts:
        documents = read_written(earlier[name])
        found[name] = not_trained_on(documents, trained)
        if not any(document.new for document in found[name]):
            raise BadInput(
                "EW-846",
                "all of the text on which the draft's acceptance is to be measured is trained on",
                where=earlier[name].absolute(),
                expected="documents that are not in the text of `generated`",
                found=f"{len(documents):,} documents, each of them there",
                fix="give the stage other prompts",
            )
    return found


def write_draft_json(
    model: Path, config: AlignConfig, generated: Path, earlier: dict[str, Path], start_id: int, device: torch.device
) -> dict[str, Any]:
    """Measure a finished draft, and put `draft.json` beside it.

    Args:
        model: its directory.
        generated: the corpus that it was aligned on.
        earlier: what the stages before it left, those of `config.held_out` among them.

    Returns:
        What was written.

    Raises:
        BadInput: EW-846, as `held_out_texts`.
    """
    from edgewright.compress.teacher import open_frozen
    from edgewright.export.weight_hash import weights_sha256

    target, kept = config.teacher.directory(earlier), held_out_texts(config, generated, earlier)
    draft, judge = open_frozen(model, "fp32", device), open_frozen(target, config.teacher.weights, device)
    every = [document for documents in kept.values() for document in documents]
    found = {
        "schema_version": 1,
        "target_sha256": weights_sha256(target),
        "runtime": config.runtime,
        "do_sample": config.do_sample,
        **measure_acceptance(draft, judge, every, start_id).to_json(),
        "prompts": _prompts(every),
        "trained_on": sum(len(read_written(earlier[name])) for name in kept) - len(every),
        "by_text": {
            name: measure_acceptance(draft, judge, documents, start_id).to_json() for name, documents in kept.items()
        },
    }
    write_json(model / DRAFT, found)
    return found


def _prompts(documents: Sequence[Written]) -> list[list[int]]:
    """Prompts of documents that the target wrote greedily, taken from all of them evenly."""
    found = [d.ids[: len(d.ids) - d.new] for d in documents if d.temperature == 0 and 0 < d.new < len(d.ids)]
    different = list(dict.fromkeys(found))
    step = max(1, len(different) // PROMPTS)
    return [list(prompt[-PROMPT_TOKENS:]) for prompt in different[::step][:PROMPTS]]


def summary(found: dict[str, Any]) -> str:
    """A line of `draft.json` for the log."""
    apart = ", ".join(f"{name} {each['acceptance_sampled']:.3f}" for name, each in found["by_text"].items())
    return (
        f"acceptance on {found['tokens']:,} held-out tokens of the target's: sampled {found['acceptance_sampled']:.3f} "
        f"({apart}), greedy draft {found['acceptance_greedy']:.3f}, both greedy {found['agreement']:.3f}"
    )
