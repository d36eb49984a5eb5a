"""Sparse pretraining and dense fine-tuning as two stages of a run, and what other formats make of the zeros."""

import sys
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import edgewright
from edgewright.export import to_gguf, to_onnx
from edgewright.export.source import load_source

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402

DENSE_STAGE = """
  - name: dense
    student: {type: stage, stage: base}
    optimizer: {type: adamw, learning_rate: 2e-3}
    budget: {max_steps: 3}
    training: {per_device_train_batch_size: 4, keep_checkpoints: 9, eval_sequences: 4}
evaluate: null
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The stages of a finished run: sparse, then dense from what it left."""
    folder = tmp_path_factory.mktemp("spdf")
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text().replace("\nevaluate: null", DENSE_STAGE.rstrip("\n")))
    edgewright.run(recipe, f"output_dir={folder / 'run'}", "stages.base.methods=[{type: sparse, density: 0.25}]")
    return folder / "run" / "stages"


def linears(model):
    return {name: weight for name, weight in load_file(model / "model.safetensors").items() if "_proj" in name}


def test_the_finished_sparse_model_has_the_density(stages):
    for weight in linears(stages / "base/model").values():
        assert int(weight.count_nonzero()) == round(0.25 * weight.numel())


def test_the_dense_stage_starts_with_the_same_function(stages):
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(stages / model, local_files_only=True, dtype=torch.float32).eval()
        for model in ("dense/checkpoints/step-00000000/model", "base/model")
    )
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_the_dense_stage_trains_the_weights_that_were_pruned(stages):
    before = linears(stages / "base/model")
    for name, weight in linears(stages / "dense/model").items():
        pruned = before[name] == 0
        assert int(weight[pruned].count_nonzero()) > 0.99 * int(pruned.sum())


def test_zeros_stay_zeros_in_other_formats(stages, tmp_path):
    source = load_source(stages / "base/model")
    expected = sorted(int((weight == 0).sum()) for weight in linears(stages / "base/model").values())
    to_gguf.write(source, tmp_path / "model.gguf", quant="f16")
    stored = [tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors if is_linear(tensor.name)]
    assert sorted(int((np.asarray(data) == 0).sum()) for data in stored) == expected
    to_onnx.write(source, tmp_path / "onnx", quant="fp32")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    zeros = [int((onnx.numpy_helper.to_array(tensor) == 0).sum()) for tensor in graph.initializer]
    assert not [number for number in expected if zeros.count(number) < expected.count(number)]


def is_linear(name):
    return name.startswith("blk.") and "norm" not in name
