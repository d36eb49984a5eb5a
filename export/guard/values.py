"""Are the floating-point values in a file finite? Read in small pieces, up to a budget, smallest tensors first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from edgewright.errors import BadInput

BUDGET = 128 * 2**20
"""Bytes that one check reads: every norm and bias of any model, and all of a model up to that size. Weights behind it
are left to the gate, which reads every tensor."""
_CHUNK = 2**19

EXPONENTS = {
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F80_0000), "F64": ("<u8", 0x7FF0 << 48),
}  # fmt: skip
"""By type the integer of its width, and the bits of the exponent: all set means NaN or infinite."""


class FloatSpan(NamedTuple):
    """Floating-point numbers in a file: all of a span, or some of each of its blocks."""

    path: Path
    name: str
    begin: int
    end: int
    dtype: str
    """A key of `EXPONENTS`; a span of any other type is not looked at."""
    block: int = 0
    """Bytes of a block; 0 when the span is nothing but numbers."""
    places: tuple[int, ...] = (0,)
    """Where in each block a number begins."""
    infinite: bool = False
    """Infinities are fine here, NaN is not."""


def check_finite(spans: Iterable[FloatSpan], budget: int = BUDGET) -> None:
    """Refuse NaN and infinite values in the spans, the smallest first, as far as the budget of bytes goes.

    Raises:
        BadInput: EW-323 names file, tensor and byte.
    """
    chosen = []
    for span in sorted((span for span in spans if span.dtype in EXPONENTS), key=lambda span: span.end - span.begin):
        budget -= span.end - span.begin
        if budget < 0:
            break
        chosen.append(span)
    chosen.sort(key=lambda span: (span.path, span.begin, span.end))
    for path, of_file in groupby(chosen, key=lambda span: span.path):
        parts = list(of_file)
        begins = [part.begin for part in parts]
        with path.open("rb") as file:
            for span in _joined(parts):
                found = _first_in(file, span)
                if found is not None:
                    raise _not_finite(parts[bisect_right(begins, found) - 1], found)


def _joined(spans: list[FloatSpan]) -> Iterator[FloatSpan]:
    """The same bytes in fewer spans: neighbours of one kind become one, those that occur twice too."""
    joined = spans[0]
    for span in spans[1:]:
        alike = span[4:] == joined[4:] and not (span.block and span.begin != joined.begin)
        if alike and (span.begin == joined.end or (span.begin, span.end) == (joined.begin, joined.end)):
            joined = joined._replace(end=span.end)
        else:
            yield joined
            joined = span
    yield joined


def _first_in(file: BinaryIO, span: FloatSpan) -> int | None:
    """The byte where the first number of a span begins that is not finite."""
    file.seek(span.begin)
    at = span.begin
    while at < span.end:
        piece = file.read(min(_chunk(span), span.end - at))
        found = _first(piece, span)
        if found is not None:
            return at + found
        if not piece:
            return None  # the file has become shorter since its header was checked: whoever opens it will see
        at += len(piece)
    return None


def _chunk(span: FloatSpan) -> int:
    return _CHUNK // span.block * span.block if span.block else _CHUNK


def _first(piece: bytes, span: FloatSpan) -> int | None:
    """Where in the piece the first number that is not finite begins."""
    layout, exponent = EXPONENTS[span.dtype]
    width = np.dtype(layout).itemsize
    if not span.block:
        bad = _bad(np.frombuffer(piece, layout, len(piece) // width), exponent, span.infinite)
        return None if bad is None else bad * width
    blocks = np.frombuffer(piece, np.uint8, len(piece) // span.block * span.block).reshape(-1, span.block)
    for place in span.places:
        numbers = np.ascontiguousarray(blocks[:, place : place + width]).view(layout)[:, 0]
        bad = _bad(numbers, exponent, span.infinite)
        if bad is not None:
            return bad * span.block + place
    return None


def _bad(numbers: np.ndarray, exponent: int, infinite: bool) -> int | None:
    mask = numbers.dtype.type(exponent)
    bad = (numbers & mask) == mask
    if infinite and bad.any():
        bad &= (numbers & numbers.dtype.type(~exponent & (2 ** (8 * numbers.itemsize - 1) - 1))) != 0
    return int(bad.argmax()) if bad.any() else None


def _not_finite(span: FloatSpan, at: int) -> BadInput:
    return BadInput(
        "EW-323",
        f"the tensor {ascii(span.name)[:120]} holds values that are not finite",
        where=span.path.absolute(),
        expected="finite numbers",
        found=f"NaN or infinity at byte {at}",
        fix="the training that made it diverged, or the file is damaged: take an earlier checkpoint, or copy it again",
    )
