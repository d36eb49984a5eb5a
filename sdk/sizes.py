"""Sizes of memory as people write them: `8GB` is 8 * 10^9 bytes, `8GiB` is 8 * 2^30."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

UNITS = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("KMGT", start=1)
}
"""Bytes of each unit."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", re.IGNORECASE)
_UNITS_BY_LOWER = {unit.lower(): size for unit, size in UNITS.items()}


def is_size(text: str) -> bool:
    """Whether `parse_bytes` understands it."""
    return _SIZE.fullmatch(text) is not None


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `8GB`, `7.5 GiB` or `512MiB`; case does not matter.

    Raises:
        ValueError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"a size of memory such as 8GB or 7.5GiB, not {text!r}")
    return round(float(match[1]) * _UNITS_BY_LOWER[match[2].lower()])


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


MemorySize = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "string", "examples": ["8GB"]}, {"type": "integer", "exclusiveMinimum": 0}]}),
]
"""A field of a recipe in bytes, written as a size with its unit or as a whole number."""
