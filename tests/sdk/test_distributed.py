"""Two processes under torchrun, with gloo on the loopback: the steps of one process, one writer, resume, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import edgewright
from edgewright import checkpoint
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import curve, write_recipe  # noqa: E402

IN_FLOAT32 = "stages.base.training.precision=fp32"
CUT_UP = "stages.base.training.sharding=full"
APOLLO = "stages.base.optimizer={type: apollo, rank: 8, learning_rate: 5e-3}"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
DRIVER = '''
"""edgewright run, in which something happens to one process while it fetches its n-th micro-batch."""
import os, sys
from edgewright.cli import main
from edgewright.data import Batches
from edgewright.trainer import Trainer

rank, event, left, *words = sys.argv[1:]
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
hit, left = first and os.environ.get("RANK", "0") == rank, int(left)
fetch, penalties = Batches.batch, Trainer._with_penalties

def batch(self, position, size):
    global left
    left -= 1
    if left == 0 and hit and event.isdecimal():
        os.kill(os.getpid(), int(event))
    if left == 0 and hit and event == "error":
        raise MemoryError
    return fetch(self, position, size)

def with_penalties(self, loss, micro_batches):
    bad = hit and event == "nan" and self.state.position == 20
    return penalties(self, loss, micro_batches) * (float("nan") if bad else 1.0)

Batches.batch, Trainer._with_penalties = batch, with_penalties
main(["run", *words])
'''


def start(*words, processes=2, restarts=0):
    """Run this in so many processes, or in one without torchrun; (exit code, what was said)."""
    several = [*TORCHRUN, "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    launcher = several if processes > 1 else [sys.executable]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, *(str(int(word) if isinstance(word, signal.Signals) else word) for word in words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def run(recipe, directory, *overrides, processes=2):
    """`edgewright run`, which is to succeed; what was said."""
    code, said = start("-m", "edgewright", "run", recipe, f"output_dir={directory}", *overrides, processes=processes)
    assert code == 0, said
    return said


def run_hit(folder, recipe, directory, *overrides, rank=0, event=signal.SIGKILL, calls=0, processes=2, restarts=0):
    """`edgewright run` with one process hit by a signal or another event; (exit code, what was said)."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    words = (driver, rank, event, calls, recipe, f"output_dir={directory}", *overrides)
    return start(*words, processes=processes, restarts=restarts)


