"""Checkpoints: atomic, verified, and complete enough that a resumed run is the uninterrupted run, bit for bit.

`step-00000100/` holds `model/` (a Hugging Face directory with the trainable weights under their plain names),
`weights.safetensors` (codes and scales of weights that training stores in eight bits), `optimizer.safetensors`,
`methods.safetensors`, `state.json`, and `MANIFEST.json`, written last, with every file's SHA-256. It is written under a
temporary name, synced, renamed, read back, and only then are older ones removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.files import disk_errors, sha256_file, sync_directory, sync_tree
from edgewright.student import without_progress_bars
from edgewright.weights import plain_state_dict, stored_parts
from edgewright.world import copied

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MANIFEST = "MANIFEST.json"


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Everything of a run that is neither weights nor optimizer tensors."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Counted tokens trained on."""
    position: int = 0
    """Sequences taken (or skipped) of the seeded order."""
    skipped: list[int] = field(default_factory=list)
    """Positions of global batches that are never trained on."""
    rollbacks: int = 0
    """How often non-finite values threw the run back."""
    rewarm: tuple[int, int] | None = None
    """(first step, steps) of a learning-rate re-warm-up that a method asked for."""
    seconds: float = 0.0
    """Training time so far."""
    objective: dict[str, Any] = field(default_factory=dict)
    """What the objective keeps, see `Objective.after_step`."""
    peak_memory: int = 0
    """The most bytes that the stage has taken so far above what its process had before; 0 where nobody can tell."""
    decisions: dict[str, Any] = field(default_factory=dict)
    """What was chosen at run time: precision, compilation, threads, device. Part of the state, so kept on resume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint read back."""

    directory: Path
    state: TrainState
    rng: dict[str, list[int]]
    optimizer: dict[str, Tensor]
    methods: dict[str, Any]
    parts: dict[str, Tensor]
    """`weights.stored_parts` of the model."""


def save(
    directory: Path,
    *,
    model: PreTrainedModel,
    optimizer: dict[str, Tensor],
    methods: dict[str, dict[str, Any]],
    state: TrainState,
    rng: dict[str, list[int]],
    extra_files: Callable[[Path], None],
) -> Path:
    """Write `directory/step-N` and verify it.

    Args:
        optimizer: tensors by `kind/parameter name`.
        methods: each method's `state_dict`: JSON values, and tensors.
        rng: states of torch's generators by device, as bytes.
        extra_files: puts the tokenizer's files into the model directory.

    Raises:
        OutOfResources: EW-401, the disk is full; older checkpoints are untouched.
    """
    from safetensors.torch import save_file

    from edgewright.compress.factored_model import mark

    final = directory_of(directory, state.step)
    temporary = directory / f".tmp-{os.getpid()}-{final.name}"
    _remove_leftovers(directory)
    try:
        with disk_errors(temporary):
            (temporary / "model").mkdir(parents=True)
            with without_progress_bars():
                model.save_pretrained(temporary / "model", state_dict=plain_state_dict(model))
            mark(model, temporary / "model")
            extra_files(temporary / "model")
            save_file(stored_parts(model), temporary / "weights.safetensors")
            save_file(
                {name: tensor.contiguous() for name, tensor in optimizer.items()}, temporary / "optimizer.safetensors"
            )
            tensors, values = _split(methods)
            save_file(tensors, temporary / "methods.safetensors")
            content = {"state": asdict(state), "rng": rng, "methods": values}
            (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(temporary)): sha256_file(path) for path in files}
            (temporary / MANIFEST).write_text(json.dumps({"schema_version": 1, "sha256": hashes}), encoding="utf-8")
            sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_directory(directory)
    problem = broken(final)
    if problem:
        raise OSError(f"{final}: the checkpoint just written does not read back: {problem}")
    return final


def directory_of(directory: Path, step: int) -> Path:
    """Where in a stage's `checkpoints` that of a step lies, or would."""
    return directory / f"step-{step:08d}"


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file has the manifest's hash."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        hashes: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, UnicodeDecodeError):
        return f"{MANIFEST} is damaged"
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != expected:
            return f"{name} has changed since it was written"
    return None


def newest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over, loudly."""
    for checkpoint in sorted(directory.glob("step-*"), reverse=True):
        problem = broken(checkpoint)
        if problem is None:
            return checkpoint
        say(f"warning: {checkpoint.name} is damaged ({problem}): falling back to the one before it")
    return None


def load(checkpoint: Path) -> Loaded:
    """Read a verified checkpoint's state; the model is opened from `checkpoint / "model"`."""
    from safetensors.torch import load_file

    content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    values = content["state"]
    values["rewarm"] = tuple(values["rewarm"]) if values["rewarm"] else None
    methods = content["methods"]
    for key, tensor in load_file(checkpoint / "methods.safetensors").items():
        method, _, name = key.partition("/")
        methods[method][name] = tensor
    parts = checkpoint / "weights.safetensors"  # which older checkpoints lack
    return Loaded(
        directory=checkpoint,
        state=TrainState(**values),
        rng=content["rng"],
        optimizer=load_file(checkpoint / "optimizer.safetensors"),
        methods=methods,
        parts=load_file(parts) if parts.exists() else {},
    )


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors model directory, sharded or not."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def put_weights(
    model: PreTrainedModel, weights: dict[str, Tensor], place: Callable[[Tensor, Tensor], Tensor] = copied
) -> None:
    """Copy saved tensors into a model in place: parameters and saved buffers; tied ones are saved once.

    Args:
        place: makes of a saved tensor what its parameter is (`world.Replica.place`).
    """
    import torch

    places = model.state_dict(keep_vars=True)
    found = {id(places[name]) for name in weights}
    missing = [name for name, tensor in places.items() if name not in weights and id(tensor) not in found]
    assert not missing, f"the checkpoint lacks {missing}"
    with torch.no_grad():
        for name, tensor in weights.items():
            places[name].copy_(place(tensor, places[name]))


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; called only after the newest was verified."""
    for checkpoint in sorted(directory.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(checkpoint)


def _remove_leftovers(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".tmp-*"):
        shutil.rmtree(leftover)


def _split(methods: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors as `method/name`, and the JSON values."""
    import torch

    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for method, state in methods.items():
        values[method] = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{method}/{name}"] = value.contiguous()
            else:
                values[method][name] = value
    return tensors, values
