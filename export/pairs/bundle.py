"""A bundle on the disk: which folder is one, and where its target, its draft and its settings are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.compress.draft_record import read_prompt_tokens
from edgewright.errors import BadInput
from edgewright.export.artifact import MANIFEST, read_entry
from edgewright.export.guard.files import printable
from edgewright.export.guard.pair import check_pair_folder

KIND = "pair"
"""`kind` of a bundle's entry in the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A target and its draft, as they lie in a folder."""

    path: Path
    to: str
    target: Path
    """The file or folder of the target, an artifact by itself."""
    draft: Path
    gamma: int
    prompts: tuple[tuple[int, ...], ...]
    """What it was certified on, as tokens; none if on built-in prompts."""
    entry: dict[str, Any]
    """What the manifest says."""


def bundle_of(path: Path) -> Bundle | None:
    """The bundle that a folder is, after the guard has seen its entries; None where it is none.

    A folder is one if its manifest says so.

    Raises:
        BadInput: EW-829, the manifest cannot be understood.
        Unsafe: what the guard refuses.
    """
    if not (path / MANIFEST).is_file():
        return None
    entry = read_entry(path)
    if entry is None or entry.get("kind") != KIND:
        return None
    names = [entry.get("target"), entry.get("draft", {}).get("path") if isinstance(entry.get("draft"), dict) else None]
    to, gamma = entry.get("to"), entry.get("gamma")
    if not isinstance(to, str) or not isinstance(gamma, int) or not all(isinstance(name, str) for name in names):
        raise damaged(path, f"to {printable(str(to))}, gamma {printable(str(gamma))}, parts {printable(str(names))}")
    try:
        prompts = read_prompt_tokens(entry.get("prompts", []))
    except ValueError as error:
        raise damaged(path, str(error)) from None
    target, draft = (str(name) for name in names)
    check_pair_folder(path, (target, draft))
    return Bundle(
        path=path, to=to, target=path / target, draft=path / draft, gamma=gamma, prompts=prompts, entry=entry
    )  # fmt: skip


def damaged(path: Path, found: str) -> BadInput:
    """EW-829, for whoever finds that the manifest cannot be right."""
    return BadInput(
        "EW-829",
        "the manifest of this pair cannot be understood",
        where=(path / MANIFEST).absolute(),
        expected="to, gamma, target and draft.path; prompts, if there are any, of the target's tokens",
        found=found,
        fix="export the pair again",
    )
