"""`plan`: what a recipe needs, before anything is loaded; held against the models and optimizers themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import write_recipe
from torch._subclasses.fake_tensor import FakeTensorMode

from edgewright.check import check
from edgewright.errors import EdgewrightError, RecipeError
from edgewright.plan import CheckFailed, plan
from edgewright.planner.cases import case, stage_models
from edgewright.planner.devices import GPUS, find_device, known_gpu
from edgewright.planner.heap import DRAWS, MAPPED_FROM, Heap, typical_peak
from edgewright.planner.ledger import Ledger
from edgewright.planner.memory import Memory, predict
from edgewright.planner.simulate import Step
from edgewright.recipe import load_recipe
from edgewright.student import build_preset

CPU = find_device("cpu")


def simulated(folder: Path, *overrides: str) -> tuple[Memory, Step]:
    """The first stage of the tiny recipe on this machine's processor."""
    fixed = ("stages.base.training.precision=fp32", "stages.base.training.compile=off")
    recipe = load_recipe(write_recipe(folder), [*fixed, *overrides])
    stage, models = next(iter(stage_models(recipe, 300)))
    return predict(case(stage, models, recipe, CPU), CPU)


def test_weights_gradients_and_state_are_those_of_the_model(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    model = build_preset(recipe.stages[0].student, vocab_size=300, max_position_embeddings=64, bos=0, eos=0, seed=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    _, step = simulated(tmp_path)
    assert step.parameters == parameters
    assert step.weight_bytes == 4 * parameters + buffers
    assert step.optimizer_bytes == recipe.stages[0].optimizer.state_bytes(model)


def test_the_operations_are_six_for_a_weight_and_token(tmp_path: Path) -> None:
    """2 forward and 4 backward for every weight of a matrix, and attention beside them (Kaplan et al., 2001.08361)."""
    _, step = simulated(tmp_path)
    tokens, attention = 2 * 2 * 64, 3 * 4 * 64 * 64 * 64 * 4
    matrices = step.parameters - 3 * 64
    assert step.flops == pytest.approx(6 * matrices * tokens + attention, rel=0.1)


def test_what_is_alive_on_paper_is_what_is_alive(tmp_path: Path) -> None:
    """The ledger under real tensors and under fake ones comes to the same sum at every moment."""

    def work() -> None:
        x = torch.ones(100, 1000, requires_grad=True)
        y = (x * 2).tanh().exp()
        (y @ y.T).sum().backward()

    real, fake = Ledger(), Ledger()
    with real:
        work()
    with FakeTensorMode(), fake:
        work()
    assert sum(real.peak.values()) == sum(fake.peak.values()) > 3 * 400_000
    assert sum(real.now.values()) == sum(fake.now.values()) == 0


def test_questions_are_no_operations() -> None:
    """A tensor without memory is asked for its device where a real one simply has it."""
    with FakeTensorMode(), Ledger() as ledger:
        ones = torch.ones(3)
        assert ones.to(ones.device).float().device == (ones + 1).device
    assert ledger.operations == 2


def test_memory_follows_the_settings(tmp_path: Path) -> None:
    layers = "stages.base.student.num_hidden_layers=6"
    _, plain = simulated(tmp_path, layers)
    _, double = simulated(tmp_path, layers, "stages.base.training.per_device_train_batch_size=4")
    _, again = simulated(tmp_path, layers, "stages.base.training.gradient_checkpointing=true")
    _, released = simulated(
        tmp_path,
        layers,
        "stages.base.training={per_device_train_batch_size: 2, gradient_release: true, max_grad_norm: null}",
    )
    _, narrow = simulated(tmp_path, layers, "stages.base.training.weights=bf16")
    activations = [step.memory["activations"] for step in (plain, double, again)]
    assert 1.9 < activations[1] / activations[0] < 2.1
    assert activations[2] < 0.6 * activations[0] and again.flops > 1.2 * plain.flops
    assert sum(released.memory.values()) < sum(plain.memory.values()) - 2 * plain.parameters
    assert 0.5 <= narrow.weight_bytes / plain.weight_bytes < 0.55


METHODS = [
    "{type: ternary}",
    "{type: ternary, quantizer: seq_ternary}",
    "{type: lowrank, rank: 8}",
    "{type: lost, rank: 8}",
    "{type: sltrain, rank: 8}",
    "{type: sparse}",
    "{type: granet, density: 0.25, initial_density: 0.5, update_every: 2}",
    "{type: integer, format: q8_0}",
]


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_to_the_simulation_what_they_do_to_the_model(tmp_path: Path, method: str) -> None:
    override = f"stages.base.methods=[{method}]"
    recipe = load_recipe(write_recipe(tmp_path), [override])
    model = build_preset(recipe.stages[0].student, vocab_size=300, max_position_embeddings=64, bos=0, eos=0, seed=0)
    recipe.stages[0].methods[0].build().prepare(model)
    _, step = simulated(tmp_path, override)
    assert step.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert step.optimizer_bytes == recipe.stages[0].optimizer.state_bytes(model)


def test_a_teacher_is_counted(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ternary=True))
    (_, _), (stage, models) = stage_models(recipe, 300)
    _, step = predict(case(stage, models, recipe, CPU), CPU)
    (teacher,) = models.teachers
    assert step.memory["teacher"] >= 4 * sum(parameter.numel() for parameter in teacher.parameters())


def test_a_heap_has_holes() -> None:
    heap = Heap()
    heap.play([(0, 1000), (1, 1000), (0, -1), (2, 1000)])
    assert 3000 < heap.peak < 3500, "a hole of the size of a block does not hold one, for its alignment"
    heap.play([(3, 500)])
    assert heap.peak < 3500, "a smaller one fits into it"
    heap.play([(key, -1) for key in range(4)])
    heap.play([(9, MAPPED_FROM)])
    before = heap.peak
    heap.play([(9, -1), (10, MAPPED_FROM)])
    assert heap.peak == before > MAPPED_FROM, "large blocks are given back"


def test_the_typical_heap_is_the_median_of_several() -> None:
    events = [event for key in range(400) for event in ((key, 1000 + 97 * (key % 13)), (key - 5, -1))]
    peaks = []
    for seed in range(DRAWS):
        heap = Heap(seed)
        heap.play(events)
        heap.play(events)
        heap.play((key, -1) for key, _ in events)
        peaks.append(heap.peak)
    assert len(set(peaks)) > 1
    assert typical_peak(events, events, 1) == sorted(peaks)[DRAWS // 2]


def test_the_object_that_scripts_read(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ternary=True)
    before = sorted(tmp_path.rglob("*"))
    found = plan(recipe, device="rtx-4070", probe=False).to_json()
    assert sorted(tmp_path.rglob("*")) == before, "plan writes nothing"
    assert json.loads(json.dumps(found)) == found
    parts = ["weights", "gradients", "optimizer", "activations", "logits", "teacher", "other", "total"]
    assert list(found["memory"]) == parts
    assert found["memory"]["total"] == sum(found["memory"][part] for part in parts[:-1])
    assert found["fits"] and found["device"]["memory"] == 12 * 2**30
    assert found["memory"] == max((stage["memory"] for stage in found["stages"]), key=lambda each: each["total"])
    assert found["seconds_range"][0] < found["seconds"] < found["seconds_range"][1]
    assert found["disk"] == sum(size for kind, size in found["disk_parts"].items() if kind != "total")


@pytest.mark.slow
def test_what_does_not_fit_and_what_to_change(tmp_path: Path) -> None:
    large = ["stages.base.student={type: preset, preset: llama-20m}", "stages.base.training.precision=fp32"]
    found = plan(write_recipe(tmp_path), *large, "data.sequence_length=256", device="600MB", probe=False)
    assert not found.fits and found.stages[0].time.seconds is None
    savings = [advice.saving for advice in found.advice if advice.change.same_training]
    assert savings == sorted(savings, reverse=True) and savings
    assert not [advice for advice in found.advice if advice.saving != found.largest.memory.total - advice.memory]
    first = found.advice[0]
    overrides = [f"stages.base.{setting}" for setting in first.change.text().split(" training")]
    overrides = [text if "training" in text else text.replace("base.", "base.training") for text in overrides]
    changed = plan(write_recipe(tmp_path), *large, *overrides, "data.sequence_length=256", device="600MB", probe=False)
    assert changed.largest.memory.total == first.memory, "advice is what the changed recipe is predicted to need"


def test_errors_are_those_of_check(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    late = 'stages.base.methods=[{type: ternary, exclude: ["dwn_proj"]}]'
    with pytest.raises(CheckFailed) as raised:
        plan(recipe, late, probe=False)
    assert [error.message() for error in raised.value.errors] == [e.message() for e in check(recipe, late).errors]
    with pytest.raises(EdgewrightError, match="EW-110"):
        plan(recipe, "stages.base.optimiser=1", probe=False)


def test_devices() -> None:
    assert find_device("RTX 4070") is GPUS["rtx-4070"]
    assert find_device("24GB").memory == 24 * 10**9 and find_device("8GiB").memory == 8 * 2**30
    assert find_device(" 1.5TB ").memory == 1_500_000_000_000
    with pytest.raises(RecipeError, match="EW-760") as raised:
        find_device("rtx-4071")
    assert "rtx-4070" in str(raised.value.fix)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4060", "rtx-4060"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
    ],
)
def test_what_a_driver_calls_a_gpu(name: str, known: str | None) -> None:
    found = known_gpu(name)
    assert (found.name if found else None) == known


def test_without_bf16_a_gpu_computes_in_fp32(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["stages.base.training.precision=auto"])
    stage, models = next(iter(stage_models(recipe, 300)))
    precisions = [case(stage, models, recipe, GPUS[name]).decisions["precision"] for name in ("t4", "l4")]
    assert precisions == ["float32", "bfloat16"]


NOTHING_FAKE = """
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

import edgewright
from edgewright.imports import importing_bitsandbytes

planned = edgewright.plan(sys.argv[1], *sys.argv[2:], probe=False)
assert planned.stages[0].memory
from edgewright.optim.storage import code_book

with importing_bitsandbytes():
    from bitsandbytes.backends import utils
found = [code_book(True, torch.device("cpu")), code_book(False, torch.device("cpu")), *vars(utils).values()]
tensors = [value for value in found if isinstance(value, torch.Tensor)]
assert len(tensors) >= 4 and not any(isinstance(tensor, FakeTensor) for tensor in tensors), tensors
"""
"""What is made once for a process, by a process whose first step is a simulated one."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    ["{type: apollo, rank: 4, states: int8}", "{type: galore, rank: 4, states: int8}", "{type: adamw_8bit}"],
)
def test_what_outlasts_a_simulated_step_is_real(tmp_path: Path, optimizer: str) -> None:
    recipe = write_recipe(tmp_path)
    command = [
        sys.executable,
        "-c",
        NOTHING_FAKE,
        str(recipe),
        f"stages.base.optimizer={optimizer}",
        "stages.base.training.compile=off",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
