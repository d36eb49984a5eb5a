"""The loop: what a step does, exact resume, roll-back, signals, full disks; on a run that takes seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import edgewright
from edgewright import checkpoint
from edgewright.errors import Diverged, OutOfResources, RecipeError
from edgewright.training import Interrupted

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import curve, weights, write_recipe  # noqa: E402


def test_it_learns_and_leaves_what_the_design_promises(finished):
    _, run = finished
    steps = curve(run)
    assert [step for step, _ in steps] == list(range(1, 13))
    assert float.fromhex(steps[-1][1]) < float.fromhex(steps[0][1]) - 0.3
    for name in ("recipe.yaml", "recipe.resolved.yaml", "env.json", "results.json", "report.html"):
        assert (run / name).is_file()
    done = json.loads((run / "stages" / "base" / "done.json").read_text())
    assert done["steps"] == 12
    assert [path.name for path in sorted((run / "stages/base/checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000012",
    ]
    evaluations = [json.loads(line) for line in (run / "stages/base/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in evaluations if "eval_loss" in entry] == [6, 12]


def test_the_result_opens_in_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished[1] / "stages/base/model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(finished[1] / "stages/base/model", local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)


def test_the_same_command_again_says_that_all_is_done(finished):
    recipe, run = finished
    said: list[str] = []
    before = weights(run)
    edgewright.run(recipe, f"output_dir={run}", say=said.append)
    assert "base: done already" in said
    assert weights(run) == before


def test_two_runs_of_one_recipe_have_the_same_bits(finished, tmp_path):
    recipe, run = finished
    edgewright.run(recipe, f"output_dir={tmp_path / 'again'}")
    assert curve(tmp_path / "again") == curve(run)
    assert weights(tmp_path / "again") == weights(run)


def test_the_resolved_recipe_is_runnable_and_gives_the_same_bits(finished, tmp_path):
    _, run = finished
    edgewright.run(run / "recipe.resolved.yaml", f"output_dir={tmp_path / 'resolved'}")
    assert weights(tmp_path / "resolved") == weights(run)


def test_accumulation_is_the_mean_over_all_tokens(finished, tmp_path):
    """Two micro-batches of 2 and one of 4 give the same curve up to rounding."""
    recipe, run = finished
    edgewright.run(
        recipe,
        f"output_dir={tmp_path / 'run'}",
        "stages.base.training.per_device_train_batch_size=4",
        "stages.base.training.gradient_accumulation_steps=1",
        "stages.base.training.precision=fp32",
    )
    edgewright.run(recipe, f"output_dir={tmp_path / 'two'}", "stages.base.training.precision=fp32")
    one, two = curve(tmp_path / "run"), curve(tmp_path / "two")
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=1e-5)


def test_the_optimizer_is_torchs_adamw(finished, tmp_path):
    """Three steps in float32 equal a plain loop written here with full logits and torch's own AdamW."""
    from torch.nn import functional as F

    from edgewright.data import Batches, prepare_data
    from edgewright.recipe import load_recipe
    from edgewright.student import build_preset

    recipe_path, run = finished
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "stages.base.budget.max_steps=3",
        "stages.base.training.precision=fp32",
    ]
    edgewright.run(recipe_path, *overrides)
    recipe = load_recipe(recipe_path, overrides)
    corpus = prepare_data(recipe.data, tmp_path / "data", say=lambda line: None)
    order = Batches(corpus.train, sequence_length=64, seed=7, start_id=corpus.start_id, eos_id=corpus.eos_id)
    model = build_preset(
        recipe.stages[0].student,
        vocab_size=corpus.vocab_size,
        max_position_embeddings=64,
        bos=corpus.start_id,
        eos=corpus.eos_id,
        seed=7,
    )
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(3):
        batch = order.batch(4 * step, 4)
        losses, counted = [], 0
        for row in range(4):  # each document segment by itself: no mask, no restart needed
            ids, segments = torch.from_numpy(batch.input_ids[row]), torch.from_numpy(batch.document_ids[row])
            labels = torch.from_numpy(batch.labels[row])
            for segment in range(int(segments.max()) + 1):
                part = segments == segment
                logits = model(ids[part][None]).logits[0]
                losses.append(F.cross_entropy(logits, labels[part], reduction="sum"))
                counted += int(part.sum())
        (torch.stack(losses).sum() / counted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * recipe.stages[0].schedule.factor(step, 3)
        optimizer.step()
        optimizer.zero_grad()
    saved = load_file(tmp_path / "run/stages/base/model/model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=0, atol=2e-5, msg=name)


def test_packed_loss_of_each_document_is_its_loss_alone():
    """Rows with many documents: each one's loss with mask and restarted positions is that of the document by itself."""
    import numpy as np
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from edgewright.chunked import Head
    from edgewright.data import Batches, TokenStream
    from edgewright.student import hidden_states, output_head
    from edgewright.trainer import model_inputs

    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 50, size) for size in rng.integers(3, 20, 40)]
    tokens = np.concatenate([part for document in documents for part in ([0], document)] + [[0]]).astype(np.uint16)
    stream = TokenStream(tokens=tokens, documents=len(documents), bytes=len(tokens))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    batch = Batches(stream, sequence_length=64, seed=0, start_id=0, eos_id=0).batch(0, 4)
    assert batch.has_borders and batch.document_ids.max() > 3
    positions = model_inputs(batch, torch.device("cpu")).position_ids  # rotary attention alone would not show them
    assert positions is not None
    assert not positions[torch.from_numpy(batch.input_ids == 0)].any()
    assert 0 < positions.max() < 20
    with torch.no_grad():
        head: Head = output_head(model)
        logits = head(hidden_states(model, model_inputs(batch, torch.device("cpu")))).unflatten(0, (4, 64))
        for row in range(4):
            segments = torch.from_numpy(batch.document_ids[row])
            for segment in segments.unique():
                part = segments == segment
                labels = torch.from_numpy(batch.labels[row])[part]
                alone = model(torch.from_numpy(batch.input_ids[row])[part][None]).logits[0]
                packed = F.cross_entropy(logits[row][part], labels)
                torch.testing.assert_close(packed, F.cross_entropy(alone, labels), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_restores_buffers_too():
    """A mask that a method registers is no parameter, and is part of the model's state all the same."""
    from edgewright.student import PresetStudentConfig, build_preset

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = PresetStudentConfig(preset="llama-1m", **sizes)
    models = [
        build_preset(config, vocab_size=50, max_position_embeddings=64, bos=0, eos=0, seed=seed) for seed in (1, 2)
    ]
    for number, model in enumerate(models):
        model.model.layers[0].mlp.register_buffer("mask", torch.full((3,), float(number)))
    saved = {name: tensor for name, tensor in models[0].state_dict().items() if name != "lm_head.weight"}
    checkpoint.put_weights(models[1], saved)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    with pytest.raises(AssertionError, match="mask"):
        checkpoint.put_weights(models[1], {name: tensor for name, tensor in saved.items() if "mask" not in name})


def _stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while step `step` runs."""
    from edgewright.data import Batches

    original, calls = Batches.batch, []

    def batch(self, position, size):
        calls.append(position)
        if len(calls) == 2 * step:
            os.kill(os.getpid(), number)
        return original(self, position, size)

    monkeypatch.setattr(Batches, "batch", batch)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_with_the_same_bits(
    finished, tmp_path, monkeypatch, number, code
):
    recipe, run = finished
    with monkeypatch.context() as patch:
        _stop_at(patch, 7, number)
        with pytest.raises(Interrupted) as stopped:
            edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert stopped.value.exit_code == code
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert curve(tmp_path / "run") == curve(run)
    assert weights(tmp_path / "run") == weights(run)


KILLED = """
import os, sys, random
import edgewright
from edgewright.data import Batches
original, left = Batches.batch, int(sys.argv[3])
def batch(self, position, size):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return original(self, position, size)
Batches.batch = batch
edgewright.run(sys.argv[1], f"output_dir={sys.argv[2]}")
"""


def test_kill_9_and_the_same_command_again_gives_the_same_bits(finished, tmp_path):
    recipe, run = finished
    for calls in (3, 11, 8):
        result = subprocess.run(
            [sys.executable, "-c", KILLED, recipe, tmp_path / "run", str(calls)], capture_output=True
        )
        assert result.returncode == -9, result.stderr.decode()
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert curve(tmp_path / "run") == curve(run)
    assert weights(tmp_path / "run") == weights(run)


def _poison(monkeypatch, positions):
    """Make the loss of these global batches not a number, as often as they are trained on."""
    from edgewright.trainer import Trainer

    original = Trainer._with_penalties

    def with_penalties(self, loss, micro_batches):
        return original(self, loss, micro_batches) * (float("nan") if self.state.position in positions else 1.0)

    monkeypatch.setattr(Trainer, "_with_penalties", with_penalties)


def test_non_finite_values_throw_the_run_back_and_skip_the_batch(finished, tmp_path, monkeypatch):
    recipe, _ = finished
    _poison(monkeypatch, {5 * 4, 9 * 4})
    said: list[str] = []
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run/stages/base/metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "rollback"]
    assert [(event["skipped_position"], event["to_step"]) for event in events] == [(20, 4), (36, 8)]
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 13))
    newest = checkpoint.newest(tmp_path / "run/stages/base/checkpoints", said.append)
    state = checkpoint.load(newest).state
    assert state.skipped == [20, 36]
    assert state.position == 14 * 4  # twelve trained, two skipped
    assert all(torch.isfinite(value).all() for value in load_file(newest / "model/model.safetensors").values())


def test_three_roll_backs_stop_the_run(finished, tmp_path, monkeypatch):
    recipe, _ = finished
    _poison(monkeypatch, {5 * 4, 6 * 4, 7 * 4})
    with pytest.raises(Diverged, match="EW-701") as stopped:
        edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert stopped.value.exit_code == 7
    newest = checkpoint.newest(tmp_path / "run/stages/base/checkpoints", lambda line: None)
    assert newest.name == "step-00000004"


def test_a_full_disk_leaves_the_last_good_checkpoint(finished, tmp_path, monkeypatch):
    recipe, run = finished
    calls = []

    def full(directory, *args):
        calls.append(directory)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync_tree", full)
        with pytest.raises(OutOfResources, match="EW-401") as stopped:
            edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert stopped.value.exit_code == 4
    folder = tmp_path / "run/stages/base/checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000000", "step-00000004"]
    assert checkpoint.broken(folder / "step-00000004") is None
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert weights(tmp_path / "run") == weights(run)


def test_the_libraries_own_words_for_a_full_disk_are_understood(tmp_path):
    from safetensors import SafetensorError

    from edgewright.files import disk_errors

    with pytest.raises(OutOfResources, match="EW-401"), disk_errors(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), disk_errors(tmp_path / "x"):
        raise SafetensorError("something else")


@pytest.mark.parametrize("name", ["model/model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, monkeypatch, name):
    recipe, run = finished
    with monkeypatch.context() as patch:
        _stop_at(patch, 10)
        with pytest.raises(Interrupted):
            edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    folder = tmp_path / "run/stages/base/checkpoints"
    newest = checkpoint.newest(folder, lambda line: None)
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    said: list[str] = []
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", say=said.append)
    assert any(newest.name in line and "damaged" in line for line in said)
    assert weights(tmp_path / "run") == weights(run)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    recipe = write_recipe(folder, ternary=True)
    edgewright.run(recipe, f"output_dir={folder / 'run'}")
    return recipe, folder / "run"


def test_a_ternary_student_of_an_earlier_stage(distilled):
    from edgewright.export.lattice import load_sidecar

    _, run = distilled
    lattice = load_sidecar(run / "stages/student/model")
    saved = load_file(run / "stages/student/model/model.safetensors")
    assert len(lattice) == 7
    for name, tensor in lattice.items():
        assert torch.equal(torch.from_numpy(tensor.dequantize()), saved[name])
        assert set(saved[name].abs().unique(dim=None).tolist()) <= {0.0, *tensor.scales.flatten().tolist()}
    lines = [json.loads(line) for line in (run / "stages/student/metrics.jsonl").read_text().splitlines()]
    assert {"forward_kl", "cross_entropy"} <= next(line for line in lines if "loss" in line).keys()


def test_the_teacher_is_measured_on_the_students_held_out_text(distilled):
    """The base stage's own last evaluation, on the same sequences, is the teacher's."""
    _, run = distilled
    metrics = {stage: (run / f"stages/{stage}/metrics.jsonl").read_text().splitlines() for stage in ("base", "student")}
    base = [json.loads(line) for line in metrics["base"]]
    student = [json.loads(line) for line in metrics["student"]]
    own = [line["eval_loss"] for line in base if "eval_loss" in line][-1]
    seen = [line["teacher_loss"] for line in student if line.get("event") == "teacher"]
    assert seen == [pytest.approx(own, rel=2e-3)]


def test_a_later_stage_goes_on_from_the_latent_weights(distilled, tmp_path):
    from edgewright.stage import trained_form

    _, run = distilled
    latent = load_file(trained_form(run / "stages/student", print) / "model.safetensors")
    plain = load_file(run / "stages/student/model/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert len(plain[name][0].unique()) <= 3 < len(latent[name][0].unique())


def test_a_damaged_last_checkpoint_is_not_replaced_by_an_older_one(distilled, tmp_path):
    """The finished model is of the last step, so it stands in, and the run says so."""
    from edgewright.stage import trained_form

    stage = shutil.copytree(distilled[1] / "stages/student", tmp_path / "student")
    lines = []
    last = stage / "checkpoints/step-00000008"
    assert trained_form(stage, lines.append) == last / "model" and not lines
    data = bytearray((last / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (last / "optimizer.safetensors").write_bytes(data)
    assert trained_form(stage, lines.append) == stage / "model"
    assert len(lines) == 1 and "step-00000008" in lines[0] and "optimizer.safetensors has changed" in lines[0]


def test_a_ternary_run_resumes_with_the_same_bits(distilled, tmp_path):
    recipe, run = distilled
    for calls in (32, 3):
        result = subprocess.run(
            [sys.executable, "-c", KILLED, recipe, tmp_path / "run", str(calls)], capture_output=True
        )
        assert result.returncode == -9, result.stderr.decode()
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert curve(tmp_path / "run", "student") == curve(run, "student")
    assert weights(tmp_path / "run", "student") == weights(run, "student")


def test_a_method_that_changes_nothing_is_an_error(finished, tmp_path):
    recipe, _ = finished
    everything = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
    with pytest.raises(RecipeError, match="EW-704"):
        edgewright.run(
            recipe,
            f"output_dir={tmp_path / 'run'}",
            f"stages.base.methods=[{{type: ternary, exclude: {everything}}}]",
        )


def test_a_teacher_with_other_tokens_is_refused_with_the_first_of_them(finished, tmp_path):
    recipe, run = finished
    teacher = f"{{type: checkpoint, model: {run / 'stages/base/model'}}}"
    with pytest.raises(RecipeError, match="token 300 is not the same.*EW-130"):
        edgewright.run(
            recipe,
            f"output_dir={tmp_path / 'run'}",
            "data.tokenizer.vocab_size=320",
            f"stages.base.objective={{type: distill, teacher: {teacher}}}",
        )
