"""Which weight goes into an ONNX graph at which width, and as which bytes: one place for all ONNX targets.

Matrices become `MatMulNBits` (embeddings `GatherBlockQuantized`, in the same layout), whose codes and scales are those
of the lattice: at ternary 2 bits and one fp32 scale per 128 weights, 2.25 bits a weight. The stock quantizers would
round ternary weights to something else. fp16 and bf16 are widths of storage: the runtime's CPU kernels compute in
float32 either way, and so does the graph.

A weight that its width cannot hold exactly goes to the next wider one of `WIDER`, and that is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgewright.errors import GateFailed
from edgewright.export.artifact import Fallback, digest
from edgewright.export.lattice import LatticeTensor, ceil_div, grouped, round_int, round_q4_0
from edgewright.export.layout.matmulnbits import MatMulNBits
from edgewright.export.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How weights of one packed width are stored."""

    bits: int
    rounds: bool
    """Whether a weight without a lattice is rounded to nearest; a ternary weight must have been trained."""
    blocks: tuple[int, ...]
    """Block sizes to choose from; 2 bits has fast kernels for these alone."""


Q4_BLOCK = 32
"""Weights per scale at 4 bits: what is rounded there loses less with more scales."""
HEAD_Q4_BLOCK = 128
"""The same for a head of its own, which is read whole for every token: 5 % fewer bytes a token at 200M ternary
parameters, and the kernel for large blocks is the faster one. A tied head keeps the blocks of the embedding."""
SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of the scale that just reaches the extreme of a block: a smaller one may lose less of all the rest."""
POSITIONS = "positions are added, not multiplied"
"""Why a table of positions is not packed."""
UNLIKE_EMBEDDING = "of embedding and head only one was trained in few bits"
"""Why a head has another width than the embedding, where none was asked for."""
ROWS_AT_ONCE = 4096
"""Rows of a head that are rounded at a time, which bounds the memory that it takes."""

WIDTHS: dict[str, Width] = {
    "ternary": Width(bits=2, rounds=False, blocks=(128, 64, 32)),
    "int4": Width(bits=4, rounds=True, blocks=(Q4_BLOCK,)),
    "int8": Width(bits=8, rounds=True, blocks=(128, 64, 32)),
}
"""The packed widths."""

WIDER: dict[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "bf16": ("bf16", "fp32"),
    "int8": ("int8", "fp32"),
    "int4": ("int4", "int8", "fp32"),
    "ternary": ("ternary", "int8", "fp32"),
}
"""The widths to try for a weight, the one asked for first."""

EMBEDDING_DEFAULT = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int8",
    "ternary": "fp32",
}
"""The width of token embedding and head where none is asked for, by the width of the linear layers."""

HALF = ("fp16", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One weight of the checkpoint, as a part of a matrix of the graph."""

    name: str
    weight: np.ndarray
    """float32 `[rows, columns]`."""
    lattice: LatticeTensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix in the layout of MatMulNBits."""

    codes: np.ndarray
    """uint8 `[rows, blocks, block * bits / 8]`."""
    scales: np.ndarray
    """float32 `[rows, blocks]`."""
    zeros: np.ndarray | None
    """Zero points, uint8 `[rows, ceil(blocks * bits / 8)]`; None for the operator's default, `2 ** (bits - 1)`."""
    layout: MatMulNBits
    columns: int
    lattices: tuple[LatticeTensor, ...]
    """What was packed, part by part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the manifest says of one weight."""

    name: str
    digest: str
    """Of what the file must give back."""
    kept: str
    """`exact`, or what was lost."""
    lost: str
    """Why it has another width than was asked for; empty where it has that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a matrix is stored."""

    width: str
    packed: Packed | None
    """None at fp32, fp16 and bf16."""
    records: tuple[Record, ...]
    """Of the weights that it joins."""


