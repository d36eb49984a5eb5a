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

Levels = Literal["ternary", "int4", "int8"]

LEVELS: dict[Levels, tuple[int, int]] = {"ternary": (-1, 1), "int4": (-8, 7), "int8": (-128, 127)}
"""The codes that each kind of lattice may hold, both ends included."""

SIDECAR = "lattice.safetensors"
"""The file in a checkpoint directory that holds the lattice of its quantized weights."""

DETECTION_GROUP = 256
"""Columns per scale of the group-wise ternary weights that are recognised without a sidecar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeTensor:
    """A quantized weight: `weight[i, j] = codes[i, j] * scale of the group that holds column j of row i`.

    Raises:
        ValueError: on construction, when shapes, types or code ranges contradict each other.
    """

    codes: np.ndarray
    """int8 `[rows, columns]`, signed, the zero point already removed."""
    scales: np.ndarray
    """float32 `[1, 1]` (per tensor), `[rows, 1]` (per row) or `[rows, ceil(columns / group)]`."""
    group: int | None
    """Columns per scale (the last group may be short); None for one scale per tensor or row."""
    bits: float
    """Information width of a code: 2 for ternary in 2 bits, 4, 8."""
    levels: Levels
    """Which codes may occur, a key of `LEVELS`."""

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != np.int8:
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
        low, high = LEVELS[self.levels]
        if self.codes.size and (self.codes.min() < low or self.codes.max() > high):
            raise ValueError(
                f"{self.levels} codes lie in {low}..{high}, not {self.codes.min()}..{self.codes.max()}",
            )

    def block_scales(self, block: int) -> np.ndarray:
        """The scale of every storage block: float32 `[rows, ceil(columns / block)]`.

        Raises:
            ValueError: a block would straddle two groups.
        """
        rows, columns = self.codes.shape
        blocks = ceil_div(columns, block)
        if self.group is None:
            return np.broadcast_to(self.scales, (rows, blocks))
        if self.group % block and self.scales.shape[1] > 1:
            raise ValueError(f"a block of {block} weights straddles groups of {self.group}")
        return np.repeat(self.scales, max(1, self.group // block), axis=1)[:, :blocks]

    def dequantize(self) -> np.ndarray:
        """float32 `[rows, columns]`, exactly codes * scale in float32 (one rounding, none for ternary codes)."""
        scales = self.scales
        if self.group is not None:
            scales = np.repeat(scales, self.group, axis=1)[:, : self.codes.shape[1]]
        return self.codes.astype(np.float32) * scales

    def rows_reordered(self, order: np.ndarray) -> LatticeTensor:
        """The same lattice with its rows in another order: row i becomes row `order[i]` of this one."""
        scales = self.scales if self.scales.shape[0] == 1 else self.scales[order]
        return replace(self, codes=self.codes[order], scales=scales)

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

    Returns None when the weight is not ternary (or not finite). The codes and scales found are exact.
    """
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2 or not weight.size:
        return None
    if len(weight) > 8 and _ternary_with(weight[:4], DETECTION_GROUP, per_tensor=False) is None:
        return None  # four rows tell a dense weight without touching the rest
    for group, per_tensor in ((None, True), (None, False), (DETECTION_GROUP, False)):
        found = _ternary_with(weight, group, per_tensor=per_tensor)
        if found is not None:
            return found
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
    codes = _nearest(blocks * _inverse(d)[..., None])
    return _from_ggml(np.clip(codes, -127, 127), d, weight.shape, "int8")


def round_q4_0(weight: np.ndarray) -> LatticeTensor:
    """The rule of ggml's Q4_0, bit for bit: `d = (the value of largest magnitude) / -8`, code = floor(w / d + 8.5) - 8.

    The scale is signed, so that the extreme value of a block always falls on code -8.
    """
    blocks = grouped(np.asarray(weight, np.float32), 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    d = extreme / np.float32(-8)
    codes = np.trunc(blocks * _inverse(d)[..., None] + np.float32(8.5))
    return _from_ggml(np.clip(codes, 0, 15) - 8, d, weight.shape, "int4")


def _rounded_to(dtype: type[np.floating], scales: np.ndarray) -> np.ndarray:
    """float32 with the precision of `dtype`; infinite where too large, which `LatticeTensor` refuses."""
    with np.errstate(over="ignore"):
        return scales.astype(dtype).astype(np.float32)


def _inverse(d: np.ndarray) -> np.ndarray:
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
            for name, entry in header.items():
                lattice[name] = LatticeTensor(
                    codes=file.get_tensor(f"{name}.codes"),
                    scales=file.get_tensor(f"{name}.scales"),
                    **json.loads(entry),
                )
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
