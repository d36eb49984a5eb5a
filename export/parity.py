"""The gate: an exported file is the model it was made from, or it is refused.

Two questions are asked. Does the file hold the checkpoint's lattice, bit for bit, when an independent reader takes it
apart? And does its own runtime compute what the checkpoint computes, in prefill and in cached decoding?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgewright.export.artifact import SCHEMA_VERSION, digest, read_entry
from edgewright.export.compare import Comparison, compare
from edgewright.export.limits import LOSSLESS, MAX_ABS_DIFF, TERNARY, kl_limit
from edgewright.export.runtimes.opening import TARGET_OF, open_session, runtime_of
from edgewright.export.source import Source, load_source


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
    from edgewright.export.targets import reader_of

    runtime, path = runtime_of(Path(artifact))
    to = TARGET_OF[runtime]
    entry = read_entry(path)
    widths = _described(entry) if entry is not None else reader_of(to).widths(path)
    said = {} if entry is None else {"kept": entry["lattice"], "digests": entry.get("digests", {})}
    return judge(path, to, widths, load_source(against), max_kl=max_kl, threads=threads, **said)


def judge(
    path: Path,
    to: str,
    widths: set[str],
    source: Source,
    *,
    kept: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
    max_kl: float | None = None,
    threads: int | None = None,
) -> Parity:
    """The gate itself.

    Args:
        path: what was written.
        to: its target, a key of `targets.TARGETS`.
        widths: all widths in which its matrices are stored.
        source: the checkpoint.
        kept, digests: as in `differences`.
        max_kl: limit for the mean KL, in the place of the one for the widths.
        threads: of both runtimes.
    """
    unequal = differences(path, to, source, kept=kept, digests=digests)
    with open_session(source.directory, threads=threads) as reference, open_session(path, threads=threads) as session:
        measured = compare(reference, session)
        limit = kl_limit(widths, fp32_compute=session.capabilities.fp32_compute) if max_kl is None else max_kl
    reasons = [*_lattice_reasons(unequal), *_reasons(measured, widths, limit, overridden=max_kl is not None)]
    return Parity(
        path=path,
        against=source.directory,
        **asdict(measured),
        kl_limit=limit,
        lattice_identity=not unequal,
        gate="failed" if reasons else "passed",
        reasons=reasons,
    )


def _lattice_reasons(unequal: list[str]) -> list[str]:
    if not unequal:
        return []
    more = f" (and {len(unequal) - 3} more)" if len(unequal) > 3 else ""
    return [f"the file does not hold the checkpoint's lattice: {'; '.join(unequal[:3])}{more}"]


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


# ---------------------------------------------------------------- what the file holds


def differences(
    path: Path,
    to: str,
    source: Source,
    *,
    kept: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
) -> list[str]:
    """Where a file is not what its checkpoint and its manifest say, in words; empty when it is, bit for bit.

    Args:
        path: the file or folder; its target's own reader takes it apart, without the code that wrote it.
        to: its target.
        source: the checkpoint.
        kept: what the manifest says about each lattice (`Written.lattice`); None without a manifest, when a scale may
            be rounded to fp16.
        digests: what each matrix must give back (`Written.digests`).
    """
    from edgewright.export.targets import reader_of

    found, seen, digests = [], set(), digests or {}
    for name, values in reader_of(to).read_weights(path, source):
        seen.add(name)
        reason = _difference(name, values, source, kept, digests.get(name))
        if reason is not None:
            found.append(f"{name} {reason}")
    missing = sorted({*source.lattice, *digests} - seen)
    return found + [f"{name} is not in the file" for name in missing]


def _difference(
    name: str, values: np.ndarray, source: Source, kept: Mapping[str, str] | None, expected: str | None
) -> str | None:
    """What is wrong with one weight, or None."""
    if values.ndim == 1 and name in source.files:
        return _unequal(values, _as_wide_as(values, source.tensor(name)))
    if expected is not None and digest(values) != expected:
        return "is not what was laid out"
    if name not in source.lattice or name in source.calibrated:
        return None
    right = source.lattice[name]
    if kept is None and _unequal(values, right.dequantize()):
        right = right.scales_rounded(np.float16)
    if kept is None or kept.get(name) == "exact":
        return _unequal(values, right.dequantize())
    return None


def _as_wide_as(values: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A norm or bias rounded to half precision, where the file's values are."""
    half = right.astype(np.float16).astype(np.float32)
    return half if np.array_equal(values, half) else right


def _unequal(values: np.ndarray, right: np.ndarray) -> str | None:
    if values.shape != right.shape:
        return f"has the shape {values.shape}, not {right.shape}"
    wrong = np.count_nonzero(values != right)
    return f"differs in {wrong} of {values.size} values" if wrong else None
