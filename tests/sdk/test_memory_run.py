"""Runs that run out of memory, are killed or meet what is not finite, with each setting that saves memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import edgewright
from edgewright import checkpoint
from edgewright.errors import OutOfResources, RecipeErrors
from edgewright.micro_batch import limit_allocator
from edgewright.objective import NextToken
from edgewright.recipe import load_recipe
from edgewright.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import curve, weights, write_recipe  # noqa: E402

SIX = ("budget.max_steps=6", "training.save_steps=3", "training.precision=fp32")
"""A run shorter than the recipe's own."""
ONE_BATCH = (
    *SIX,
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.max_grad_norm=null",
)
RELEASE = (*ONE_BATCH, "training.gradient_release=true")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("memory"))


def train(recipe: Path, run: Path, *settings: str) -> list[str]:
    """Run it; what it said."""
    said: list[str] = []
    edgewright.run(recipe, f"output_dir={run}", *(f"stages.base.{setting}" for setting in settings), say=said.append)
    return said


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "stages/base/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def same(first: Path, second: Path) -> None:
    """Losses, weights, and the random numbers that would come next."""
    assert curve(first) == curve(second)
    assert weights(first) == weights(second)
    assert last(first).rng == last(second).rng


def last(run: Path) -> checkpoint.Loaded:
    newest = checkpoint.newest(run / "stages/base/checkpoints", print)
    assert newest is not None
    return checkpoint.load(newest)


def decisions(run: Path) -> dict[str, Any]:
    return last(run).state.decisions


def runs_out(monkeypatch: pytest.MonkeyPatch, *, above: int, after: int = 0, error: Exception | None = None) -> None:
    """Training on more than `above` sequences at once finds no memory, from call `after` of the objective on."""
    original, calls = NextToken.loss, [0]

    def loss(self: NextToken, hidden: Any, head: Any, inputs: Any, **settings: Any) -> Any:
        if isinstance(hidden, FakeTensor):  # the plan of the run
            return original(self, hidden, head, inputs, **settings)
        calls[0] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and len(inputs.input_ids) > above and calls[0] > after:
            torch.rand(3)  # a draw that must be put back
            raise error or torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return original(self, hidden, head, inputs, **settings)

    monkeypatch.setattr(NextToken, "loss", loss)


class Died(BaseException):
    """Stands for kill -9: nothing is written on the way out."""


def dies(monkeypatch: pytest.MonkeyPatch, *, at: int) -> None:
    """The process ends in the update of step `at`, where that is half done."""
    original = Trainer._one_step

    def one_step(self: Trainer) -> None:
        if self.state.step == at - 1:
            first = list(self.job.model.parameters())[1]  # whose gradient comes late
            first.register_hook(lambda gradient: _die())
        original(self)

    monkeypatch.setattr(Trainer, "_one_step", one_step)


def _die() -> None:
    raise Died