def same_curve(one, other, stage="base"):
    """Whether two loss curves are each other's to 1e-5 of the loss, step by step."""
    first, second = curve(one, stage), curve(other, stage)
    assert [step for step, _ in first] == [step for step, _ in second]
    losses = [[float.fromhex(loss) for _, loss in each] for each in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def events(directory, stage="base"):
    """What is in metrics.jsonl."""
    lines = (directory / "stages" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process in float32: (folder, recipe, run directory)."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder)
    edgewright.run(recipe, f"output_dir={folder / 'run'}", IN_FLOAT32)
    return folder, recipe, folder / "run"


@pytest.fixture(scope="module")
def copied(alone, tmp_path_factory):
    """The same run of two processes: (run directory, what was said)."""
    directory = tmp_path_factory.mktemp("copied") / "run"
    return directory, run(alone[1], directory, IN_FLOAT32)


def test_two_processes_take_the_steps_of_one(alone, copied):
    directory, _ = copied
    same_curve(alone[2], directory)
    ours, theirs = (
        [entry for entry in events(each) if "grad_norm" in entry or "eval_loss" in entry]
        for each in (directory, alone[2])
    )
    for mine, other in zip(ours, theirs, strict=True):
        for name in {"grad_norm", "eval_loss", "tokens", "lr"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name


def test_one_process_writes_and_speaks(copied):
    directory, said = copied
    lines = said.splitlines()
    for once in ("corpus ready", "base: step 5/12", "base: checkpoint at step 12", "report: "):
        assert len([line for line in lines if once in line]) == 1, said
    assert "2 processes" in said and "Warning" not in said
    steps = [entry["step"] for entry in events(directory) if "loss" in entry]
    assert steps == list(range(1, 13))
    assert not [path for path in directory.rglob("*") if ".tmp" in path.name or path.name == "lock.json"]


def test_the_checkpoint_is_that_of_one_process(alone, copied):
    for path in ("model/model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(each / "stages/base/checkpoints/step-00000012" / path) for each in (alone[2], copied[0]))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-6)


def test_one_process_imports_nothing_of_it(alone, tmp_path):
    before = "import sys, torch, transformers.modeling_utils\nknown = set(sys.modules)\n"
    program = """
import edgewright
edgewright.run(*sys.argv[1:])
assert not torch.distributed.is_initialized()
ours = {"edgewright.distributed", "torch.distributed.fsdp", "torch.nn.parallel.distributed"}
assert not ours & (sys.modules.keys() - known)
"""
    words = (alone[1], f"output_dir={tmp_path / 'run'}", "stages.base.budget.max_steps=1", CUT_UP)
    code, said = start("-c", before + program, *words, processes=1)
    assert code == 0, said


def check(recipe, *overrides, processes=2):
    """The codes with which so many processes refuse a recipe, and the whole message."""
    from edgewright.distributed_rules import check_several

    with pytest.raises(RecipeErrors) as refused:
        check_several(load_recipe(recipe, overrides), processes)
    return [error.code for error in refused.value.errors], str(refused.value)


def test_micro_batches_that_cannot_be_dealt_out_evenly_are_refused(alone):
    codes, text = check(alone[1], processes=4)
    assert codes == ["EW-770"]
    assert "gradient_accumulation_steps: 4" in text and "4 and per_device_train_batch_size: 1" in text
    assert "gradient_accumulation_steps: 3" in check(alone[1], processes=3)[1]


def test_what_needs_whole_weights_is_refused_where_they_are_cut_up(alone):
    method = "stages.base.methods=[{type: ternary, granularity: row}]"
    codes, text = check(alone[1], CUT_UP, method, "stages.base.training.compile=on")
    assert sorted(codes) == ["EW-771", "EW-772"]
    assert "'ternary'" in text and "compile" in text


def test_a_process_without_a_gpu_or_without_the_run_directory_is_refused(tmp_path):
    from edgewright.distributed import Processes, _take_device

    with pytest.raises(RecipeError, match="EW-775"):
        _take_device(torch.cuda.device_count())
    with pytest.raises(RecipeError, match="EW-774"):
        Processes(torch.distributed.HashStore(), 1, 2).check_sees(tmp_path / "nowhere")


# ---------------------------------------------------------------- slower


@pytest.mark.slow
def test_what_torchrun_starts_again_goes_on(alone, tmp_path):
    code, said = run_hit(tmp_path, alone[1], tmp_path / "run", IN_FLOAT32, rank=1, calls=8, restarts=1)
    assert code == 0, said
    assert [entry["step"] for entry in events(tmp_path / "run") if entry.get("event") == "resumed"] == [4]
    same_curve(alone[2], tmp_path / "run")


@pytest.mark.slow
def test_weights_cut_up_give_the_same_curve(alone, copied, tmp_path):
    said = run(alone[1], tmp_path / "run", IN_FLOAT32, CUT_UP)
    assert "Warning" not in said
    same_curve(copied[0], tmp_path / "run")
    test_the_checkpoint_is_that_of_one_process(alone, (tmp_path / "run", said))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [["stages.base.training.sharding=none"], [CUT_UP], [CUT_UP, APOLLO]],
    ids=["copied", "cut-up", "apollo-cut-up"],
)
def test_killed_on_two_gone_on_alone_and_back(alone, tmp_path, settings):
    folder, recipe, whole = alone
    overrides = (IN_FLOAT32, *settings, "stages.base.training.save_steps=2")
    if APOLLO in settings:
        whole = tmp_path / "whole"
        edgewright.run(recipe, f"output_dir={whole}", IN_FLOAT32, APOLLO)
    code, said = run_hit(tmp_path, recipe, tmp_path / "run", *overrides, rank=1, calls=5)
    assert code != 0, said
    code, said = run_hit(tmp_path, recipe, tmp_path / "run", *overrides, calls=12, processes=1)
    assert code == -signal.SIGKILL and "going on with 1 process:" in said, said
    said = run(recipe, tmp_path / "run", *overrides)
    assert "begun on 1 process, going on with 2 processes" in said
    resumed = [entry["step"] for entry in events(tmp_path / "run") if entry.get("event") == "resumed"]
    assert resumed[0] > 0 and resumed[1] > resumed[0], resumed
    same_curve(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(alone, tmp_path):
    folder, recipe, whole = alone
    code, said = run_hit(tmp_path, recipe, tmp_path / "run", IN_FLOAT32, CUT_UP, rank=1, event=signal.SIGTERM, calls=6)
    assert code != 0 and said.count("stopped by SIGTERM at step 6") == 1 and "go on with" in said, said
    assert "Traceback" not in said.split("torch/distributed")[0], said
    newest = checkpoint.newest(tmp_path / "run/stages/base/checkpoints", print)
    assert newest.name == "step-00000006"
    run(recipe, tmp_path / "run", IN_FLOAT32, CUT_UP)
    same_curve(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_ternary_student_of_a_teacher_under_ddp(tmp_path):
    recipe = write_recipe(tmp_path, ternary=True)
    overrides = [
        IN_FLOAT32,
        "stages.student.training.precision=fp32",
        "stages.student.training.per_device_train_batch_size=2",
        "stages.student.training.gradient_accumulation_steps=2",
    ]
    edgewright.run(recipe, f"output_dir={tmp_path / 'one'}", *overrides)
    run(recipe, tmp_path / "two", *overrides)
    same_curve(tmp_path / "one", tmp_path / "two")
    same_curve(tmp_path / "one", tmp_path / "two", "student")
    assert (tmp_path / "two/stages/student/model/lattice.safetensors").is_file()
    seen = [
        [e["teacher_loss"] for e in events(tmp_path / each, "student") if "teacher_loss" in e]
        for each in ("one", "two")
    ]
    assert seen[0] == pytest.approx(seen[1], rel=1e-5) and len(seen[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.base.methods=[{type: granet, regrow: gradient, update_every: 3}]"],
        ["stages.base.methods=[{type: lowrank, rank: 8, relora: {merge_every: 3}, rewarm_steps: 0}]"],
        ["stages.base.methods=[{type: lowrank, rank: 8}]", CUT_UP],
        ["stages.base.methods=[{type: lora, rank: 8, dora: true}]"],
        ["stages.base.methods=[{type: lora, rank: 8}]", CUT_UP],
        [APOLLO],
        ["stages.base.optimizer={type: galore, rank: 8, learning_rate: 5e-3}"],
        [APOLLO, CUT_UP],
        ["stages.base.optimizer={type: apollo_mini, learning_rate: 5e-3}", CUT_UP],
        ["stages.base.optimizer={type: gradnorm_lorp, rank: 8, learning_rate: 5e-3}", CUT_UP],
        ["stages.base.optimizer={type: fira, rank: 8, learning_rate: 5e-3}", CUT_UP],
        ["stages.base.training.gradient_checkpointing=true", CUT_UP],
    ],
    ids=[
        "granet",
        "relora",
        "factors-cut-up",
        "dora",
        "lora-cut-up",
        "apollo",
        "galore",
        "apollo-cut-up",
        "mini-cut-up",
        "gradnorm-lorp-cut-up",
        "fira-cut-up",
        "recomputed-cut-up",
    ],
)
def test_methods_and_optimizers_act_alike_in_every_process(alone, tmp_path, overrides):
    edgewright.run(alone[1], f"output_dir={tmp_path / 'one'}", IN_FLOAT32, *overrides)
    said = run(alone[1], tmp_path / "two", IN_FLOAT32, *overrides)
    assert "Warning" not in said
    same_curve(tmp_path / "one", tmp_path / "two")
    models = [load_file(tmp_path / each / "stages/base/model/model.safetensors") for each in ("one", "two")]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_non_finite_values_in_one_process_throw_all_back(alone, tmp_path):
    for directory, rank, processes in (("one", 0, 1), ("two", 1, 2)):
        code, said = run_hit(
            tmp_path, alone[1], tmp_path / directory, IN_FLOAT32, rank=rank, event="nan", processes=processes
        )
        assert code == 0 and said.count("base: rollback") == 1, said
    same_curve(tmp_path / "one", tmp_path / "two")
    assert [e["skipped_position"] for e in events(tmp_path / "two") if e.get("event") == "rollback"] == [20]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_is_told(alone, tmp_path):
    code, said = run_hit(tmp_path, alone[1], tmp_path / "run", IN_FLOAT32, rank=1, event="error", calls=6)
    assert code != 0 and "EW-751" in said, said
    assert "process 1 of the 2 of this run stopped" in said or "exitcode  : 143" in said, said  # if torchrun was faster
