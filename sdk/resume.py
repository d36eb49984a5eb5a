"""Whether a run that was begun may go on here: what has to be the same, and what is taken anew or said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from edgewright.checkpoint import TrainState
from edgewright.compress.distill import in_full
from edgewright.errors import RecipeError
from edgewright.files import sha256_file, write_json

if TYPE_CHECKING:
    from edgewright.data import Corpus
    from edgewright.recipe import AnyStageConfig, Recipe

WITHOUT_EFFECT_ON_BITS = frozenset(
    {
        "logging_steps",
        "save_steps",
        "save_minutes",
        "keep_checkpoints",
        "sharding",
        "auto_find_batch_size",
        "gradient_checkpointing",
        "offload_optimizer",
    }
)
"""Training settings that may change between a run and its resumption; `gradient_checkpointing` rounds otherwise where
the model is compiled."""
OF_PROCESSES = ("processes", "sharding", "threads", "compile", "micro_batch", "gradient_release", "offload_optimizer")
"""Decisions that are taken anew on another number of processes."""


def check_same_recipe(recipe: Recipe, stage: AnyStageConfig, corpus: Corpus, directory: Path) -> None:
    """Refuse to go on with a stage that another recipe began; remember this one's where it has not begun.

    Raises:
        RecipeError: EW-705.
    """
    kept = directory / "stage.json"
    dumped = _with_effect(stage)
    seed = recipe.seed if stage.seed is None else stage.seed
    dumped |= {"seed": seed, "sequence_length": recipe.data.sequence_length, "data": corpus.fingerprint}
    now = json.loads(json.dumps(_portable(dumped)))
    directory.mkdir(parents=True, exist_ok=True)
    if not kept.exists() or all(path == kept for path in directory.iterdir()):
        write_json(kept, now)
        return
    before = _with_defaults(json.loads(kept.read_text(encoding="utf-8")), type(stage))
    changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if changed:
        raise RecipeError(
            "EW-705",
            f"the run of stage {stage.name!r} was begun with another recipe",
            where=kept,
            expected={key: before.get(key) for key in changed},
            found={key: now.get(key) for key in changed},
            fix="undo the change, choose another output_dir, or start again with --fresh",
        )


def _with_effect(stage: AnyStageConfig) -> dict[str, Any]:
    """A stage's settings without those that change nothing of the result."""
    dumped = stage.model_dump(mode="json")
    if "training" in dumped:
        dumped["training"] = {k: v for k, v in dumped["training"].items() if k not in WITHOUT_EFFECT_ON_BITS}
        dumped["objective"] = in_full(dumped["objective"])
    return dumped


def _with_defaults(before: dict[str, Any], kind: type[AnyStageConfig]) -> dict[str, Any]:
    """What was written before some settings were there: they had their defaults. As it is where it no longer reads."""
    of_the_run = {name: before[name] for name in ("seed", "sequence_length", "data") if name in before}
    settings = {name: value for name, value in before.items() if name not in ("sequence_length", "data")}
    try:
        filled = _with_effect(kind.model_validate(settings))
    except ValidationError:
        return before
    return json.loads(json.dumps(filled | of_the_run))


def _portable(value: Any) -> Any:
    """Files by the hash of their content, so that moving them does not look like another recipe."""
    from edgewright.compress.cache import read_manifest
    from edgewright.data.files import find

    if isinstance(value, dict):
        if value.get("type") == "checkpoint":
            return {**value, "model": _weights_hash(Path(value["model"]))}
        if value.get("type") == "cache" and value.get("path"):
            return {**value, "path": read_manifest(Path(value["path"]))["fingerprint"]}
        if value.get("type") in ("files", "text") and "files" in value:
            patterns = value["files"]
            found = find((patterns,) if isinstance(patterns, str) else tuple(patterns))
            return {**value, "files": [sha256_file(path) for _, path in found]}
        return {key: _portable(inner) for key, inner in value.items()}
    return value


def _weights_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def on_this_machine(state: TrainState, say: Callable[[str], None]) -> None:
    """Take the threads that the run was begun with; say that another torch may round otherwise.

    Raises:
        RecipeError: EW-710, it was begun on a GPU, and there is none.
    """
    import torch

    torch.set_num_threads(state.decisions["threads"])
    if state.decisions["device"] == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "EW-710",
            "this run was begun on a GPU, and there is none here",
            expected="a CUDA device",
            found="none",
            fix="go on where it was begun, or start again with --fresh",
        )
    if state.decisions["torch"] != torch.__version__:
        say(
            f"warning: begun with torch {state.decisions['torch']}, going on with {torch.__version__}: "
            "the result will be as good, but not bit for bit that of an uninterrupted run"
        )


def on_these_processes(state: TrainState, now: dict[str, Any], say: Callable[[str], None]) -> None:
    """On another number of processes, take anew what depends on it."""
    before = {"processes": 1, "sharding": "none"} | state.decisions
    state.decisions = before
    if all(before[name] == now[name] for name in ("processes", "sharding")):
        return
    state.decisions = before | {name: now[name] for name in OF_PROCESSES}
    say(
        f"warning: begun on {several(before)}, going on with {several(now)}: the same batches and steps, but sums in "
        "another order, so not bit for bit the result of an uninterrupted run"
    )


def several(decisions: dict[str, Any]) -> str:
    """How many processes a run has, in words."""
    number = decisions["processes"]
    cut_up = ", weights cut up among them" if decisions["sharding"] == "full" else ""
    return "1 process" if number == 1 else f"{number} processes{cut_up}"
