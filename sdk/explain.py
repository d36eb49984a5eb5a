"""`explain`: the long form of an error, offline."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from edgewright._verbs import VerbModule
from edgewright.error_catalogue import catalogue
from edgewright.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What an error means and what to do."""

    code: str
    title: str
    text: str
    exit_code: int

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "code": self.code,
            "title": self.title,
            "text": self.text,
            "exit_code": self.exit_code,
        }


def explain(code: str) -> Explanation:
    """The long form of an error.

    Args:
        code: `EW-110`; also `ew-110` and `110`.

    Raises:
        RecipeError: EW-192, there is no such code.
    """
    digits = re.fullmatch(r"(?:EW-?)?(\d+)", code.strip(), re.IGNORECASE)
    name = f"EW-{digits.group(1)}" if digits else code
    entries = catalogue()
    if name not in entries:
        near = [known for known in entries if known[:4] == name[:4]] or list(entries)
        fix = "the code stands at the end of an error's first line"
        raise RecipeError("EW-192", "there is no such error code", expected=", ".join(near), found=code, fix=fix)
    entry = entries[name]
    return Explanation(code=name, title=entry.title, text=entry.text, exit_code=entry.exit_code)


sys.modules[__name__].__class__ = VerbModule
