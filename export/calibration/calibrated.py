"""Calibration on the way out: which of it a target and a width can use, and what the file may weigh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput, RecipeError
from edgewright.export.source import Source

BITS: dict[str, dict[str, int]] = {
    "gguf": {"q4_0": 4, "q8_0": 8},
    "genai": {"int4": 4, "int8": 8},
    "onnx": {"int4": 4, "int8": 8},
    "openvino": {"int4": 4, "int8": 8},
}
"""By target, the widths that store a lattice of calibration as it is, and their bits."""

IMATRIX: dict[str, tuple[str, ...]] = {"gguf": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")}
"""By target, the widths whose own quantizer takes the importance of each input column."""

WIDE_GROUPS = {"genai": 128, "onnx": 128}
"""Columns per scale where everything has 8 bits: as many as the plain rounding of the target has; else 32."""

COLUMNS = {"gguf": 32}
"""The rows of a calibrated matrix must be a multiple of this; a target that is not here takes any."""


def calibrated_source(
    source: Source,
    *,
    to: str,
    quant: str,
    embedding_quant: str | None,
    files: Sequence[str | Path],
    method: str,
    budget_mb: float | None,
    plain_bytes: Callable[[str | None], int],
    threads: int | None,
    say: Callable[[str], None],
) -> tuple[Source, str | None]:
    """Calibrate a model for one target and width.

    Token embedding and output head are calibrated where `embedding_quant` asks for a width of `BITS`; under a budget
    they compete with all other weights for 8 bits.

    Args:
        budget_mb: what the file may weigh, in 10**6 bytes; decides about 4 or 8 bits where `quant` has 4.
        plain_bytes: what the file weighs without calibration, given the width of the embedding.

    Returns:
        What to write, and the width of the embedding to ask for.

    Raises:
        RecipeError: EW-551, EW-555; BadInput: EW-553, 4 bits everywhere are over the budget; and what
            `calibrate` raises.
    """
    from edgewright.export.calibration.calibrate import calibrate
    from edgewright.export.calibration.sensitivity import NARROW

    widths = BITS.get(to, {})
    if quant in IMATRIX.get(to, ()):
        return calibrate(source, files=files, method="imatrix", threads=threads, say=say), embedding_quant
    if quant not in widths or method == "imatrix":
        raise _useless(to, quant, method)
    bits = widths[quant]
    if budget_mb is None or bits != NARROW:
        group = WIDE_GROUPS.get(to, 32) if bits != NARROW else 32
        result = calibrate(
            source, files=files, method=method, bits=bits, embedding_bits=widths.get(embedding_quant or ""),
            group=group, columns_of=COLUMNS.get(to, 1), threads=threads, say=say,
        )  # fmt: skip
        return result, embedding_quant
    asked = embedding_quant or quant
    spare = budget_mb * 1e6 - plain_bytes(asked)
    if spare < 0:
        raise BadInput(
            "EW-553",
            "the model does not fit the budget, even with 4 bits everywhere",
            where=source.directory.absolute(),
            expected=f"at least {plain_bytes(asked) / 1e6:.2f} MB",
            found=f"{budget_mb:g} MB",
            fix="allow more with --budget-mb, or start from a smaller model",
        )
    result = calibrate(
        source, files=files, method=method, bits=bits, embedding_bits=widths.get(asked), spare_bytes=spare,
        columns_of=COLUMNS.get(to, 1), threads=threads, say=say,
    )  # fmt: skip
    return result, asked


class Calibrations:
    """The sources that `--to best` tries: each calibration is made once, and serves every file that can hold it.

    Args:
        source: the checkpoint.
        files, method, threads, say: as in `calibrate`; without files nothing is calibrated.
    """

    def __init__(
        self,
        source: Source,
        *,
        files: Sequence[str | Path] | None,
        method: str,
        threads: int | None,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._files, self._method, self._threads, self._say = source, files, method, threads, say
        self._made: dict[tuple[object, ...], Source] = {}

    def of(self, to: str, quant: str, embedding_quant: str) -> Source:
        """What to write at these widths; the checkpoint itself where calibration cannot help."""
        from edgewright.export.calibration.calibrate import calibrate
        from edgewright.export.calibration.sensitivity import NARROW

        widths = BITS.get(to, {})
        useful = (*(widths if self._method != "imatrix" else ()), *IMATRIX.get(to, ()))
        if self._files is None or quant not in useful:
            return self._source
        if quant not in widths:
            key: tuple[object, ...] = ("imatrix",)
            settings: dict[str, Any] = {"method": "imatrix"}
        else:
            group = 32 if widths[quant] == NARROW else WIDE_GROUPS.get(to, 32)
            settings = {"method": self._method, "bits": widths[quant], "embedding_bits": widths.get(embedding_quant)}
            settings |= {"group": group, "columns_of": COLUMNS.get(to, 1)}
            key = tuple(settings.values())
        if key not in self._made:
            self._made[key] = calibrate(
                self._source, files=self._files, threads=self._threads, say=self._say, **settings
            )
        return self._made[key]


def _useless(to: str, quant: str, method: str) -> RecipeError:
    if method == "imatrix" and quant in BITS.get(to, {}):
        return RecipeError(
            "EW-555",
            f"calibration by imatrix cannot help {quant} in {to}: it only weighs columns for K-quants",
            expected="the method gptq or search, or a K-quant of gguf",
            found=f"{method} and {quant}",
            fix="leave out --method",
        )
    usable = [*BITS.get(to, {}), *IMATRIX.get(to, ())]
    return RecipeError(
        "EW-555",
        f"calibration cannot help {quant} in {to}",
        expected=f"one of: {', '.join(usable)}" if usable else f"one of the targets: {', '.join(BITS)}",
        found=quant,
        fix="leave out --calibrate; ternary weights must be trained: edgewright run with the ternary method",
    )
