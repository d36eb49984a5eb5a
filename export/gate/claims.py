"""What a manifest says about an artifact, held against the file: it may make the gate stricter, never looser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput
from edgewright.export.artifact import manifest_path, read_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a file is judged by."""

    widths: set[str]
    """Those that the file itself stores: a manifest that names others changes no limit."""
    kept: Mapping[str, str] | None = None
    """As in `identity.differences`; None without a manifest."""
    digests: Mapping[str, str] | None = None
    contradictions: list[str] = field(default_factory=list)
    """Where the manifest says what the file does not hold."""


def read_claims(path: Path, to: str) -> Claims:
    """The widths of a file, and what else its manifest promises.

    Raises:
        BadInput: EW-559, the manifest's entry cannot be understood; what the target's reader refuses.
    """
    from edgewright.export.targets import reader_of

    stored = reader_of(to).widths(path)
    entry = read_entry(path)
    if entry is None:
        return Claims(widths=stored)
    _check_form(entry, path)
    claimed = {entry["quant"], entry["embedding_quant"], *(each["quant"] for each in entry["fallbacks"])}
    contradictions = []
    if entry["to"] != to:
        contradictions.append(f"the manifest says {entry['to']}, but this is {to}")
    if not stored <= claimed:
        contradictions.append(
            f"the manifest names the widths {_listed(claimed)}, but the file stores {_listed(stored)}"
        )
    return Claims(
        widths=stored,
        kept=entry.get("lattice"),
        digests=entry.get("digests"),
        contradictions=contradictions,
    )


def _listed(widths: set[str]) -> str:
    return ", ".join(sorted(widths))


def _check_form(entry: dict[str, Any], path: Path) -> None:
    texts, tables = ("to", "quant", "embedding_quant"), ("lattice", "digests")
    wrong = [key for key in texts if not isinstance(entry.get(key), str)]
    wrong += [key for key in tables if not _is_table(entry.get(key, {}))]
    fallbacks = entry.get("fallbacks")
    if not isinstance(fallbacks, list) or not all(
        _is_table(each) and {"tensor", "quant"} <= each.keys() for each in fallbacks
    ):
        wrong.append("fallbacks")
    if wrong:
        raise BadInput(
            "EW-559",
            "the manifest of this artifact cannot be understood",
            where=manifest_path(path).absolute(),
            expected=f"an entry with {', '.join((*texts, *tables, 'fallbacks'))}",
            found=f"{', '.join(wrong)} missing or of another type",
            fix="export the model again, or remove the manifest: the file is then judged by itself",
        )


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