@dataclass(slots=True, kw_only=True)
class Packer:
    """Lays out one checkpoint, matrix by matrix, and keeps the record of it for the manifest."""

    source: Source
    quant: str
    """The width of linear layers, a key of `WIDER`."""
    embedding_quant: str | None
    """The width of token embedding and head; None takes `EMBEDDING_DEFAULT`, or the lattice of a ternary head."""
    fallbacks: list[Fallback] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """For each matrix, the digest of what the file must give back."""
    met: dict[str, str] = field(default_factory=dict)
    """For each matrix met: `exact`, or what was lost."""

    @property
    def embedding_width(self) -> str:
        """The width that the token embedding should have; a head of another width is among the fallbacks."""
        return self._width_of(self.source.embedding)

    @property
    def lattice(self) -> dict[str, str]:
        """For each lattice of the source: `exact`, or what was lost.

        Raises:
            GateFailed: EW-521, the graph has no place for a quantized weight.
        """
        for name in self.source.lattice:
            if name not in self.met:
                raise broken_graph(name, "no such weight")
        return {name: self.met[name] for name in self.source.lattice}

    def prepare(self, names: Sequence[str], *, packable: bool = True) -> Stored:
        """Lay out the matrix that joins these weights by rows, at the narrowest width that holds all of them.

        Nothing is recorded yet, so that several may be laid out at a time.

        Args:
            names: of the checkpoint; one name most of the time.
            packable: whether the graph may read it in blocks; a table of positions may not.
        """
        parts = [self._part(name) for name in names]
        asked, lost = self._asked(names[0])
        if not packable and asked in WIDTHS:
            asked, lost = "fp32", POSITIONS
        for width in WIDER[asked]:
            packed, reason = pack_at(parts, width, own_head=names[0] == self.source.head and not self.source.tied)
            if not reason:
                break
            lost = lost or reason
        records = [
            _record(part, width, None if packed is None else packed.lattices[index], lost)
            for index, part in enumerate(parts)
        ]
        return Stored(width=width, packed=packed, records=tuple(records))

    def keep(self, stored: Stored) -> Stored:
        """Record what was prepared, and give it back."""
        for record in stored.records:
            self.digests[record.name] = record.digest
            self.met[record.name] = record.kept
            if record.lost:
                self.fallbacks.append(Fallback(record.name, stored.width, record.lost))
        return stored

    def _asked(self, name: str) -> tuple[str, str]:
        """The width to try first; and why that one, where it is another than the manifest names for such a weight."""
        if name not in (self.source.embedding, self.source.head):
            return self.quant, ""
        width = self._width_of(name)
        return width, "" if width == self.embedding_width else UNLIKE_EMBEDDING

    def _width_of(self, name: str) -> str:
        """The width of embedding or head: as asked for, else ternary when it was trained so, else the default."""
        if self.embedding_quant is not None:
            return self.embedding_quant
        trained = name in self.source.lattice and self.quant == "ternary"
        return "ternary" if trained else EMBEDDING_DEFAULT[self.quant]

    def _part(self, name: str) -> Part:
        return Part(name=name, weight=self.source.matrix(name), lattice=self.source.lattice.get(name))


def pack_at(parts: Sequence[Part], width: str, *, own_head: bool = False) -> tuple[Packed | None, str]:
    """The parts at one width, or the reason why not. fp32 always works, and packs nothing.

    Args:
        parts: to be joined by rows.
        width: a key of `WIDER`.
        own_head: whether this is the output head, and not the embedding at the same time.
    """
    if width == "fp32":
        return None, ""
    if width in HALF:
        return None, next(filter(None, (_why_not_half(part, width) for part in parts)), "")
    rule = WIDTHS[width]
    if width == "int4" and own_head:
        rule = replace(rule, blocks=(HEAD_Q4_BLOCK, *rule.blocks))
    for part in parts:
        if part.lattice is None and not rule.rounds:
            return None, f"{part.name} is not {width}"
    columns = parts[0].weight.shape[1]
    reason = ""
    for layout in _layouts(
        rule, columns, zero_points=any(part.lattice and part.lattice.zeros is not None for part in parts)
    ):
        lattices = tuple(part.lattice or _rounded(part.weight, layout) for part in parts)
        reason = next(filter(None, map(layout.holds_exactly, lattices)), "")
        if not reason:
            return _joined(layout, lattices, columns), ""
    return None, reason


def _record(part: Part, width: str, packed: LatticeTensor | None, lost: str) -> Record:
    """Args: as they are stored; `packed` is what of the part became codes."""
    if packed is not None:
        values = packed.dequantize()
    else:
        values = part.weight if width == "fp32" else _half(part.weight, width)
    own = packed is not None and packed is part.lattice
    right = part.weight if part.lattice is None or own else part.lattice.dequantize()
    exact = own or width == "fp32" or np.array_equal(values, right)
    kept = "exact" if exact else f"rounded to {width}"
    return Record(name=part.name, digest=digest(values), kept=kept, lost=lost)


