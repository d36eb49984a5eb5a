"""`draft.json` beside a finished draft: what it was aligned to, and how much of it its target accepted then.

    {"schema_version": 1, "target_sha256": of the target's weights as `export.weight_hash.weights_sha256`,
     "runtime": that it was aligned for, "do_sample": ..., "acceptance_sampled": ..., "acceptance_greedy": ...,
     "agreement": ..., "tokens": ..., "documents": ..., "trained_on": held-out documents left out for that reason,
     "prompts": [[token, ...], ...] of held-out documents that the target wrote greedily, without the start token,
     "by_text": {"STAGE": {"acceptance_sampled", "acceptance_greedy", "agreement", "tokens", "documents"}}}

`acceptance.py` says what the three rates are, and measures them. A pair is certified on the same prompts, so that its
agreement can be held against the one of training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput

DRAFT = "draft.json"
PROMPTS = 16
"""Prompts that are kept."""
PROMPT_TOKENS = 256
"""The last tokens of a longer prompt are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRecord:
    """What a reader of `draft.json` needs."""

    agreement: float | None
    """Share of the target's greedy tokens that the draft said as well, 0 to 1; None: not measured."""
    target_sha256: str | None
    prompts: tuple[tuple[int, ...], ...]
    """Of held-out documents; none in files of older versions, and where the target wrote nothing greedily."""

    def of_another(self, target: Path) -> bool:
        """Whether a target is known to be, or to be made from, other weights than those that the draft was aligned to.

        Of a file without a manifest that is not known, nor of one on a lattice: there the hash is over its codes too.
        """
        from edgewright.export.artifact import read_entry
        from edgewright.export.weight_hash import weights_sha256

        if self.target_sha256 is None:
            return False
        entry = read_entry(target)
        if entry is None:
            return target.is_dir() and weights_sha256(target) != self.target_sha256
        made_from = entry.get("made_from")
        known = made_from.get("sha256") if isinstance(made_from, dict) and not entry.get("lattice") else None
        return known is not None and known != self.target_sha256


def read_draft_record(draft: Path) -> DraftRecord | None:
    """What `draft.json` in this folder says; None where there is none.

    Raises:
        BadInput: EW-864, it says what cannot be.
    """
    path = draft / DRAFT
    if not path.is_file():
        return None
    try:
        return _record(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "EW-864",
            "draft.json does not tell the acceptance of this draft",
            where=path,
            expected="agreement, from 0 to 1, and prompts as lists of tokens",
            found=error,
            fix="give --acceptance, or train the draft again",
        ) from None


def record_for(draft: Path, target: Path) -> DraftRecord | None:
    """What `draft.json` says of these two; None too where it speaks of another target.

    Args:
        draft: its checkpoint.
        target: a checkpoint, or what was exported.

    Raises:
        BadInput: EW-864, it says what cannot be.
    """
    record = read_draft_record(draft)
    return None if record is None or record.of_another(target) else record


def _record(found: dict[str, Any]) -> DraftRecord:
    agreement = found["agreement"]
    if agreement is not None and not 0 <= float(agreement) <= 1:
        raise ValueError(agreement)
    return DraftRecord(
        agreement=None if agreement is None else float(agreement),
        target_sha256=found.get("target_sha256"),
        prompts=read_prompt_tokens(found.get("prompts", [])),
    )


def read_prompt_tokens(found: Any) -> tuple[tuple[int, ...], ...]:
    """Prompts as lists of tokens, out of JSON.

    Raises:
        ValueError: they are something else.
    """
    lists = isinstance(found, list) and all(isinstance(prompt, list) and prompt for prompt in found)
    if not lists or not all(type(token) is int and token >= 0 for prompt in found for token in prompt):
        raise ValueError("prompts that are no lists of tokens")
    return tuple(tuple(prompt) for prompt in found)
