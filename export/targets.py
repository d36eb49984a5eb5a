"""`export`: write a checkpoint for a runtime, open it there, and let it appear only if it is the same model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgewright.errors import BadInput, GateFailed, RecipeError
from edgewright.export.artifact import (
    MANIFEST,
    Artifact,
    Written,
    drop_entry,
    read_entry,
    settled_hash_of,
    size_of,
    write_entry,
)
from edgewright.export.pairs.options import pair_options
from edgewright.export.runtimes.opening import SESSIONS, TARGET_OF
from edgewright.export.staging import folder, remove, staged, swap
from edgewright.files import disk_errors

if TYPE_CHECKING:
    import numpy as np

    from edgewright.export.gate.reference import Reference
    from edgewright.export.parity import Parity
    from edgewright.export.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A way out."""

    module: str
    """Holds `write(source, path, *, quant, embedding_quant) -> Written`."""
    reader: str
    """Holds `read_weights(path, source)` and `widths(path)`, written without the code of the writer."""
    quants: tuple[str, ...]
    """Widths of the linear weights."""
    embedding_quants: tuple[str, ...]
    """Widths of token embedding and output head."""
    suffix: str | None
    """Of the file; None when the artifact is a folder."""


TARGETS = {
    "hf": Target(
        module="edgewright.export.to_hf",
        reader="edgewright.export.hf_reader",
        quants=("fp32", "fp16", "bf16", "int8", "nf4", "ternary"),
        embedding_quants=("fp32", "fp16", "bf16"),
        suffix=None,
    ),
    "gguf": Target(
        module="edgewright.export.to_gguf",
        reader="edgewright.export.gguf.reader",
        quants=(
            "f32",
            "f16",
            "bf16",
            "q8_0",
            "q5_0",
            "q4_1",
            "q4_0",
            "tq1_0",
            "tq2_0",
            "q2_0",
            "q6_k",
            "q5_k_m",
            "q5_k",
            "q4_k_m",
            "q4_k",
            "iq4_nl",
            "q3_k_m",
            "q3_k",
            "q2_k",
        ),  # fmt: skip
        embedding_quants=("f32", "f16", "q8_0", "q6_k", "q4_0"),
        suffix=".gguf",
    ),
    "onnx": Target(
        module="edgewright.export.to_onnx",
        reader="edgewright.export.onnx.plain_reader",
        quants=("fp32", "fp16", "bf16", "int8", "int4", "ternary"),
        embedding_quants=("fp32", "fp16", "bf16", "int8", "int4", "ternary"),
        suffix=None,
    ),
    "genai": Target(
        module="edgewright.export.to_genai",
        reader="edgewright.export.genai.reader",
        quants=("fp32", "int8", "int4", "ternary"),
        embedding_quants=("fp32", "int8", "int4"),
        suffix=None,
    ),
    "openvino": Target(
        module="edgewright.export.to_openvino",
        reader="edgewright.export.openvino.reader",
        quants=("fp32", "fp16", "int8", "int4", "ternary"),
        embedding_quants=("fp32", "fp16", "int8", "int4"),
        suffix=None,
    ),
}
"""The targets by name."""

BEST = "best"
"""In the place of a target: the fastest certified file for this machine."""


def _quiet(line: str) -> None:
    """Say nothing."""


