"""Pairs: a target and its draft for speculative decoding as one bundle, certified in the runtime that will run them.

The runtime's rules are checked first (`pairs/rules.py`). Then the two are exported, each through its own gate; what the
runtime needs to know of both is written (`pairs/layout.py`, `pairs/launch.py`); and the files decode together, plain
and speculatively in turn (`pairs/certify.py`). All of it or none appears under the final name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.compress.draft_record import DraftRecord, record_for
from edgewright.errors import GateFailed
from edgewright.export.artifact import Artifact, settled_hash_of, size_of, write_entry
from edgewright.export.onnx.decoder import has_windows
from edgewright.export.pairs.bundle import KIND, Bundle, bundle_of, damaged
from edgewright.export.pairs.certify import NEW_TOKENS, Certificate, Expected, built_in_prompts, certify, counts_of
from edgewright.export.pairs.launch import Launch, write_launch
from edgewright.export.pairs.layout import layout_of
from edgewright.export.pairs.options import PairOptions
from edgewright.export.pairs.peak import peak_memory_of
from edgewright.export.pairs.rules import check_pair
from edgewright.export.runtimes.opening import TARGET_OF, open_pair, runtime_of
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.source import Source, load_source
from edgewright.export.staging import folder, staged, swap
from edgewright.export.targets import Made, check_runtime, check_target, make, occupied, replaceable
from edgewright.files import disk_errors
from edgewright.inventory import weight_bytes

if TYPE_CHECKING:
    from edgewright.export.parity import Parity

MAX_PROMPTS = 16
"""Prompts of a user that are decoded, evenly from all files; of training's there are no more."""
MAX_PROMPT_TOKENS = 256
"""The end of a longer prompt is what is decoded from, and of one that leaves no room in the context."""


def export_pair(
    target: Source,
    options: PairOptions,
    *,
    to: str,
    quant: str,
    embedding_quant: str | None,
    out: Path,
    verify: bool,
    max_kl: float | None,
    threads: int | None,
    say: Callable[[str], None],
) -> Artifact:
    """Write a bundle. Arguments and the errors of each half as in `targets.export`.

    Raises:
        RecipeError: EW-820 to EW-827, EW-833, the runtime cannot serve this pair; EW-509, `out` is something else
            already.
        GateFailed: EW-830, the pair does not decode as its target does; nothing was left behind.
    """
    draft = load_source(options.draft)
    draft_quant = quant if options.quant is None else options.quant
    check_target(to, draft_quant, options.embedding_quant)
    notes = check_pair(to, target, draft, options.gamma)
    if verify:
        check_runtime(to)
    if out.exists() and not replaceable(out):
        raise occupied(out, "a new folder, an empty one, or one that holds nothing but an earlier export")
    layout = layout_of(to, quant=quant, draft_quant=draft_quant)
    with disk_errors(out), folder(out.parent), staged(out) as place:
        place.mkdir()
        halves = []
        for source, part, width, embedding in (
            (target, layout.target, quant, embedding_quant),
            (draft, layout.draft, draft_quant, options.embedding_quant),
        ):
            say(f"exporting {source.name} to {to} {width}")
            made = make(
                source, place / part, to=to, quant=width, embedding_quant=embedding, verify=verify, max_kl=max_kl,
                threads=threads,
            )  # fmt: skip
            write_entry(made.place, made.entry)
            halves.append(made)
        layout.arrange(place, options.gamma)
        windows = has_windows(target) or has_windows(draft)
        launch = Launch(place=place, target=layout.target, draft=layout.draft, gamma=options.gamma, windows=windows)
        write_launch(to, launch)
        entry = _entry(place, halves, launch, notes)
        write_entry(place, entry)
        if verify:
            say("decoding with the pair")
            bundle = bundle_of(place)
            assert bundle is not None
            record = record_for(draft.directory, target.directory)
            bundle = replace(bundle, prompts=prompts_for(bundle, record, options.prompts, threads))
            certificate = certify_bundle(bundle, target, draft, record=record, threads=threads)
            _refuse_failed(certificate, target)
            entry |= {"prompts": bundle.prompts, "pair": certificate.to_json(), "gate": certificate.gate}
            write_entry(place, entry)
        swap(place, out)
    return _artifact(out, entry, halves)


def certify_bundle(
    bundle: Bundle,
    target: Source | None = None,
    draft: Source | None = None,
    *,
    record: DraftRecord | None = None,
    threads: int | None = None,
) -> Certificate:
    """Decode with a bundle, and judge it.

    Args:
        bundle: as it lies on the disk.
        target, draft: the checkpoints, whose own acceptance the bundle's is held against; without both it is what the
            manifest says of them.
        record: what training said of the two.
        threads: of the runtime.

    Raises:
        BadInput: what opening it raises; EW-829, its prompts are not of its tokens; EW-832, no prompt fits.
    """
    with open_pair(bundle, threads=threads) as session:
        prompts = [list(prompt) for prompt in bundle.prompts] or built_in_prompts(session)
        unknown = [token for prompt in prompts for token in prompt if token >= session.vocab_size]
        if unknown:
            raise damaged(bundle.path, f"token {unknown[0]} in prompts, of {session.vocab_size:,} tokens")
    expected = _expected(target, draft, record, prompts, bundle, threads)
    peak = peak_memory_of(bundle.path, threads=threads)
    ratio = weight_bytes(bundle.draft) / weight_bytes(bundle.target)
    with open_pair(bundle, threads=threads) as session:
        return certify(session, prompts, cost_ratio=ratio, expected=expected, peak_memory=peak)


