"""`export`: write a checkpoint for a runtime, open it there, and let it appear only if it is the same model."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgewright.errors import GateFailed, RecipeError
from edgewright.export.artifact import Artifact, Gate, Written, hash_of, read_entry, size_of, sync, write_entry
from edgewright.files import disk_errors

if TYPE_CHECKING:
    import numpy as np

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
        quants=("fp32", "fp16", "bf16"),
        embedding_quants=(),
        suffix=None,
    ),
    "gguf": Target(
        module="edgewright.export.to_gguf",
        reader="edgewright.export.gguf_reader",
        quants=("f32", "f16", "q8_0", "q4_0", "tq1_0", "tq2_0"),
        embedding_quants=("f32", "f16", "q8_0", "q4_0"),
        suffix=".gguf",
    ),
    "genai": Target(
        module="edgewright.export.to_genai",
        reader="edgewright.export.onnx_reader",
        quants=("fp32", "int8", "int4", "ternary"),
        embedding_quants=("fp32", "int8", "int4"),
        suffix=None,
    ),
}
"""The targets by name."""


def export(
    model: Path | str,
    *,
    to: str,
    quant: str,
    out: Path | str,
    embedding_quant: str | None = None,
    verify: bool = True,
    max_kl: float | None = None,
    threads: int | None = None,
) -> Artifact:
    """Write a checkpoint for a runtime, certified there. All or nothing: a file that fails never has its final name.

    Args:
        model: a local Hugging Face directory of the Llama family.
        to: a key of `TARGETS`.
        quant: the width, one of the target's.
        out: gguf: a directory, which gets `<model>-<quant>.gguf`, or the file itself; genai: the folder.
        embedding_quant: the width of token embedding and head; None takes the target's default.
        verify: whether to run the gate; without it the manifest says "skipped".
        max_kl: the gate's limit for the mean KL, in the place of the one for the width.
        threads: of the runtimes in the gate.

    Raises:
        RecipeError: EW-501 to EW-503, no such target or width; EW-509, `out` is something else already.
        BadInput: the model directory, or what the target cannot hold.
        GateFailed: EW-504, the file is not the model; nothing was left behind.
        OutOfResources: EW-401, the disk is full.
    """
    target = _target(to, quant, embedding_quant)
    from edgewright.export.source import load_source

    source = load_source(model)
    final = _final_path(Path(out), target, source, quant)
    final.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(final), _staged(final) as staged:
        written: Written = importlib.import_module(target.module).write(
            source, staged, quant=quant, embedding_quant=embedding_quant
        )
        parity = _gate(staged, to, quant, written, source, max_kl, threads) if verify else None
        gate: Gate = "skipped" if parity is None else "passed"
        entry = _entry(staged, to, quant, written, source, parity)
        if target.suffix is None:
            write_entry(staged, entry)
        _swap(staged, final)
        if target.suffix is not None:
            write_entry(final, entry)
    return Artifact(
        path=final,
        to=to,
        quant=quant,
        bytes=entry["bytes"],
        fallbacks=written.fallbacks,
        gate=gate,
        parity=entry["parity"],
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


def _target(to: str, quant: str, embedding_quant: str | None) -> Target:
    """The target, after checking all three names."""
    if to not in TARGETS:
        raise _unknown("EW-501", "target", to, TARGETS)
    target = TARGETS[to]
    if quant not in target.quants:
        raise _unknown("EW-502", f"width of {to}", quant, target.quants)
    if embedding_quant is not None and embedding_quant not in target.embedding_quants:
        raise _unknown("EW-503", f"embedding width of {to}", embedding_quant, target.embedding_quants)
    return target


def _unknown(code: str, what: str, found: str, legal: Any) -> RecipeError:
    names = ", ".join(legal)
    return RecipeError(
        code, f"there is no {what} {found!r}", expected=f"one of: {names}", found=found, fix="choose one"
    )


def _gate(
    staged: Path, to: str, quant: str, written: Written, source: Source, max_kl: float | None, threads: int | None
) -> Parity:
    """Raises GateFailed (EW-504) with every reason."""
    from edgewright.export.parity import judge

    widths = {quant, written.embedding_quant, *(fallback.quant for fallback in written.fallbacks)}
    parity = judge(
        staged, to, widths, source, kept=written.lattice, digests=written.digests, max_kl=max_kl, threads=threads
    )
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


def _entry(
    staged: Path, to: str, quant: str, written: Written, source: Source, parity: Parity | None
) -> dict[str, Any]:
    """What the manifest says about an artifact."""
    from importlib.metadata import version

    return {
        "to": to,
        "quant": quant,
        "embedding_quant": written.embedding_quant,
        "bytes": size_of(staged),
        "sha256": hash_of(staged),
        "made_from": {"name": source.name, "sha256": source.sha256},
        "fallbacks": [asdict(fallback) for fallback in written.fallbacks],
        "lattice": written.lattice,
        "digests": written.digests,
        "gate": "skipped" if parity is None else parity.gate,
        "parity": None if parity is None else parity.measured(),
        "versions": {"edgewright": version("edgewright"), **written.versions},
    }


# ---------------------------------------------------------------- names and renames


def _final_path(out: Path, target: Target, source: Source, quant: str) -> Path:
    """Where the artifact will be.

    Raises:
        RecipeError: EW-509, something else is there.
    """
    if target.suffix is None:
        if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or read_entry(out) is not None)):
            raise _occupied(out, "a new folder, an empty one, or one that an earlier export made")
        return out
    if out.suffix == target.suffix and not out.is_dir():
        return out
    if out.exists() and not out.is_dir():
        raise _occupied(out, f"a directory, or a name that ends in {target.suffix}")
    return out / f"{source.name}-{quant}{target.suffix}"


def _occupied(out: Path, expected: str) -> RecipeError:
    found = "a file" if out.is_file() else ", ".join(sorted(path.name for path in out.iterdir())[:6])
    return RecipeError(
        "EW-509", "the export would overwrite something else", where=out.absolute(), expected=expected, found=found,
        fix="choose another --out",
    )  # fmt: skip


@contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """A temporary name beside the final one; what is left of it vanishes at the end, and so does that of dead runs."""
    for stale in final.parent.glob(f".{final.stem}.*.staged{final.suffix}"):
        owner = stale.name.removeprefix(f".{final.stem}.").split(".")[0]
        if owner.isdigit() and not _alive(int(owner)):
            _remove(stale)
    staged = final.with_name(f".{final.stem}.{os.getpid()}.staged{final.suffix}")
    _remove(staged)
    try:
        yield staged
    finally:
        _remove(staged)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _swap(staged: Path, final: Path) -> None:
    """Make the staged artifact the final one. A folder that was there is put aside first and removed after."""
    if staged.is_file():
        sync(staged)
        os.replace(staged, final)
        sync(final.parent)
        return
    aside = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        os.replace(final, aside)
    os.replace(staged, final)
    sync(final.parent)
    _remove(aside)