def export(
    model: Path | str,
    *,
    to: str,
    out: Path | str,
    quant: str | None = None,
    size: str | None = None,
    embedding_quant: str | None = None,
    verify: bool = True,
    max_kl: float | None = None,
    budget_mb: float | None = None,
    calibrate: Sequence[Path | str] | None = None,
    method: str = "gptq",
    threads: int | None = None,
    draft: Path | str | None = None,
    draft_quant: str | None = None,
    draft_embedding_quant: str | None = None,
    gamma: int | None = None,
    prompts: Sequence[Path | str] | None = None,
    say: Callable[[str], None] = _quiet,
) -> Artifact:
    """Write a checkpoint for a runtime, certified there. All or nothing: a file that fails never has its final name.

    Args:
        model: a local Hugging Face directory of a causal language model.
        to: a key of `TARGETS`; or "best", which tries all of them and keeps the fastest certified file for this
            machine (`best.py`).
        out: gguf: a directory, which gets `<model>-<quant>.gguf`, or the file itself; the others: the folder.
        quant: the width, one of the target's; "best" chooses it.
        size: of an elastic model the sub-network to export, by its name in `elastic.json`; None: the whole.
        embedding_quant: the width of token embedding and head; None takes the target's default.
        verify: whether to run the gate; without it the manifest says "skipped".
        max_kl: the gate's limit for the mean KL, in the place of the one for the width.
        budget_mb: the most that the artifact may weigh, in 10**6 bytes; with `calibrate` and a width of 4 bits it is
            spent on 8 bits where that helps most.
        calibrate: text to calibrate the rounding on, files or patterns; never the text that the result is judged on.
        method: how, a key of `calibrate.METHODS`.
        threads: of the runtimes in the gate.
        draft: a smaller checkpoint with the same tokenizer: `out`, a folder, becomes a bundle of both (`pair.py`).
        draft_quant: its width; None takes `quant`. draft_embedding_quant: of its token embedding and head.
        gamma: tokens that it proposes in a round; 4 by default.
        prompts: files whose prompts the pair is certified on (`read_prompts`), 16 of them, evenly from all files; by
            default what training measured the draft on, or pieces of built-in texts.
        say: gets a line about progress now and then.

    Raises:
        RecipeError: EW-501 to EW-503, no such target or width; EW-509, `out` is something else already; EW-766, no
            such size.
        BadInput: the model directory, or what the target cannot hold; EW-768, it has no sizes; EW-550
            to EW-555 for calibration.
        GateFailed: EW-504, the file is not the model; EW-510, it is over the budget; EW-511, "best" found nothing.
            Nothing was left behind. With a draft also EW-820 to EW-832 (`pair.export_pair`).
        OutOfResources: EW-401, the disk is full.
    """
    from edgewright.export.calibration.calibrated import Calibrations, calibrated_source
    from edgewright.export.gate.limits import check_max_kl
    from edgewright.export.source import load_source

    if size is not None:
        from edgewright.compress.elastic import sub_network_folder

        with sub_network_folder(model, size, Path(out)) as part:
            return export(
                part, to=to, out=out, quant=quant, embedding_quant=embedding_quant, verify=verify, max_kl=max_kl,
                budget_mb=budget_mb, calibrate=calibrate, method=method, threads=threads, draft=draft,
                draft_quant=draft_quant, draft_embedding_quant=draft_embedding_quant, gamma=gamma, prompts=prompts,
                say=say,
            )  # fmt: skip
    check_max_kl(max_kl)
    pair = pair_options(
        draft, draft_quant, draft_embedding_quant, gamma, prompts, budget_mb=budget_mb, calibrate=calibrate, to=to
    )
    if budget_mb is not None and not budget_mb > 0:
        raise RecipeError("EW-513", "a budget must be positive", expected="MB, more than 0", found=budget_mb)
    if to == BEST:
        from edgewright.export.best import best

        _refuse_choices(quant, embedding_quant, verify)
        source = load_source(model)
        calibrations = Calibrations(source, files=calibrate, method=method, threads=threads, say=say)
        return best(
            source,
            out=Path(out),
            calibrations=calibrations,
            budget_mb=budget_mb,
            max_kl=max_kl,
            threads=threads,
            say=say,
        )
    target = check_target(to, quant, embedding_quant)
    assert quant is not None
    if verify:
        check_runtime(to)
    source = load_source(model)
    if pair is not None:
        from edgewright.export.pair import export_pair

        return export_pair(
            source, pair, to=to, quant=quant, embedding_quant=embedding_quant, out=Path(out), verify=verify,
            max_kl=max_kl, threads=threads, say=say,
        )  # fmt: skip
    final = final_path(Path(out), target, source, quant)
    with disk_errors(final), folder(final.parent), staged(final) as place:
        if calibrate is not None:
            source, embedding_quant = calibrated_source(
                source, to=to, quant=quant, embedding_quant=embedding_quant, files=calibrate, method=method,
                budget_mb=budget_mb, plain_bytes=_weigher(source, place, to, quant), threads=threads, say=say,
            )  # fmt: skip
        made = make(
            source, place, to=to, quant=quant, embedding_quant=embedding_quant, verify=verify, max_kl=max_kl,
            threads=threads,
        )  # fmt: skip
        _check_budget(made.entry, budget_mb)
        install(made, final)
    return made.artifact(final)


