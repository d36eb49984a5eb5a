"""The gate: an exported file is the model it was made from, or it is refused.

Two guards, each of which refuses alone. Does the file hold the checkpoint's weights, bit for bit, when an independent
reader takes it apart (`gate/identity.py`)? And does its own runtime compute what the checkpoint computes, in prefill
and in cached decoding (`gate/reference.py`, `gate/compare.py`), within the limits of its widths (`gate/limits.py`)?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgewright.errors import RecipeError
from edgewright.export.artifact import SCHEMA_VERSION
from edgewright.export.gate.claims import read_claims
from edgewright.export.gate.compare import Comparison, compare
from edgewright.export.gate.identity import differences
from edgewright.export.gate.limits import LOSSLESS, MAX_ABS_DIFF, TERNARY, Limit, check_max_kl, limit_for
from edgewright.export.gate.reference import Reading, Reference, read_again, read_reference
from edgewright.export.pairs.bundle import bundle_of
from edgewright.export.runtimes.opening import TARGET_OF, open_session, runtime_of
from edgewright.export.runtimes.session import Session
from edgewright.export.source import Source, load_source

if TYPE_CHECKING:
    from edgewright.export.gate.weights_only import WeightsOnly
    from edgewright.export.runtimes.torch_session import TorchSession

FULL_CONTEXT_WORK = 5e10
"""Tokens times parameters that reading a context to its end may cost: 256 tokens of a model of 200 million."""

FULL_CONTEXT = 16384
"""Tokens that are read of a context at most: masks grow with its square, and are 256 MB there, of one byte a place."""

MAX_TEXTS = 8
"""Documents of `verify --data` that are read."""

MAX_CHARACTERS = 4096
"""Of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What the gate measured and decided. The fields of `Comparison`, the weights, and the verdict."""

    path: Path
    against: Path
    max_abs_diff: float | None
    kl: float | None
    kl_ci: tuple[float, float] | None
    kl_by_way: dict[str, float | None]
    kl_weights: float | None
    kl_runtime: float | None
    kl_limit: float
    perplexity_ratio: float | None
    top1_agreement: float
    top1_regret: float | None
    greedy_identity: bool
    greedy_agreement: float
    tokenizer_identity: bool
    lattice_identity: bool
    tokens: int
    longest_text: int
    context_length: int
    skipped: dict[str, str]
    gate: Literal["passed", "failed"]
    reasons: list[str]
    """Why the gate failed; empty when it passed."""
    pair: dict[str, Any] | None = None
    """Of a bundle with a draft: what the two did together (`pairs/certify.Certificate`)."""

    def to_json(self) -> dict[str, Any]:
        """The object that `verify --json` prints."""
        paths = {"path": str(self.path), "against": str(self.against)}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **paths}

    def measured(self) -> dict[str, Any]:
        """The same without paths, for a manifest."""
        hidden = ("path", "against", "schema_version", "pair")
        return {key: value for key, value in self.to_json().items() if key not in hidden}


def verify(
    artifact: Path | str,
    *,
    against: Path | str,
    size: str | None = None,
    max_kl: float | None = None,
    threads: int | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    draft: Path | str | None = None,
) -> Parity:
    """Compare an exported file or folder with a checkpoint. Any file will do, with a manifest or without.

    Of a bundle the target is compared, and then the pair decodes (`pair.py`).

    Args:
        artifact: what `open_session` opens.
        against: the Hugging Face directory that it was made from.
        size: the sub-network that it was made from, where that is an elastic model.
        max_kl: limit for the mean KL to the checkpoint, in the place of the one for the widths; all others stay.
        threads: of both runtimes.
        data: text files (patterns) to compare on, in the place of the built-in texts: the first 8 documents.
        draft: the checkpoint that the draft of a bundle was made from: it is compared as well, and the acceptance in
            the runtime is held against that of the checkpoints.

    Returns:
        What was measured, with `gate` "passed" or "failed"; a failed gate is no exception here.

    Raises:
        RecipeError: EW-560, `max_kl` is no finite number above 0.
        BadInput: EW-557, the file has a width without a limit; EW-559, its manifest cannot be understood; what the
            reader, the runtime or the checkpoint refuse.
    """
    if size is not None:
        from edgewright.compress.elastic import sub_network_folder

        with sub_network_folder(against, size, Path(artifact)) as part:
            return replace(
                verify(artifact, against=part, max_kl=max_kl, threads=threads, data=data, draft=draft),
                against=Path(against),
            )
    check_max_kl(max_kl)
    bundle = bundle_of(Path(artifact))
    if bundle is not None:
        from edgewright.export.pair import verify_pair

        alone = verify(bundle.target, against=against, max_kl=max_kl, threads=threads, data=data)
        return verify_pair(bundle, alone, draft=draft, threads=threads, max_kl=max_kl)
    if draft is not None:
        raise RecipeError(
            "EW-831", "--draft is for bundles", where=artifact, expected="a folder that `export --draft` wrote",
            fix="leave out --draft",
        )  # fmt: skip
    runtime, path = runtime_of(Path(artifact))
    to = TARGET_OF[runtime]
    source = load_source(against)
    claims = read_claims(path, to)
    return judge(
        path,
        to,
        claims.widths,
        source,
        kept=claims.kept,
        digests=claims.digests,
        max_kl=max_kl,
        threads=threads,
        texts=None if data is None else _texts([data] if isinstance(data, str | Path) else data),
        objections=claims.contradictions,
    )


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
    texts: Mapping[str, str] | None = None,
    reference: Reference | None = None,
    objections: Sequence[str] = (),
) -> Parity:
    """The gate itself.

    Args:
        path: what was written.
        to: its target, a key of `targets.TARGETS`.
        widths: all widths in which its matrices are stored.
        source: the checkpoint.
        kept, digests: as in `differences`.
        max_kl: limit for the mean KL to the checkpoint, in the place of the one for the widths; all others stay.
        threads: of both runtimes.
        texts: real texts by name, in the place of the built-in ones.
        reference: what the checkpoint says, if it was read before (`reference_of`).
        objections: what else speaks against the file.

    Raises:
        RecipeError, BadInput: as `verify`.
    """
    from edgewright.export.gate.weights_only import WeightsOnly
    from edgewright.export.runtimes.torch_session import TorchSession

    check_max_kl(max_kl)
    with TorchSession(
        source.directory, threads=threads, source=source
    ) as torch:  # closed before the file's runtime opens
        reference = reference or _read_reference(torch, source, texts)
        weights = WeightsOnly(torch.model, source)
        unequal = differences(path, to, source, kept=kept, digests=digests, each=weights)
        own = _with_its_weights(torch, weights, reference)
    with open_session(path, threads=threads) as session:
        measured = compare(reference, session, own)
        limit = limit_for(widths, fp32_compute=session.capabilities.fp32_compute)
    if max_kl is not None:
        limit = replace(limit, kl=max_kl)
    reasons = [*objections, *_lattice_reasons(unequal), *_reasons(measured, widths, limit)]
    return Parity(
        path=path,
        against=source.directory,
        **asdict(measured),
        kl_limit=limit.kl,
        lattice_identity=not unequal,
        gate="failed" if reasons else "passed",
        reasons=reasons,
    )


def reference_of(source: Source, *, threads: int | None = None, texts: Mapping[str, str] | None = None) -> Reference:
    """What a checkpoint says on the gate's texts, to judge several files by."""
    from edgewright.export.runtimes.torch_session import TorchSession

    with TorchSession(source.directory, threads=threads, source=source) as session:
        return _read_reference(session, source, texts)