def _joined(layout: MatMulNBits, lattices: tuple[LatticeTensor, ...], columns: int) -> Packed:
    codes, scales = zip(*map(layout.pack, lattices), strict=True)
    zeros = np.concatenate([layout.pack_zero_points(each) for each in lattices]) if layout.zero_points else None
    return Packed(
        codes=np.concatenate(codes),
        scales=np.concatenate(scales),
        zeros=zeros,
        layout=layout,
        columns=columns,
        lattices=lattices,
    )


def half(values: np.ndarray, width: str) -> np.ndarray:
    """The values as float16, or as bfloat16 (numpy's type of ml_dtypes), rounded to nearest even."""
    import ml_dtypes

    with np.errstate(over="ignore"):
        return values.astype(np.float16 if width == "fp16" else ml_dtypes.bfloat16)


def _half(values: np.ndarray, width: str) -> np.ndarray:
    return half(values, width).astype(np.float32) if width in HALF else values


def _why_not_half(part: Part, width: str) -> str:
    """Why a weight may not be stored in half precision, or nothing. A lattice must not be lost, other weights round."""
    rounded = _half(part.weight, width)
    if not np.isfinite(rounded).all():
        return f"{part.name} holds values too large for {width}"
    if part.lattice is not None and not np.array_equal(rounded, part.weight):
        return f"{part.name} lies on a lattice that {width} would lose"
    return ""


def _rounded(weight: np.ndarray, layout: MatMulNBits) -> LatticeTensor:
    """A weight without a lattice, rounded to nearest.

    4 bits take the rule of ggml's Q4_0: its signed scale uses all 16 codes, which here loses an eighth less than 15
    symmetric ones, and in blocks of 32 the lattice is the same as in a GGUF file.
    """
    if layout.bits == 8:
        return round_int(weight, bits=8, group=layout.block)
    if layout.block != Q4_BLOCK:
        rows = range(0, len(weight), ROWS_AT_ONCE)
        parts = [_least_squares(weight[row : row + ROWS_AT_ONCE], layout.block) for row in rows]
        codes, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return LatticeTensor(codes=codes, scales=scales, group=layout.block, bits=4, levels="int4")
    columns = weight.shape[1]
    whole = round_q4_0(np.pad(weight, ((0, 0), (0, -columns % Q4_BLOCK))))
    return replace(whole, codes=np.ascontiguousarray(whole.codes[:, :columns]))


def _least_squares(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """4-bit codes and scales of some rows: the signed scale of Q4_0, times the factor that loses least."""
    blocks = grouped(weight, block)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    codes, scales = np.zeros(blocks.shape, np.int8), np.ones_like(extreme)
    lowest = np.full_like(extreme, np.inf)
    for factor in SCALE_FACTORS:
        tried = np.where(extreme == 0, np.float32(1), extreme * np.float32(factor / -8))
        found = np.clip(np.rint(blocks / tried), -8, 7)
        error = np.square(found * tried - blocks).sum(axis=2, keepdims=True)
        better = error < lowest
        codes, scales = np.where(better, found.astype(np.int8), codes), np.where(better, tried, scales)
        lowest = np.minimum(error, lowest)
    return np.ascontiguousarray(codes.reshape(len(weight), -1)[:, : weight.shape[1]]), scales[..., 0]


def _layouts(rule: Width, columns: int, *, zero_points: bool) -> Iterable[MatMulNBits]:
    """The layouts of a width, the one first that stores a row in the fewest bytes; of equals, the largest block.

    Those with zero points come last: what needs none is stored without.
    """

    def row_bytes(block: int) -> float:
        return ceil_div(columns, block) * (block * rule.bits / 8 + 4)

    blocks = sorted(rule.blocks, key=lambda block: (row_bytes(block), -block))
    for explicit in (False, True) if zero_points else (False,):
        for block in blocks:
            yield MatMulNBits(bits=rule.bits, block=block, zero_points=explicit)


def broken_graph(name: str, found: str) -> GateFailed:
    """A graph that does not hold a weight as the checkpoint has it."""
    return GateFailed(
        "EW-521",
        f"the graph and the checkpoint differ in the weight {name!r}",
        expected="every weight of the checkpoint, bit for bit, and no other",
        found=found,
        fix="this architecture is laid out in a way that is not known here: export to another target",
    )
