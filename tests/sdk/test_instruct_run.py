"""Instruction data in whole runs: the first batch is shown, resumption is exact, evaluations count the same tokens."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import curve

import edgewright
from edgewright.data.packing import PackedBatches
from edgewright.evaluate import evaluate_examples
from edgewright.training import Interrupted

RECIPE = """
version: 1
name: tiny
seed: 3
data:
  type: instruct
  files: rows.jsonl
  tokenizer: {type: train, vocab_size: 300}
  sequence_length: 48
  held_out: 0.25
stages:
  - name: base
    student:
      type: preset
      preset: llama-1m
      hidden_size: 32
      num_hidden_layers: 1
      num_attention_heads: 2
      intermediate_size: 32
    optimizer: {type: adamw, learning_rate: 5e-3}
    budget: {max_steps: 10}
    training: {per_device_train_batch_size: 2, gradient_accumulation_steps: 2, save_steps: 4, eval_steps: 5}
evaluate: {max_tokens: 200}
bench: null
"""


@pytest.fixture
def recipe(tmp_path):
    rows = [{"prompt": f"What is {n} and {n}? ", "completion": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_a_run_that_was_stopped_gives_the_bits_of_one_that_was_not(recipe, tmp_path, monkeypatch):
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}", say=lambda line: None)
    original, calls = PackedBatches.batch, []

    def batch(self, position, size):
        calls.append(position)
        if len(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, position, size)

    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "batch", batch)
        with pytest.raises(Interrupted):
            edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}", say=lambda line: None)
    edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}", say=lambda line: None)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "stages/base/model/model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluations_count_what_training_counts(recipe, tmp_path):
    from edgewright.data import prepare_data
    from edgewright.recipe import load_recipe

    said = []
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", "evaluate.max_tokens=null", say=said.append)
    assert any("examples in" in line and "full" in line for line in said)
    corpus = prepare_data(load_recipe(recipe).data, tmp_path / "run/data", say=said.append)
    results = json.loads((tmp_path / "run/results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run/stages/base/metrics.jsonl").read_text().splitlines()]
    in_training = [line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line][-1]
    assert results["checkpoints"][0]["bits_per_byte"] == pytest.approx(in_training, rel=2e-3)
    assert f"on {corpus.held_out.predicted:,} held-out tokens" in " ".join(said)
    texts = sum(len(f"It is {2 * n}.") for n in range(40))
    assert corpus.train.bytes + corpus.held_out.bytes == texts


def test_only_what_counts_is_in_the_loss():
    session = Uniform()
    found = evaluate_examples(
        session,
        [([1, 2, 3, 4], [False, False, True, True]), ([1, 2], [False, False])],
        bytes_per_token=2.0,
        max_tokens=99,
    )
    assert (found.tokens, found.bytes, found.documents) == (2, 4, 1)
    assert found.loss == pytest.approx(math.log(8))
    one = evaluate_examples(session, [([1, 2, 3, 4], [False, True, False, True])], bytes_per_token=1.0, max_tokens=1)
    assert one.tokens == 1
    assert session.seen[-1] == [1]


class Uniform:
    """As much of a session as an evaluation needs."""

    path, runtime, context_length, start_id = Path("uniform"), "none", 64, 0

    def __init__(self):
        self.seen = []

    def rewind(self, length):
        assert length == 0

    def append(self, tokens, logits):
        import numpy as np

        self.seen.append(list(tokens))
        return np.zeros((len(tokens), 8), np.float32)


def test_the_first_batch_is_shown(recipe, tmp_path):
    report = edgewright.check(recipe, f"output_dir={tmp_path / 'run'}", show_batch=True)
    assert report.ok and not (tmp_path / "run").exists()
    batch = report.to_json()["batch"]
    assert batch["stage"] == "base" and len(batch["rows"]) == 2
    documents = [document for row in batch["rows"] for document in row["documents"] if not document["padding"]]
    for document in documents:
        text = "".join(document["pieces"])
        learned = "".join(p for p, learns in zip(document["pieces"], document["learned"], strict=True) if learns)
        assert text.startswith("<|endoftext|>What is ") and text.endswith("<|endoftext|>")
        assert learned.startswith("It is ") and learned.endswith(".<|endoftext|>")
    assert sum(sum(document["learned"]) for document in documents) == batch["learned"]
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", "evaluate=null", say=lambda line: None)
    again = edgewright.check(recipe, f"output_dir={tmp_path / 'run'}", show_batch=True)
    assert again.to_json()["batch"] == batch


def test_it_is_shown_as_plain_text_where_nobody_has_a_terminal(recipe, tmp_path):
    command = [
        sys.executable,
        "-m",
        "edgewright",
        "check",
        str(recipe),
        "--show-batch",
        f"output_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("first batch of stage base: 2 sequences of 48 tokens")
    assert any(line.startswith("  + ") and "<|endoftext|>" in line for line in lines)
    assert any(line.startswith("  - ") and "What" in line for line in lines)
    assert any("document 1:" in line for line in lines) and "this recipe can run" in done.stdout


def test_running_text_is_shown_as_well(tmp_path):
    from tiny_run import write_recipe

    report = edgewright.check(write_recipe(tmp_path), f"output_dir={tmp_path / 'run'}", show_batch=True)
    batch = report.to_json()["batch"]
    assert batch["learned"] == 2 * 64
    first = batch["rows"][0]["documents"][0]
    assert first["learned"][0] is False and all(first["learned"][1:])