def _read_reference(session: Session, source: Source, texts: Mapping[str, str] | None) -> Reference:
    context = _affordable_context(source)
    return read_reference(session, texts=texts, specials=_special_tokens(source), full_context=context)


def _with_its_weights(session: TorchSession, weights: WeightsOnly, reference: Reference) -> dict[str, Reading] | None:
    """What the checkpoint says with the file's weights; None where they do not fit its model."""
    if not weights.complete:
        return None
    return read_again(session, reference) if weights.changed else reference.readings


def _special_tokens(source: Source) -> list[int]:
    added = source.tokenizer.get("added_tokens") or []
    limit = int(source.config["vocab_size"])
    return [token["id"] for token in added if token.get("special") and 0 <= token["id"] < limit]


def _affordable_context(source: Source) -> int:
    parameters = sum(prod(source.shape(name)) for name in source.names)
    return min(FULL_CONTEXT, int(FULL_CONTEXT_WORK / parameters))


def _texts(patterns: Sequence[str | Path]) -> dict[str, str]:
    """The beginnings of the first documents."""
    from edgewright.data import FilesData, iterate_documents

    files = FilesData(files=tuple(str(pattern) for pattern in patterns))
    return {name: text[:MAX_CHARACTERS] for name, text in islice(iterate_documents(files), MAX_TEXTS)}


