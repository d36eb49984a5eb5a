"""The quantized weight: integer codes and scales.

A weight is quantized once. Every writer lays out the codes and scales found here (`layout.py` knows the bits);
nothing is quantized again from floats on the way out, so a file that holds a lattice dequantizes to exactly
`codes * scale`. A checkpoint carries its lattice beside its weights, in `lattice.safetensors`.

Shapes: a weight is `[rows, columns]` (`[out, in]` of a linear layer), a scale belongs to a group of columns of one row.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgewright.errors import BadInput

Levels = Literal["ternary", "int2", "int4", "int5", "int8", "uint2", "uint4", "uint8", "nf4"]

LEVELS: dict[Levels, tuple[int, int]] = {
    "ternary": (-1, 1),
    "int2": (-2, 1),
    "int4": (-8, 7),
    "int5": (-16, 15),
    "int8": (-128, 127),
    "uint2": (0, 3),
    "uint4": (0, 15),
    "uint8": (0, 255),
    "nf4": (0, 15),
}
"""The codes that a file stores for each kind of lattice, both ends included."""

SIDECAR = "lattice.safetensors"
"""The file in a checkpoint directory that holds the lattice of its quantized weights."""

DETECTION_GROUP = 256
"""Columns per scale of the group-wise ternary weights that are recognised without a sidecar."""

EVIDENCE = 8
"""Weights per scale, zeros aside, that a lattice needs on average: any few numbers are multiples of something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeTensor:
    """A quantized weight: `weight[i, j] = codes[i, j] * scale of the group that holds column j of row i`.

    With `offsets` the group's offset is added (Q4_1); with a `codebook` the code is looked up there first (NF4).
    A zero point changes nothing in these formulas: codes are what is left when it is removed.

    Raises:
        ValueError: on construction, when shapes, types or code ranges contradict each other.
    """

    codes: np.ndarray
    """int8 `[rows, columns]` (int16 for the differences of two bytes), signed, the zero point already removed."""
    scales: np.ndarray
    """float32 `[1, 1]` (per tensor), `[rows, 1]` (per row) or `[rows, ceil(columns / group)]`."""
    group: int | None
    """Columns per scale (the last group may be short); None for one scale per tensor or row."""
    bits: float
    """Information width of a code: 2 for ternary in 2 bits, 4, 8."""
    levels: Levels
    """Which codes a file stores, a key of `LEVELS`."""
    zeros: np.ndarray | None = None
    """Zero points, int16 of the shape of `scales`: a file stores `code + zero`. None where it stores the code."""
    offsets: np.ndarray | None = None
    """float32 of the shape of `scales`, added to `code * scale`."""
    codebook: np.ndarray | None = None
    """float32 `[n]`: the values that the codes 0 to n - 1 stand for, before they are scaled."""

    def __post_init__(self) -> None:
        wide = self.levels == "uint8" and self.codes.dtype == np.int16
        if self.codes.ndim != 2 or not (self.codes.dtype == np.int8 or wide):
            raise ValueError(f"codes must be int8 [rows, columns], not {self.codes.dtype} {self.codes.shape}")
        rows, columns = self.codes.shape
        if self.group is None:
            legal = {(1, 1), (rows, 1)}
        elif self.group < 1:
            raise ValueError(f"a group must hold at least one column, not {self.group}")
        else:
            legal = {(rows, ceil_div(columns, self.group))}
        if self.scales.dtype != np.float32 or self.scales.shape not in legal:
            raise ValueError(
                f"scales must be float32 {sorted(legal)} for codes {self.codes.shape} and group {self.group}, "
                f"not {self.scales.dtype} {self.scales.shape}"
            )
        if not np.isfinite(self.scales).all():
            raise ValueError("scales must be finite")
        self._check_extras()
        low, high = LEVELS[self.levels]
        stored = self.stored
        if stored.size and (stored.min() < low or stored.max() > high):
            raise ValueError(f"{self.levels} codes lie in {low}..{high}, not {stored.min()}..{stored.max()}")

    def _check_extras(self) -> None:
        for name, value, dtype in (("zeros", self.zeros, np.int16), ("offsets", self.offsets, np.float32)):
            if value is not None and (value.dtype != dtype or value.shape != self.scales.shape):
                raise ValueError(
                    f"{name} must be {np.dtype(dtype)} {self.scales.shape}, not {value.dtype} {value.shape}"
                )
        if self.offsets is not None and not np.isfinite(self.offsets).all():
            raise ValueError("offsets must be finite")
        if self.codebook is None:
            return
        if self.codebook.dtype != np.float32 or self.codebook.shape != (LEVELS[self.levels][1] + 1,):
            raise ValueError(f"the codebook of {self.levels} codes must be float32 [{LEVELS[self.levels][1] + 1}]")
        if self.zeros is not None:
            raise ValueError("codes of a codebook have no zero point")

    @property
    def stored(self) -> np.ndarray:
        """The codes as a file stores them: with the zero point."""
        return self.codes if self.zeros is None else self.codes + self.per_weight(self.zeros)

    @property
    def symmetric(self) -> bool:
        """Whether a weight is no more than a code times a scale."""
        return self.offsets is None and self.codebook is None

    @property
    def single_scale(self) -> np.float32 | None:
        """The scale of all groups, where they share one."""
        first: np.float32 = self.scales.flat[0] if self.scales.size else np.float32(0)
        return first if (self.scales == first).all() else None

    def per_weight(self, values: np.ndarray) -> np.ndarray:
        """Values of groups, repeated so that they broadcast to `[rows, columns]`."""
        if self.group is None:
            return values
        return np.repeat(values, self.group, axis=1)[:, : self.codes.shape[1]]

    def per_block(self, values: np.ndarray, block: int) -> np.ndarray:
        """Values of groups, one for every storage block: `[rows, ceil(columns / block)]`.

        Raises:
            ValueError: a block would straddle two groups.
        """
        rows, columns = self.codes.shape
        blocks = ceil_div(columns, block)
        if self.group is None or values.shape[1] == 1:  # one group may well be longer than the row
            return np.broadcast_to(values, (rows, blocks))
        if self.group % block:
            raise ValueError(f"a block of {block} weights straddles groups of {self.group}")
        return np.repeat(values, self.group // block, axis=1)[:, :blocks]

    def block_scales(self, block: int) -> np.ndarray:
        """The scale of every storage block: float32 `[rows, ceil(columns / block)]`; errors as `per_block`."""
        return self.per_block(self.scales, block)

    def dequantize(self) -> np.ndarray:
        """float32 `[rows, columns]`, exactly codes * scale in float32 (one rounding, none for ternary codes)."""
        values = self.codes.astype(np.float32) if self.codebook is None else self.codebook[self.codes]
        scaled = values * self.per_weight(self.scales)
        return scaled if self.offsets is None else scaled + self.per_weight(self.offsets)

    def rows_reordered(self, order: np.ndarray | slice) -> LatticeTensor:
        """The same lattice with its rows in another order, or with some of them: row i becomes row `order[i]` of this
        one."""

        def moved(values: np.ndarray) -> np.ndarray:
            return values if len(values) == 1 else values[order]

        return replace(
            self,
            codes=self.codes[order],
            scales=moved(self.scales),
            zeros=None if self.zeros is None else moved(self.zeros),
            offsets=None if self.offsets is None else moved(self.offsets),
        )

    def scales_rounded(self, dtype: type[np.floating]) -> LatticeTensor:
        """The same codes with scales rounded to what `dtype` holds.

        Raises:
            ValueError: a scale is too large for it.
        """
        return replace(self, scales=_rounded_to(dtype, self.scales))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def grouped(weight: np.ndarray, group: int | None) -> np.ndarray:
    """`[rows, groups, columns per group]`, the last group filled up with zeros."""
    rows, columns = weight.shape
    if group is None:
        return weight[:, None, :]
    missing = ceil_div(columns, group) * group - columns
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(rows, -1, group)


def _nearest(values: np.ndarray) -> np.ndarray:
    """Round half away from zero, as C's roundf does, exactly also for 0.49999997."""
    magnitude = np.abs(values)
    whole = np.floor(magnitude)
    return np.copysign(whole + np.floor(2 * (magnitude - whole)), values)


def detect_ternary(weight: np.ndarray) -> LatticeTensor | None:
    """The lattice of a float32 weight whose values are {-s, 0, s} per tensor, else per row, else per group of 256.

    Returns None when the weight is not ternary (or not finite), or when it may be so by chance: all zeros, or fewer
    than `EVIDENCE` weights for each scale. The codes and scales found are exact.
    """
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2 or not weight.size:
        return None
    for group, per_tensor in ((None, True), (None, False), (DETECTION_GROUP, False)):
        if len(weight) > 8 and _ternary_with(weight[:4], group, per_tensor=per_tensor) is None:
            continue  # four rows tell a dense weight without touching the rest
        found = _ternary_with(weight, group, per_tensor=per_tensor)
        if found is not None:
            seen, scales = int(np.count_nonzero(found.codes)), int(np.count_nonzero(found.scales))
            return found if scales and seen >= EVIDENCE * scales else None
    return None


def _ternary_with(weight: np.ndarray, group: int | None, *, per_tensor: bool) -> LatticeTensor | None:
    magnitude = np.abs(weight)
    scales = magnitude.max(keepdims=True) if per_tensor else grouped(magnitude, group).max(axis=2)
    if not np.isfinite(scales).all():
        return None
    per_weight = scales if group is None else np.repeat(scales, group, axis=1)[:, : weight.shape[1]]
    if not ((magnitude == 0) | (magnitude == per_weight)).all():
        return None
    return LatticeTensor(codes=np.sign(weight).astype(np.int8), scales=scales, group=group, bits=2, levels="ternary")


def round_ternary(weight: np.ndarray, *, scale_dtype: type[np.floating] = np.float16) -> LatticeTensor:
    """Absmean ternary per row: `s = mean|w|` rounded to `scale_dtype`, code = clip(round(w / s), -1, 1).

    This is post-training rounding (arXiv:2402.17764, equation 1). It ruins a model that was not trained for it.
    """
    weight = np.asarray(weight, np.float32)
    scales = _rounded_to(scale_dtype, np.abs(weight).mean(axis=1, keepdims=True))
    safe = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(weight / safe), -1, 1).astype(np.int8)
    return LatticeTensor(codes=codes, scales=scales, group=None, bits=2, levels="ternary")