@pytest.fixture(scope="module")
def in_twos(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose micro-batch is 2 from the start."""
    run = tmp_path_factory.mktemp("in_twos") / "run"
    train(recipe, run, *SIX)
    return run


@pytest.fixture(scope="module")
def one_batch(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with whole gradients and one micro-batch to a step."""
    run = tmp_path_factory.mktemp("one_batch") / "run"
    train(recipe, run, *ONE_BATCH)
    return run


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_a_micro_batch_that_does_not_fit_is_halved(
    recipe: Path, in_twos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """The same bits as with the smaller one from the start: the global batch and the random numbers are the same."""
    runs_out(monkeypatch, above=2, error=error)
    said = train(
        recipe, tmp_path, *SIX, "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"
    )
    same(tmp_path, in_twos)
    (event,) = events(tmp_path, "out_of_memory")
    assert (event["step"], event["micro_batch"], event["now"]) == (0, 4, 2)
    assert any("out_of_memory" in line and "now=2" in line for line in said)
    assert decisions(tmp_path)["micro_batch"] == 2


def test_the_smaller_micro_batch_is_kept_when_the_run_goes_on(
    recipe: Path, in_twos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is short from the middle of the fifth step on; a run that dies in the sixth remembers its decision."""
    with monkeypatch.context() as patch:
        runs_out(patch, above=1, after=9)
        train(recipe, tmp_path / "whole", *SIX)
        (event,) = events(tmp_path / "whole", "out_of_memory")
        assert event["step"] == 4
    with monkeypatch.context() as patch:
        runs_out(patch, above=1, after=9)
        dies(patch, at=6)
        with pytest.raises(Died):
            train(recipe, tmp_path / "died", *SIX)
    assert decisions(tmp_path / "died")["micro_batch"] == 1
    train(recipe, tmp_path / "died", *SIX)  # there is memory enough now, and still it is 1
    same(tmp_path / "died", tmp_path / "whole")
    for (_, a), (_, b) in zip(curve(in_twos), curve(tmp_path / "whole"), strict=True):
        assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=1e-5)


def test_a_single_sequence_that_does_not_fit_is_an_error(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_out(monkeypatch, above=0)
    with pytest.raises(OutOfResources, match="EW-751") as stopped:
        train(recipe, tmp_path, *SIX, "training.per_device_train_batch_size=3")
    assert stopped.value.exit_code == 4
    assert [(event["micro_batch"], event["now"]) for event in events(tmp_path, "out_of_memory")] == [(3, 2), (2, 1)]
    assert "20.00 GiB" in str(stopped.value.found)
    assert "gradient_checkpointing: true" in str(stopped.value.fix)
    assert "offload" not in str(stopped.value.fix)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ((*SIX, "training.auto_find_batch_size=false"), "auto_find_batch_size: true"),
        (RELEASE, "gradient_release takes"),
    ],
    ids=["off", "release"],
)
def test_where_the_micro_batch_may_not_change_that_is_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], fix: str
) -> None:
    runs_out(monkeypatch, above=1)
    with pytest.raises(OutOfResources, match="EW-751") as stopped:
        train(recipe, tmp_path, *settings)
    assert fix in str(stopped.value.fix)
    assert not (tmp_path / "stages/base/metrics.jsonl").exists()  # it is as large as at first


def test_a_state_that_does_not_fit_is_an_error(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may have been changed by then, so nothing is tried again; the last checkpoint is there."""

    def step(self: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(OutOfResources, match="stage base.*EW-751") as stopped:
        train(recipe, tmp_path, *SIX)
    assert "optimizer" in str(stopped.value.expected) and "1.00 GiB" in str(stopped.value.found)
    assert last(tmp_path).state.step == 0


@pytest.mark.parametrize(("memory", "share"), [(None, 1.0), (5 * 2**30 + 500 * 2**20, 0.5), (2**40, 1.0), (1, 0.0)])
def test_the_allocator_of_a_gpu_keeps_to_the_budget(
    monkeypatch: pytest.MonkeyPatch, memory: int | None, share: float
) -> None:
    class Properties:
        total_memory = 10 * 2**30

    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    limit_allocator(memory)
    assert shares == [share]


def test_other_errors_are_left_alone(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_out(monkeypatch, above=1, error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe, tmp_path, *SIX)


def test_an_evaluation_that_does_not_fit_is_run_in_smaller_parts(
    recipe: Path, in_twos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._held_out_loss

    def held_out_loss(self: Trainer, module: Any, size: int) -> float | None:
        if size > 1:
            raise torch.OutOfMemoryError
        return original(self, module, size)

    monkeypatch.setattr(Trainer, "_held_out_loss", held_out_loss)
    train(recipe, tmp_path, *SIX)
    assert [event["step"] for event in events(tmp_path, "out_of_memory")] == [6]
    same(tmp_path, in_twos)


def test_released_gradients_train_the_same_model(recipe: Path, one_batch: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path, *RELEASE)
    same(tmp_path, one_batch)
    assert decisions(tmp_path)["gradient_release"]


def test_recomputed_blocks_train_the_same_model(recipe: Path, one_batch: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path, *ONE_BATCH, "training.gradient_checkpointing=true")
    same(tmp_path, one_batch)


@pytest.mark.parametrize(
    ("before", "afterwards"),
    [
        (["gradient_release=true"], ["gradient_release=true"]),
        (["gradient_checkpointing=true"], ["gradient_checkpointing=true"]),
        ([], ["gradient_checkpointing=true"]),  # what memory that ran out is answered with
    ],
    ids=["release", "checkpointing", "checkpointing_from_now_on"],
)
def test_a_run_that_dies_half_way_through_a_step_goes_on_with_the_same_bits(
    recipe: Path,
    one_batch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[str],
    afterwards: list[str],
) -> None:
    began, goes_on = ([*ONE_BATCH, *(f"training.{each}" for each in settings)] for settings in (before, afterwards))
    with monkeypatch.context() as patch:
        dies(patch, at=5)
        with pytest.raises(Died):
            train(recipe, tmp_path, *began)
    assert [step for step, _ in curve(tmp_path)] == [1, 2, 3, 4]
    train(recipe, tmp_path, *goes_on)
    same(tmp_path, one_batch)
    assert any(decisions(tmp_path)[each.partition("=")[0]] for each in afterwards)


def test_a_roll_back_from_a_half_done_step_is_exact(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient in the middle is not finite at the fifth batch: as if the step had not begun."""
    original = Trainer._gradients

    def gradients(self: Trainer, size: int) -> Any:
        weight = self.job.model.model.layers[0].mlp.up_proj.weight
        factor = float("nan") if self.state.position == 4 * 4 else 1.0
        handle = weight.register_hook(lambda gradient: gradient * factor)
        try:
            return original(self, size)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "_gradients", gradients)
    for name, settings in (("whole", ONE_BATCH), ("released", RELEASE)):
        train(recipe, tmp_path / name, *settings)
        (event,) = events(tmp_path / name, "rollback")
        assert (event["skipped_position"], event["to_step"]) == (16, 3)
    same(tmp_path / "released", tmp_path / "whole")


KILLED = """
import os, sys
import torch
import edgewright
from edgewright.gradient_release import GradientRelease
release, left = GradientRelease._release, int(sys.argv[1])
def counted(self, parameter):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    release(self, parameter)
GradientRelease._release = counted
edgewright.run(*sys.argv[2:])
"""


def test_kill_9_inside_a_released_step(recipe: Path, one_batch: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), f"output_dir={tmp_path}", *(f"stages.base.{setting}" for setting in RELEASE)]
    result = subprocess.run([sys.executable, "-c", KILLED, "45", *arguments], capture_output=True)
    assert result.returncode == -9, result.stderr.decode()
    train(recipe, tmp_path, *RELEASE)
    same(tmp_path, one_batch)


LIMITED = """
import resource, sys
import edgewright
from edgewright.trainer import Trainer
step, limit = Trainer._one_step, None
def one_step(self):  # within the address space before the first one, and a little; what follows may take what it needs
    global limit
    if limit is None:
        limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 192 * 2**20
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        step(self)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
Trainer._one_step = one_step
edgewright.run(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the address space is Linux's to tell")
def test_a_real_shortage_of_memory(recipe: Path, tmp_path: Path) -> None:
    """A child process whose address space is limited: the allocator itself fails, and the run ends well."""
    settings = ("per_device_train_batch_size=512", "gradient_accumulation_steps=1", "precision=fp32", "compile=off")
    arguments = [*(f"stages.base.training.{setting}" for setting in settings), "stages.base.budget.max_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(recipe), f"output_dir={tmp_path}", *arguments]
    result = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert result.returncode == 0, result.stderr
    found = events(tmp_path, "out_of_memory")
    assert found and found[0]["micro_batch"] == 512
    assert decisions(tmp_path)["micro_batch"] < 512
    assert len(curve(tmp_path)) == 2


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("training.gradient_release=true", "training.max_grad_norm=null"), "gradient_accumulation_steps: 1"),
        (("training.gradient_release=true", "training.gradient_accumulation_steps=1"), "max_grad_norm: null"),
        (("budget.memory=8 bananas",), "8GB or 7.5GiB"),
        (("budget.memory=0GB",), "more than 0"),
    ],
)
def test_settings_that_do_not_hold_together(recipe: Path, overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeErrors, match=why):
        load_recipe(recipe, [f"stages.base.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("written", "size"), [("8GB", 8 * 10**9), ("7.5 gib", 15 * 2**29), ("512MiB", 2**29), ("123", 123)]
)
def test_a_size_of_memory(recipe: Path, written: str, size: int) -> None:
    loaded = load_recipe(recipe, [f"stages.base.budget.memory={written}"])
    assert loaded.stages[0].budget.memory == size


def test_a_run_that_was_begun_before_the_settings_existed_goes_on(recipe: Path, in_twos: Path) -> None:
    kept = in_twos / "stages/base/stage.json"
    content = json.loads(kept.read_text())
    for section, names in (("training", ("weights", "gradient_release")), ("budget", ("memory",))):
        for name in names:
            del content[section][name]
    kept.write_text(json.dumps(content))
    assert any("done already" in line for line in train(recipe, in_twos, *SIX))
