"""The gate: an exported file is the model it was made from, or it is refused.

Two questions are asked. Does the file hold the checkpoint's lattice, bit for bit, when an independent reader takes it
apart? And does its own runtime compute what the checkpoint computes, in prefill and in cached decoding?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgewright.export.artifact import SCHEMA_VERSION, read_entry
from edgewright.export.compare import Comparison, compare
from edgewright.export.runtimes.opening import open_session, runtime_of
from edgewright.export.runtimes.session import Session
from edgewright.export.source import Source, load_source

LOSSLESS = frozenset({"f32", "fp32"})
TERNARY = frozenset({"tq1_0", "tq2_0", "ternary"})

KL_LIMITS = {
    "f32": 1e-5,
    "fp32": 1e-5,
    "f16": 1e-3,
    "tq1_0": 5e-3,
    "tq2_0": 5e-3,
    "ternary": 5e-3,
    "q8_0": 1e-2,
    "int8": 1e-2,
    "q4_0": 0.3,
    "int4": 0.3,
}
"""Mean KL in nats per token that each width may cost. Ternary weights are exact; what remains are activations, which
most runtimes quantize to 8 bits. A file of several widths may cost what its widest loss may."""

EXACT_KL_LIMIT = 1e-3
"""For ternary weights in a runtime that computes in float32."""

MAX_ABS_DIFF = 1e-3
"""Largest difference of two logits in a lossless file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What the gate measured and decided. The fields of `Comparison`, the lattice, and the verdict."""

    path: Path
    against: Path
    max_abs_diff: float | None
    kl: float | None
    kl_ci: tuple[float, float] | None
    kl_limit: float
    top1_agreement: float
    greedy_identity: bool
    tokenizer_identity: bool
    lattice_identity: bool
    tokens: int
    gate: Literal["passed", "failed"]
    reasons: list[str]
    """Why the gate failed; empty when it passed."""

    def to_json(self) -> dict[str, Any]:
        """The object that `verify --json` prints."""
        paths = {"path": str(self.path), "against": str(self.against)}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **paths}

    def measured(self) -> dict[str, Any]:
        """The same without paths, for a manifest."""
        hidden = ("path", "against", "schema_version")
        return {key: value for key, value in self.to_json().items() if key not in hidden}


def verify(
    artifact: Path | str, *, against: Path | str, max_kl: float | None = None, threads: int | None = None
) -> Parity:
    """Compare an exported file or folder with a checkpoint.

    Args:
        artifact: a .gguf file (or a folder with exactly one), or an ONNX Runtime GenAI folder.
        against: the Hugging Face directory that it was made from.
        max_kl: limit for the mean KL, in the place of the one for the width.
        threads: of both runtimes.

    Returns:
        What was measured, with `gate` "passed" or "failed"; a failed gate is no exception here.
    """
    runtime, path = runtime_of(Path(artifact))
    to = {"llamacpp": "gguf", "genai": "genai", "torch": "hf"}[runtime]
    entry = read_entry(path)
    widths = _described(entry) if entry is not None else WIDTHS_OF[to](path)
    return judge(path, to, widths, load_source(against), max_kl=max_kl, threads=threads)


def judge(
    path: Path, to: str, widths: set[str], source: Source, *, max_kl: float | None = None, threads: int | None = None
) -> Parity:
    """The gate itself.

    Args:
        path: what was written.
        to: its target, a key of `DIFFERENCES`.
        widths: all widths in which its matrices are stored.
        source: the checkpoint.
        max_kl: limit for the mean KL, in the place of the one for the widths.
        threads: of both runtimes.
    """
    differences = DIFFERENCES[to](path, source)
    with open_session(source.directory, threads=threads) as reference, open_session(path, threads=threads) as session:
        measured = compare(reference, session)
        limit = _limit(widths, session) if max_kl is None else max_kl
    reasons = [*_lattice_reasons(differences), *_reasons(measured, widths, limit, overridden=max_kl is not None)]
    return Parity(
        path=path,
        against=source.directory,
        **asdict(measured),
        kl_limit=limit,
        lattice_identity=not differences,
        gate="failed" if reasons else "passed",
        reasons=reasons,
    )


def _limit(widths: set[str], session: Session) -> float:
    if widths & TERNARY and widths <= TERNARY | LOSSLESS and session.capabilities.fp32_compute:
        return EXACT_KL_LIMIT
    return max(KL_LIMITS.get(width, KL_LIMITS["int4"]) for width in widths)


def _lattice_reasons(differences: list[str]) -> list[str]:
    if not differences:
        return []
    more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
    return [f"the file does not hold the checkpoint's lattice: {'; '.join(differences[:3])}{more}"]


def _reasons(measured: Comparison, widths: set[str], limit: float, *, overridden: bool) -> list[str]:
    """What speaks against the file, apart from its lattice."""
    reasons = []
    if not measured.tokenizer_identity:
        reasons.append("the runtime splits text into other tokens than the checkpoint's tokenizer")
    if measured.kl is None or measured.max_abs_diff is None:
        return [*reasons, "the runtime gives logits that are not finite"]
    if measured.kl > limit:
        advice = "; train with the ternary method, or choose q8_0 or int8" if widths & TERNARY else ""
        reasons.append(f"the mean KL to the checkpoint is {measured.kl:.3g}, the limit is {limit:.3g}{advice}")
    if widths <= LOSSLESS and not overridden:
        if measured.max_abs_diff > MAX_ABS_DIFF:
            reasons.append(f"logits differ by up to {measured.max_abs_diff:.3g}, the limit is {MAX_ABS_DIFF:.3g}")
        if measured.top1_agreement < 1:
            reasons.append(f"only {measured.top1_agreement:.1%} of the first choices are the checkpoint's")
        if not measured.greedy_identity:
            reasons.append("greedy generation gives other tokens than the checkpoint")
    return reasons


def _described(entry: dict[str, Any]) -> set[str]:
    """All widths that a manifest names."""
    stored = {fallback["quant"] for fallback in entry["fallbacks"]}
    return {entry["quant"], entry["embedding_quant"], *stored}


# ---------------------------------------------------------------- what is asked of each target


def _gguf_differences(path: Path, source: Source) -> list[str]:
    from edgewright.export.gguf_reader import differences

    return differences(path, source)


def _genai_differences(path: Path, source: Source) -> list[str]:
    """Every lattice of the checkpoint, bit for bit; other matrices may have been rounded, norms may not."""
    import numpy as np

    from edgewright.export.onnx_reader import read_weights

    weights = read_weights(path)
    found = [f"{name} is not in the file" for name in source.lattice if name not in weights]
    for name, values in weights.items():
        lattice = source.lattice.get(name)
        expected = source.tensor(name) if lattice is None else lattice.dequantize()
        if (lattice is not None or values.ndim == 1) and not np.array_equal(values, expected):
            found.append(f"{name} differs in {np.count_nonzero(values != expected)} of {values.size} values")
    return found


def _genai_widths(path: Path) -> set[str]:
    from edgewright.export.onnx_reader import matrix_widths

    return matrix_widths(path)


def _hf_differences(path: Path, source: Source) -> list[str]:
    """Every tensor of the checkpoint, value for value."""
    import numpy as np

    other = load_source(path)
    missing = [f"{name} is not in the model" for name in source.names if name not in other.files]
    shared = [name for name in source.names if name in other.files]
    return missing + [
        f"{name} differs" for name in shared if not np.array_equal(source.tensor(name), other.tensor(name))
    ]


def _gguf_widths(path: Path) -> set[str]:
    from edgewright.export.gguf_reader import matrix_types

    return matrix_types(path)


DIFFERENCES: dict[str, Callable[[Path, Source], list[str]]] = {
    "gguf": _gguf_differences,
    "genai": _genai_differences,
    "hf": _hf_differences,
}
"""Where a file is not what the lattice says, in words."""

WIDTHS_OF: dict[str, Callable[[Path], set[str]]] = {
    "gguf": _gguf_widths,
    "genai": _genai_widths,
    "hf": lambda path: {"fp32"},
}
"""The widths in a file that has no manifest; the most generous one where it does not tell."""