def round_int(
    weight: np.ndarray, *, bits: int, group: int | None, scale_dtype: type[np.floating] = np.float32
) -> LatticeTensor:
    """Round to nearest, symmetric: `s = max|group| / (2**(bits-1) - 1)`, code = clip(round(w / s)).

    Args:
        weight: float32 `[rows, columns]`, finite.
        bits: 4 or 8.
        group: columns per scale; None for one scale per row.
        scale_dtype: the precision of the scale in the file. The codes are rounded with the scale that the file holds.
    """
    levels: Levels = {4: "int4", 8: "int8"}[bits]  # type: ignore[assignment]
    high = 2 ** (bits - 1) - 1
    blocks = grouped(np.asarray(weight, np.float32), group)
    scales = _rounded_to(scale_dtype, np.abs(blocks).max(axis=2) / np.float32(high))
    safe = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(blocks / safe[..., None]), -high, high).astype(np.int8)
    codes = np.ascontiguousarray(codes.reshape(len(weight), -1)[:, : weight.shape[1]])
    return LatticeTensor(codes=codes, scales=scales, group=group, bits=bits, levels=levels)


def round_q8_0(weight: np.ndarray) -> LatticeTensor:
    """The rule of ggml's Q8_0, bit for bit: `d = max|block| / 127`, code = roundf(w * (1 / d)), d stored as fp16.

    `weight`: float32 `[rows, columns]` with columns a multiple of 32 and |w| < 65504 * 127.
    """
    blocks = grouped(np.asarray(weight, np.float32), 32)
    d = np.abs(blocks).max(axis=2) / np.float32(127)
    codes = _nearest(blocks * inverse_or_zero(d)[..., None])
    return _from_ggml(np.clip(codes, -127, 127), d, weight.shape, "int8")


