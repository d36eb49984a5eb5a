"""The first guard by itself: what a manifest may excuse, and weights that never arrive."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgewright.export import to_gguf, to_hf
from edgewright.export.artifact import digest
from edgewright.export.gate.identity import differences
from edgewright.export.gate.weights_only import WeightsOnly
from edgewright.export.gguf import reader
from edgewright.export.source import Source, load_source

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def written(ternary_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    """The ternary model in float32, and its file."""
    source, path = load_source(ternary_model), tmp_path_factory.mktemp("identity") / "m.gguf"
    to_gguf.write(source, path, quant="f32")
    return source, path


def reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, np.ndarray], np.ndarray | None]) -> None:
    """The reader finds other weights, or none where `change` gives None."""
    right = reader.read_weights

    def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
        for name, values in right(path, source):
            found = change(name, values)
            if found is not None:
                yield name, found

    monkeypatch.setattr(reader, "read_weights", read_weights)


# ---------------------------------------------------------------- what a manifest may excuse


@pytest.mark.parametrize("kept", [{}, {UP: "rounded"}, {UP: ""}])
def test_a_claim_without_a_digest_excuses_nothing(written, monkeypatch, kept):
    source, path = written
    reading(monkeypatch, lambda name, values: values * np.float32(1.01) if name == UP else values)
    (reason,) = differences(path, "gguf", source, kept=kept)
    assert reason.startswith(f"{UP} differs in")


@pytest.mark.parametrize("kept", [None, {}, {UP: "scales rounded"}])
def test_scales_may_be_rounded_where_nobody_promises_more(written, monkeypatch, kept):
    source, path = written
    fine = replace(source.lattice[UP], scales=source.lattice[UP].scales * np.float32(1.0001))
    finer = replace(source, lattice={**source.lattice, UP: fine})
    rounded = fine.scales_rounded(np.float16).dequantize()
    reading(monkeypatch, lambda name, values: rounded if name == UP else values)
    assert differences(path, "gguf", finer, kept=kept) == []
    assert differences(path, "gguf", finer, kept={UP: "exact"}) != []


def test_a_digest_vouches_for_a_rounding_and_not_for_another_weight(written, monkeypatch):
    source, path = written
    right = source.lattice[UP].dequantize()
    for values, accepted in ((right * np.float32(1.01), True), (-right, False)):
        with monkeypatch.context() as patch:
            reading(patch, lambda name, found, values=values: values if name == UP else found)
            found = differences(path, "gguf", source, kept={UP: "rounded"}, digests={UP: digest(values)})
        assert (found == []) == accepted


# ---------------------------------------------------------------- weights that never arrive


def test_a_reader_that_finds_nothing_proves_nothing(written, monkeypatch):
    source, path = written
    reading(monkeypatch, lambda name, values: None)
    assert differences(path, "gguf", source) == [f"{name} is not in the file" for name in source.names]


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.embed_tokens.weight", UP])
def test_every_weight_must_arrive(written, monkeypatch, lost):
    source, path = written
    reading(monkeypatch, lambda name, values: None if name == lost else values)
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    weights = WeightsOnly(model, source)
    assert differences(path, "gguf", source, each=weights) == [f"{lost} is not in the file"]
    assert not weights.complete


def test_a_tied_head_arrives_with_the_embedding(written):
    source, path = written
    assert source.tied
    weights = WeightsOnly(AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32), source)
    assert differences(path, "gguf", source, each=weights) == []
    assert weights.complete and not weights.changed


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "phi", "phi3", "gemma2"])
def test_biases_norms_and_positions_are_read(tiny_model, tmp_path, family):
    """Whole families: nothing that their files hold is out of the readers' sight."""
    source = load_source(tiny_model(family))
    to_gguf.write(source, tmp_path / "m.gguf", quant="f32")
    to_hf.write(source, tmp_path / "hf", quant="fp32")
    for path, to in ((tmp_path / "m.gguf", "gguf"), (tmp_path / "hf", "hf")):
        assert differences(path, to, source) == []


def test_a_bias_that_the_file_lost_is_missed(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    source: Any = load_source(tiny_model("gpt2"))
    shutil.copytree(source.directory, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["transformer.h.0.attn.c_attn.bias"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert differences(tmp_path / "hf", "hf", source) == ["transformer.h.0.attn.c_attn.bias is not in the file"]