def _weigher(source: Source, place: Path, to: str, quant: str) -> Callable[[str | None], int]:
    """What the artifact weighs without calibration, by the width of its embedding: it is written, and removed again."""

    def weigh(embedding_quant: str | None) -> int:
        try:
            importlib.import_module(TARGETS[to].module).write(
                source, place, quant=quant, embedding_quant=embedding_quant
            )
            return size_of(place)
        finally:
            remove(place)

    return weigh


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An artifact that is complete and proven, but not yet where it belongs."""

    place: Path
    written: Written
    entry: dict[str, Any]
    """What the manifest will say."""

    def artifact(self, path: Path) -> Artifact:
        """What `export` returns, once the files are at `path`."""
        entry = self.entry
        return Artifact(
            path=path,
            to=entry["to"],
            quant=entry["quant"],
            bytes=entry["bytes"],
            fallbacks=self.written.fallbacks,
            gate=entry["gate"],
            parity=entry["parity"],
            candidates=entry.get("candidates", []),
            notes=self.written.notes,
        )


def make(
    source: Source,
    place: Path,
    *,
    to: str,
    quant: str,
    embedding_quant: str | None,
    verify: bool,
    max_kl: float | None,
    threads: int | None,
    reference: Reference | None = None,
) -> Made:
    """Write an artifact to a temporary place, and prove it there. Arguments and errors as in `export`.

    Args:
        reference: what the checkpoint says, where it was read before (`parity.reference_of`).
    """
    writer = importlib.import_module(TARGETS[to].module)
    written: Written = writer.write(source, place, quant=quant, embedding_quant=embedding_quant)
    _refuse_wrong_name(source, to, quant, written)
    parity = _gate(place, to, written, source, max_kl, threads, reference) if verify else None
    return Made(place=place, written=written, entry=_entry(place, to, quant, written, source, parity))


def _refuse_wrong_name(source: Source, to: str, quant: str, written: Written) -> None:
    """Refuse a file without a single linear weight in the width that it is called after.

    Raises:
        BadInput: EW-514.
    """
    wider = {fallback.tensor: fallback for fallback in written.fallbacks}
    linears = set(source.linears) - {source.head}
    if not linears or linears - set(wider):
        return
    stored = sorted({wider[name].quant for name in linears})
    raise BadInput(
        "EW-514",
        f"no weight of this model fits {quant} in {to}",
        where=source.directory.absolute(),
        expected="at least one linear weight that is stored as asked",
        found=f"all would be {' or '.join(stored)}: {wider[min(linears)].reason}",
        fix=f"choose {stored[-1]}; ternary weights must be trained: edgewright run with the ternary method",
    )


def install(made: Made, final: Path) -> None:
    """Give an artifact its final name, and its entry in the manifest.

    The entry of a file that is replaced goes first, so that no crash leaves a file with the entry of another.
    """
    if made.place.is_dir():
        write_entry(made.place, made.entry)
    else:
        drop_entry(final)
    swap(made.place, final)
    if final.is_file():
        write_entry(final, made.entry)


def _refuse_choices(quant: str | None, embedding_quant: str | None, verify: bool) -> None:
    """`best` chooses widths itself, and only among proven files."""
    given = {"--quant": quant, "--embedding-quant": embedding_quant, "--no-verify": None if verify else True}
    for option, value in given.items():
        if value is not None:
            raise RecipeError(
                "EW-512", f"{option} and --to best contradict each other", found=value, fix=f"leave out {option}"
            )


def check_runtime(to: str) -> None:
    """The gate needs the target's runtime: say so before any work, not after it.

    Raises:
        BadInput: EW-603.
    """
    runtime = next(name for name, target in TARGET_OF.items() if target == to)
    _, _, package, install_line = SESSIONS[runtime]
    if importlib.util.find_spec(package) is None:
        raise BadInput(
            "EW-603", f"the runtime that proves this file is not installed: {package}", expected=package,
            fix=f"{install_line}; --no-verify writes the file unproven",
        )  # fmt: skip


def _check_budget(entry: dict[str, Any], budget_mb: float | None) -> None:
    if budget_mb is not None and entry["bytes"] > budget_mb * 1e6:
        raise GateFailed(
            "EW-510",
            "the artifact is over the budget, and was not kept",
            expected=f"at most {budget_mb:g} MB",
            found=f"{entry['bytes'] / 1e6:.1f} MB",
            fix="choose narrower widths (also --embedding-quant), or let --to best look for one",
        )


class Reader(Protocol):
    """What a target's reader module offers."""

    def read_weights(self, path: Path, source: Source) -> Iterable[tuple[str, np.ndarray]]:
        """Checkpoint name and float32 values of every weight, matrices as `Source.matrix` gives them."""

    def widths(self, path: Path) -> set[str]:
        """In which widths the matrices are stored, the most generous where a file does not tell."""


def reader_of(to: str) -> Reader:
    """The reader of a target."""
    reader: Any = importlib.import_module(TARGETS[to].reader)
    return cast(Reader, reader)