def round_q4_0(weight: np.ndarray) -> LatticeTensor:
    """The rule of ggml's Q4_0, bit for bit: `d = (the value of largest magnitude) / -8`, code = floor(w / d + 8.5) - 8.

    The scale is signed, so that the extreme value of a block always falls on code -8.
    """
    blocks = grouped(np.asarray(weight, np.float32), 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    d = extreme / np.float32(-8)
    codes = np.trunc(blocks * inverse_or_zero(d)[..., None] + np.float32(8.5))
    return _from_ggml(np.clip(codes, 0, 15) - 8, d, weight.shape, "int4")


def _rounded_to(dtype: type[np.floating], scales: np.ndarray) -> np.ndarray:
    """float32 with the precision of `dtype`; infinite where too large, which `LatticeTensor` refuses."""
    with np.errstate(over="ignore"):
        return scales.astype(dtype).astype(np.float32)


def inverse_or_zero(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where the reciprocal does not exist in float32: such a block is zero in any 16-bit scale."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _from_ggml(codes: np.ndarray, d: np.ndarray, shape: tuple[int, ...], levels: Levels) -> LatticeTensor:
    return LatticeTensor(
        codes=codes.astype(np.int8).reshape(shape),
        scales=_rounded_to(np.float16, d),
        group=32,
        bits={"int4": 4, "int8": 8}[levels],
        levels=levels,
    )


def save_sidecar(directory: Path, lattice: dict[str, LatticeTensor]) -> None:
    """Write `lattice.safetensors` into a checkpoint directory, atomically.

    Args:
        directory: the Hugging Face model directory.
        lattice: by the state-dict name of the weight that it represents.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    header = {"format": "edgewright-lattice", "schema_version": "1"}
    for name, tensor in lattice.items():
        tensors[f"{name}.codes"] = np.ascontiguousarray(tensor.codes)
        tensors[f"{name}.scales"] = np.ascontiguousarray(tensor.scales)
        extras = {"zeros": tensor.zeros, "offsets": tensor.offsets, "codebook": tensor.codebook}
        tensors |= {
            f"{name}.{kind}": np.ascontiguousarray(value) for kind, value in extras.items() if value is not None
        }
        header[name] = json.dumps({"group": tensor.group, "bits": tensor.bits, "levels": tensor.levels})
    temporary = directory / f".{SIDECAR}.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, directory / SIDECAR)
    finally:
        temporary.unlink(missing_ok=True)


def load_sidecar(directory: Path) -> dict[str, LatticeTensor]:
    """The lattice beside a checkpoint, by state-dict name; empty when there is no `lattice.safetensors`.

    Raises:
        BadInput: EW-320 when the file is damaged or is not a lattice.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / SIDECAR
    if not path.exists():
        return {}
    lattice: dict[str, LatticeTensor] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.pop("format", None) != "edgewright-lattice":
                raise ValueError("its header does not say `edgewright-lattice`")
            header.pop("schema_version", None)
            present = set(file.keys())
            for name, entry in header.items():
                extras = [kind for kind in ("zeros", "offsets", "codebook") if f"{name}.{kind}" in present]
                parts = {kind: file.get_tensor(f"{name}.{kind}") for kind in ("codes", "scales", *extras)}
                lattice[name] = LatticeTensor(**parts, **json.loads(entry))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "EW-320",
            "the lattice beside the model cannot be read",
            where=path,
            expected="codes and scales of the quantized weights, as training wrote them",
            found=error,
            fix="copy the file again from where it was made, or delete it: ternary weights are recognised without it",
        ) from error
    return lattice