# ---------------------------------------------------------------- the verdict


def _lattice_reasons(unequal: list[str]) -> list[str]:
    if not unequal:
        return []
    more = f" (and {len(unequal) - 3} more)" if len(unequal) > 3 else ""
    return [f"the file does not hold the checkpoint's lattice: {'; '.join(unequal[:3])}{more}"]


def _reasons(measured: Comparison, widths: set[str], limit: Limit) -> list[str]:
    """What speaks against the file, apart from its weights. Every comparison is written so that a NaN fails."""
    reasons = []
    if not measured.tokenizer_identity:
        reasons.append("the runtime splits text into other tokens than the checkpoint's tokenizer")
    if measured.kl is None:
        return [*reasons, "the runtime gives logits that are not finite"]
    if not measured.kl <= limit.kl:
        advice = "; train with the ternary method, or choose q8_0 or int8" if widths & TERNARY else ""
        way = next((way for way, mean in measured.kl_by_way.items() if mean == measured.kl), "no number")
        reasons.append(
            f"the mean KL to the checkpoint is {measured.kl:.3g} ({way}), the limit is {limit.kl:.3g}{advice}"
        )
    return reasons + _judged_by_width(measured, widths, limit)


def _judged_by_width(measured: Comparison, widths: set[str], limit: Limit) -> list[str]:
    """Whatever the table says besides the KL to the checkpoint."""
    assert measured.max_abs_diff is not None and measured.perplexity_ratio is not None  # as finite as the KL
    assert measured.top1_regret is not None
    ratio = max(measured.perplexity_ratio, 1 / measured.perplexity_ratio)
    reasons = []
    if measured.kl_runtime is not None and not measured.kl_runtime <= limit.runtime:
        reasons.append(
            f"the runtime does not compute what the file's weights say: its mean KL to them is "
            f"{measured.kl_runtime:.3g}, the limit is {limit.runtime:.3g}"
        )
    if not ratio <= limit.perplexity:
        reasons.append(
            f"the perplexity on real text is {measured.perplexity_ratio:.4g} times the checkpoint's, "
            f"the limit is {limit.perplexity:.4g}"
        )
    if not measured.top1_regret <= limit.regret:
        reasons.append(
            f"its first choices are worse than the checkpoint's by {measured.top1_regret:.3g} nats, "
            f"the limit is {limit.regret:.3g}"
        )
    if widths <= LOSSLESS and not measured.max_abs_diff <= limit.logits:
        reasons.append(f"logits differ by up to {measured.max_abs_diff:.3g}, the limit is {limit.logits:.3g}")
    if widths <= LOSSLESS and limit.logits <= MAX_ABS_DIFF:
        if not measured.top1_agreement >= 1:
            reasons.append(f"only {measured.top1_agreement:.1%} of the first choices are the checkpoint's")
        if not measured.greedy_identity:
            reasons.append("greedy generation gives other tokens than the checkpoint")
    return reasons