def check_target(to: str, quant: str | None, embedding_quant: str | None) -> Target:
    """The target, after checking all three names."""
    if to not in TARGETS:
        raise _unknown("EW-501", "target", to, (*TARGETS, BEST))
    target = TARGETS[to]
    if quant is None:
        raise RecipeError(
            "EW-502", f"{to} needs a width", expected=f"one of: {', '.join(target.quants)}", found="no --quant",
            fix="add --quant, or take --to best",
        )  # fmt: skip
    if quant not in target.quants:
        raise _unknown("EW-502", f"width of {to}", quant, target.quants)
    if embedding_quant is not None and embedding_quant not in target.embedding_quants:
        raise _unknown("EW-503", f"embedding width of {to}", embedding_quant, target.embedding_quants)
    return target


def _unknown(code: str, what: str, found: str | None, legal: Any) -> RecipeError:
    names = ", ".join(legal)
    return RecipeError(
        code, f"there is no {what} {found!r}", expected=f"one of: {names}", found=found, fix="choose one"
    )


def _gate(
    place: Path,
    to: str,
    written: Written,
    source: Source,
    max_kl: float | None,
    threads: int | None,
    reference: Reference | None,
) -> Parity:
    """Raises GateFailed (EW-504) with every reason."""
    from edgewright.export.parity import judge

    widths = reader_of(to).widths(place)  # what is stored, as `verify` will see it; not what was asked for
    parity = judge(
        place, to, widths, source, kept=written.lattice, digests=written.digests, max_kl=max_kl, threads=threads,
        reference=reference,
    )  # fmt: skip
    if parity.gate == "failed":
        raise GateFailed(
            "EW-504",
            f"the {to} file is not the model it was made from, and was not kept: {'; '.join(parity.reasons)}",
            where=source.directory.absolute(),
            expected=f"the checkpoint's lattice bit for bit, and a mean KL of at most {parity.kl_limit:.3g}",
            found=f"KL {parity.kl if parity.kl is None else f'{parity.kl:.3g}'}, "
            f"lattice {'identical' if parity.lattice_identity else 'different'}",
            fix="choose a wider type, or allow more with --max-kl; --no-verify keeps the file unproven",
        )
    return parity


def _entry(place: Path, to: str, quant: str, written: Written, source: Source, parity: Parity | None) -> dict[str, Any]:
    """What the manifest says about an artifact."""
    from importlib.metadata import version

    return {
        "to": to,
        "quant": quant,
        "embedding_quant": written.embedding_quant,
        "bytes": size_of(place),
        "sha256": settled_hash_of(place),
        "made_from": {"name": source.name, "sha256": source.sha256},
        "fallbacks": [asdict(fallback) for fallback in written.fallbacks],
        "notes": written.notes,
        "lattice": written.lattice,
        "digests": written.digests,
        "calibration": dict(source.calibration) or None,
        "gate": "skipped" if parity is None else parity.gate,
        "parity": None if parity is None else parity.measured(),
        "versions": {"edgewright": version("edgewright"), **written.versions},
    }


# ---------------------------------------------------------------- names and renames


def final_path(out: Path, target: Target, source: Source, quant: str) -> Path:
    """Where the artifact will be.

    Raises:
        RecipeError: EW-509, something else is there.
    """
    if target.suffix is None:
        if out.exists() and not replaceable(out):
            raise occupied(out, "a new folder, an empty one, or one that holds nothing but an earlier export")
        return out
    if out.exists() and not out.is_dir() and out.suffix != target.suffix:
        raise occupied(out, f"a directory, or a name that ends in {target.suffix}")
    single = out.suffix == target.suffix and not out.is_dir()
    final = out if single else out / f"{source.name}-{quant}{target.suffix}"
    if final.exists() and read_entry(final) is None:
        raise occupied(final, f"no file, or one that {MANIFEST} beside it names")
    return final


def replaceable(out: Path) -> bool:
    """Whether a folder may be replaced whole: it is empty, or holds what an earlier export made and nothing else."""
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    entry = read_entry(out)
    return entry is not None and entry.get("bytes") == size_of(out)


def occupied(out: Path, expected: str) -> RecipeError:
    """EW-509: something else is where the artifact should be."""
    found = "a file" if out.is_file() else ", ".join(sorted(path.name for path in out.iterdir())[:6])
    return RecipeError(
        "EW-509", "the export would overwrite something else", where=out.absolute(), expected=expected, found=found,
        fix="choose another --out",
    )  # fmt: skip
