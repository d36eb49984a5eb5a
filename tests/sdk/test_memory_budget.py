"""budget.memory: what it may change, in which order, and what it says where nothing fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgewright import budget_search
from edgewright.budget_search import search
from edgewright.errors import OutOfResources
from edgewright.objective import NextTokenConfig
from edgewright.planner.devices import find_device
from edgewright.planner.simulate import Case
from edgewright.recipe import StageConfig
from edgewright.student import PresetStudentConfig, build_preset
from edgewright.training import memory_decisions

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
OPEN = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_grad_norm": None}


def case(method: dict[str, Any] | None = None, **training: Any) -> Case:
    """A stage on a CPU."""
    stage = StageConfig.model_validate(
        {
            "name": "base",
            "student": {"type": "preset", "preset": "llama-1m", **SIZES},
            "budget": {"max_steps": 10},
            "methods": [method] if method else [],
            "training": {**OPEN, **training},
        }
    )
    assert isinstance(stage.student, PresetStudentConfig) and isinstance(stage.objective, NextTokenConfig)
    fixed = {"device": "cpu", "precision": "float32", "compile": False, "processes": 1}
    return Case(
        stage=stage,
        student=build_preset(stage.student, vocab_size=128, max_position_embeddings=64, bos=0, eos=0, seed=0),
        teachers=(),
        sequence_length=64,
        decisions={**fixed, **memory_decisions(stage.training)},
        borders=False,
    )


def predicted(wanted: Case, **settings: Any) -> int:
    from dataclasses import replace

    from edgewright.planner.memory import predict

    return predict(replace(wanted, decisions=wanted.decisions | settings), find_device("cpu"))[0].total


def test_what_fits_is_left_as_it_is() -> None:
    wanted = case()
    choice = search(wanted, find_device("cpu"), 10**12)
    assert choice.settings.items() <= wanted.decisions.items()
    assert choice.memory == predicted(wanted)
    assert "as they are" in choice.text


def test_the_cheapest_change_that_fits_is_taken() -> None:
    """Just too little for the recipe as it is; the choice fits, and everything cheaper is named as too large."""
    wanted = case()
    limit = predicted(wanted) - 1
    choice = search(wanted, find_device("cpu"), limit)
    assert choice.memory == predicted(wanted, **choice.settings) <= limit
    assert choice.settings["gradient_release"] or choice.settings["micro_batch"] == 8
    assert not choice.settings["gradient_checkpointing"] and not choice.settings["offload_optimizer"]
    assert "too large" in choice.text and "as they are" in choice.text


def simulated(monkeypatch: pytest.MonkeyPatch, memory: Any) -> list[dict[str, Any]]:
    """Replace the simulation by a rule; what is asked of it, in order."""
    asked: list[dict[str, Any]] = []

    class Memory:
        def __init__(self, total: int) -> None:
            self.total = total

    def predict(wanted: Case, device: Any) -> tuple[Memory, None]:
        asked.append(wanted.decisions)
        return Memory(memory(wanted.decisions)), None

    monkeypatch.setattr("edgewright.planner.memory.predict", predict)
    return asked


def tried(monkeypatch: pytest.MonkeyPatch, wanted: Case) -> list[tuple[int, bool, bool]]:
    """(micro-batch, released, recomputed) of everything that is tried where nothing fits."""
    asked = simulated(monkeypatch, lambda decisions: 10**9 + decisions["micro_batch"])
    with pytest.raises(OutOfResources, match="EW-752") as stopped:
        search(wanted, find_device("cpu"), 10**6)
    assert stopped.value.exit_code == 4
    assert "budget.memory: 1001MB" in str(stopped.value.fix)
    assert not any(decisions["offload_optimizer"] for decisions in asked), "a CPU has nowhere to offload to"
    return [(d["micro_batch"], d["gradient_release"], d["gradient_checkpointing"]) for d in asked]


def test_everything_that_is_open_is_tried_from_the_cheapest_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, case())
    assert found[:3] == [(16, False, False), (16, True, False), (8, False, False)]
    assert set(found) == {(size, False, again) for size in (16, 8, 4, 2, 1) for again in (False, True)} | {
        (16, True, False),
        (16, True, True),
    }


@pytest.mark.parametrize(
    ("settings", "method", "expected"),
    [
        (
            {"gradient_checkpointing": False, "auto_find_batch_size": False, "gradient_release": False},
            None,
            {(16, 0, 0)},
        ),
        ({"gradient_checkpointing": True, "auto_find_batch_size": False, "gradient_release": True}, None, {(16, 1, 1)}),
        ({"max_grad_norm": 1.0, "auto_find_batch_size": False}, None, {(16, 0, 0), (16, 0, 1)}),
        (
            {"auto_find_batch_size": False, "gradient_checkpointing": False},
            {"type": "granet", "density": 0.5},
            {(16, 0, 0)},
        ),
    ],
    ids=["off", "on", "clipped", "a method that wants gradients"],
)
def test_what_the_recipe_fixes_or_what_is_not_exact_stays(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], method: dict[str, Any] | None, expected: set[Any]
) -> None:
    assert set(tried(monkeypatch, case(method, **settings))) == expected


def test_a_run_keeps_what_the_budget_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch is halved; the run dies, and goes on with it though nothing is searched for again."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from tiny_run import curve, weights, write_recipe

    import edgewright
    from edgewright import checkpoint
    from edgewright.trainer import Trainer

    recipe = write_recipe(tmp_path)
    six = ["budget.max_steps=6", "training.save_steps=3", "training.precision=fp32"]
    large = [*six, "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"]
    arguments = {
        "in_twos": six,
        "budget": [*large, "budget.memory=1GB"],
    }
    for name, settings in arguments.items():
        arguments[name] = [f"output_dir={tmp_path / name}", *(f"stages.base.{setting}" for setting in settings)]
    edgewright.run(recipe, *arguments["in_twos"], say=lambda line: None)
    said: list[str] = []
    with monkeypatch.context() as patch:
        simulated(patch, lambda decisions: 5 * 10**8 * decisions["micro_batch"])
        original = Trainer._one_step

        def one_step(self: Trainer) -> None:
            if self.state.step == 4:
                raise KeyboardInterrupt
            original(self)

        patch.setattr(Trainer, "_one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            edgewright.run(recipe, *arguments["budget"], say=said.append)
    assert any("budget.memory 1.00 GB: micro-batches of 2, for 1.00 GB" in line for line in said)
    with monkeypatch.context() as patch:
        patch.setattr(budget_search, "search", None)
        edgewright.run(recipe, *arguments["budget"], say=said.append)
    newest = checkpoint.newest(tmp_path / "budget/stages/base/checkpoints", print)
    assert newest is not None and checkpoint.load(newest).state.decisions["micro_batch"] == 2
    assert curve(tmp_path / "budget") == curve(tmp_path / "in_twos")
    assert weights(tmp_path / "budget") == weights(tmp_path / "in_twos")