def prompts_for(
    bundle: Bundle, record: DraftRecord | None, files: Sequence[Path], threads: int | None
) -> tuple[tuple[int, ...], ...]:
    """What to certify a pair on: the user's prompts, or what the draft's acceptance was measured on in training; none
    for the built-in ones."""
    from edgewright.speculative.prompts import evenly, read_prompts

    with open_pair(bundle, threads=threads) as session:
        if files:
            texts = evenly(read_prompts(files, limit=MAX_PROMPTS), MAX_PROMPTS)
            found = [session.tokenize(prompt.text) for prompt in texts]
        else:
            found = [list(prompt) for prompt in record.prompts] if record else []
        most = max(1, min(MAX_PROMPT_TOKENS, session.context_length - NEW_TOKENS - 1))
        return tuple((session.start_id, *tokens[-most:]) for tokens in found)


def _expected(
    target: Source | None,
    draft: Source | None,
    record: DraftRecord | None,
    prompts: list[list[int]],
    bundle: Bundle,
    threads: int | None,
) -> Expected:
    """What the checkpoints do in float32, in the loop of `edgewright.speculative`, and what they did in training."""
    if target is None or draft is None:
        known = bundle.entry.get("pair")
        rates = known if isinstance(known, dict) else {}
        return Expected(**{each.name: _rate(rates.get(each.name)) for each in fields(Expected)})
    with ExitStack() as stack:
        large, small = (
            stack.enter_context(TorchSession(source.directory, threads=threads, source=source))
            for source in (target, draft)
        )
        counts = counts_of(large, small, prompts, bundle.gamma)
    return Expected(
        checkpoint_acceptance=counts.acceptance_rate,
        checkpoint_agreement=counts.agreement,
        trained_agreement=record.agreement if record and bundle.prompts else None,
    )


def _rate(found: Any) -> float | None:
    """A rate out of a manifest."""
    return found if isinstance(found, float) else None


def _refuse_failed(certificate: Certificate, target: Source) -> None:
    if certificate.gate == "failed":
        raise GateFailed(
            "EW-830",
            f"this pair does not decode as its target does, and was not kept: {'; '.join(certificate.reasons)}",
            where=target.directory.absolute(),
            expected="the tokens of plain decoding, up to ties within the runtime's own rounding",
            found=f"{certificate.token_identity:.1%} of {certificate.prompts} prompts with the same tokens",
            fix="choose wider types for the target, or another runtime; --no-verify keeps the pair unproven",
        )


def _entry(place: Path, halves: Sequence[Made], launch: Launch, notes: list[str]) -> dict[str, Any]:
    """What the manifest says of the bundle: of the target what an artifact's entry says, and the pair's own keys."""
    target, draft = halves
    return {
        **target.entry,
        "kind": KIND,
        "target": launch.target,
        "draft": {"path": launch.draft, **draft.entry},
        "gamma": launch.gamma,
        "bytes": size_of(place),
        "sha256": settled_hash_of(place),
        "pair": None,
        "gate": "skipped",
        "notes": [*target.entry["notes"], *notes],
        "versions": {**target.entry["versions"], "edgewright": version("edgewright")},
    }


def _artifact(out: Path, entry: Mapping[str, Any], halves: Sequence[Made]) -> Artifact:
    target, draft = halves
    certificate: Mapping[str, Any] = entry["pair"] or {}
    return Artifact(
        path=out,
        to=entry["to"],
        quant=entry["quant"],
        bytes=entry["bytes"],
        fallbacks=[*target.written.fallbacks, *draft.written.fallbacks],
        gate=entry["gate"],
        parity=entry["parity"],
        notes=[*entry["notes"], *certificate.get("warnings", [])],
        pair={
            "gamma": entry["gamma"],
            "target": str(out / entry["target"]),
            "draft": str(out / entry["draft"]["path"]),
            "draft_quant": entry["draft"]["quant"],
            **certificate,
        },
    )


# ---------------------------------------------------------------- verify


def verify_pair(
    bundle: Bundle, alone: Parity, *, draft: Path | str | None, max_kl: float | None, threads: int | None
) -> Parity:
    """The gate of a bundle, again.

    Args:
        bundle: as it lies on the disk.
        alone: what became of its target.
        draft: the checkpoint of its draft. With it the runtime's rules are checked again, the draft goes through its
            own gate, and the acceptance is held against that of the checkpoints.
        max_kl, threads: as in `parity.verify`.

    Returns:
        `alone`, with the certificate, and with what speaks against the bundle.

    Raises:
        RecipeError, BadInput: as `export_pair` and `certify_bundle`.
    """
    from edgewright.export.parity import verify

    reasons = list(alone.reasons)
    runtime, _ = runtime_of(bundle.path)
    if TARGET_OF[runtime] != bundle.to:
        reasons.append(f"the manifest says {bundle.to}, but this is {TARGET_OF[runtime]}")
    source, other = load_source(alone.against), None if draft is None else load_source(draft)
    if other is not None:
        check_pair(bundle.to, source, other, bundle.gamma)
        beside = verify(bundle.draft, against=other.directory, max_kl=max_kl, threads=threads)
        reasons += [f"the draft: {reason}" for reason in beside.reasons]
    record = None if other is None else record_for(other.directory, source.directory)
    certificate = certify_bundle(bundle, source, other, record=record, threads=threads)
    reasons += certificate.reasons
    return replace(
        alone,
        path=bundle.path,
        pair=certificate.to_json(),
        reasons=reasons,
        gate="failed" if reasons else "passed",
    )
