"""Hugging Face directories: certified in every width, packed as transformers itself reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lattices import random_lattice
from safetensors.torch import load_file, save_file

import edgewright
from edgewright.errors import BadInput, GateFailed, RecipeError
from edgewright.export import to_hf
from edgewright.export.hf_reader import read_weights, widths
from edgewright.export.lattice import SIDECAR, LatticeTensor, round_int, save_sidecar
from edgewright.export.source import load_source

# transformers compiles parts of packed BitNet, and torch's compiler imports something that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

WIDTHS = ["fp32", "fp16", "bf16", "int8", "nf4"]


def with_lattice(model: Path, target: Path, lattice: dict[str, LatticeTensor], dtype: torch.dtype) -> Path:
    """A copy whose weights are those of a lattice, which lies beside them."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    source = load_source(model)
    for name, each in lattice.items():
        value = torch.from_numpy(each.dequantize())
        tensors[name] = value.T.contiguous() if source.stores_transposed(name) else value
    save_file({name: value.to(dtype) for name, value in tensors.items()}, target / "model.safetensors")
    save_sidecar(target, lattice)
    return target


@pytest.fixture(scope="session")
def tensor_ternary(tiny_model, tmp_path_factory) -> Path:
    """A ternary Llama with one scale per tensor, exact in bf16; one layer is not ternary."""
    source = load_source(tiny_model("llama"))
    lattice = {
        name: random_lattice("ternary", *source.matrix(name).shape, None, seed, per_tensor=True)
        for seed, name in enumerate(source.linears)
        if name != source.head and name != "model.layers.1.mlp.down_proj.weight"
    }
    for each in lattice.values():
        each.scales[...] = np.float32(0.15625)
    return with_lattice(tiny_model("llama"), tmp_path_factory.mktemp("ternary") / "model", lattice, torch.bfloat16)


def values(path: Path, model: Path) -> dict[str, np.ndarray]:
    return dict(read_weights(path, load_source(model)))


@pytest.mark.parametrize("quant", WIDTHS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_width_is_certified(family, quant, tiny_model, tmp_path):
    model = tiny_model(family)
    artifact = edgewright.export(model, to="hf", quant=quant, out=tmp_path / "out", threads=1)
    assert artifact.gate == "passed"
    assert edgewright.verify(artifact.path, against=model, threads=1).gate == "passed"
    expected = {"fp32"} if quant == "fp32" else {quant, "fp32"} if quant in ("int8", "nf4") else {quant}
    assert widths(artifact.path) == expected
    assert {path.name for path in artifact.path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (artifact.path / SIDECAR).exists()
    wide = {"nf4": 96}.get(quant)  # columns that its CPU kernel cannot read
    source = load_source(model)
    kept = {item.tensor for item in artifact.fallbacks}
    assert kept == {name for name in source.linears if name != source.head and source.matrix(name).shape[1] == wide}


@pytest.mark.parametrize("quant", ["bf16", "int8", "nf4", "ternary"])
def test_transformers_loads_it_by_itself_and_says_the_same(quant, tensor_ternary, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    edgewright.export(tensor_ternary, to="hf", quant=quant, out=tmp_path / "out", threads=1)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
        logits = model(torch.tensor([[5, 60, 7, 90]])).logits.float()
    reference = AutoModelForCausalLM.from_pretrained(tensor_ternary, dtype=torch.float32)
    right = reference(torch.tensor([[5, 60, 7, 90]])).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), right.flatten()]))[0, 1] > 0.995
    assert AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)("def add")["input_ids"]
    if quant == "ternary":
        from transformers.integrations.bitnet import AutoBitLinear

        packed = [layer for layer in model.modules() if isinstance(layer, AutoBitLinear)]
        assert len(packed) == 13


@pytest.mark.parametrize("quant", ["fp32", "bf16", "int8", "nf4", "ternary"])
def test_a_ternary_model_is_bit_identical_in_every_width(quant, tensor_ternary, tmp_path):
    artifact = edgewright.export(tensor_ternary, to="hf", quant=quant, out=tmp_path / "out", threads=1)
    source = load_source(tensor_ternary)
    assert artifact.parity is not None and artifact.parity["lattice_identity"]
    back = values(artifact.path, tensor_ternary)
    for name, lattice in source.lattice.items():
        assert np.array_equal(back[name], lattice.dequantize()), name
    entry = json.loads((artifact.path / "edgewright.json").read_text())["artifacts"]["."]
    assert set(entry["lattice"].values()) == {"exact"}


def test_packed_bitnet_multiplies_by_the_lattices_own_scale(tensor_ternary, tmp_path):
    artifact = edgewright.export(tensor_ternary, to="hf", quant="ternary", out=tmp_path / "out", threads=1)
    assert [item.tensor for item in artifact.fallbacks] == ["model.layers.1.mlp.down_proj.weight"]
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "use_rms_norm": False,
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    }
    tensors = load_file(artifact.path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert tensors[f"{name}.weight"].dtype == torch.uint8
    assert tensors[f"{name}.weight"].shape == (96 // 4, 64)
    assert tensors[f"{name}.weight_scale"].tolist() == [0.15625]
    again = load_source(artifact.path)
    assert again.lattice.keys() == load_source(tensor_ternary).lattice.keys()


def test_more_scales_than_one_are_refused_by_packed_bitnet(ternary_model, tmp_path):
    with pytest.raises(BadInput, match=r"EW-530\]\n.*granularity: tensor\n.*\n.*gguf"):
        edgewright.export(ternary_model, to="hf", quant="ternary", out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "reason"), [("llama", "not trained to be ternary"), ("gpt2", "Conv1D")])
def test_nothing_to_pack_is_an_error(family, reason, tiny_model, tmp_path):
    with pytest.raises(BadInput, match=rf"EW-530\]\n.*\n.*{reason}"):
        edgewright.export(tiny_model(family), to="hf", quant="ternary", out=tmp_path / "out", threads=1)


def test_per_row_ternary_goes_out_as_nf4_and_int8_exactly(ternary_model, tmp_path):
    source = load_source(ternary_model)
    for quant in ("nf4", "int8"):
        artifact = edgewright.export(ternary_model, to="hf", quant=quant, out=tmp_path / quant, threads=1)
        back = values(artifact.path, ternary_model)
        assert all(np.array_equal(back[name], each.dequantize()) for name, each in source.lattice.items())
    wide = {item.tensor for item in artifact.fallbacks}  # int8 has one scale per row; these have one per 256
    assert wide == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}


def test_rounded_weights_keep_their_lattice_beside_them(tiny_model, tmp_path):
    """bf16 cannot hold 8-bit codes times a scale: the file says so, and the exact values travel along."""
    plain = load_source(tiny_model("llama"))
    lattice = {name: round_int(plain.matrix(name), bits=8, group=None) for name in plain.linears[:3]}
    model = with_lattice(tiny_model("llama"), tmp_path / "a", lattice, torch.float32)
    artifact = edgewright.export(model, to="hf", quant="bf16", out=tmp_path / "out", threads=1)
    entry = json.loads((artifact.path / "edgewright.json").read_text())["artifacts"]["."]
    assert set(entry["lattice"].values()) == {"rounded to bf16"}
    again = load_source(artifact.path)
    for name, each in lattice.items():
        assert np.array_equal(again.matrix(name), each.dequantize())
        half = torch.from_numpy(each.dequantize()).to(torch.bfloat16).float().numpy()
        assert np.array_equal(values(artifact.path, model)[name], half)
    # int8 holds them as they are, from either directory
    for path in (model, artifact.path):
        packed = edgewright.export(path, to="hf", quant="int8", out=tmp_path / f"{path.name}-8", threads=1)
        back = values(packed.path, model)
        assert all(np.array_equal(back[name], each.dequantize()) for name, each in lattice.items())


def test_precision_of_what_is_not_packed(tiny_model, tensor_ternary, tmp_path):
    model = tiny_model("llama")
    for asked, found in ((None, "fp32"), ("bf16", "bf16")):
        out = tmp_path / str(asked)
        edgewright.export(model, to="hf", quant="int8", embedding_quant=asked, out=out, threads=1)
        assert widths(out) == {"int8", found}
    edgewright.export(tensor_ternary, to="hf", quant="ternary", out=tmp_path / "own", threads=1)
    assert widths(tmp_path / "own") == {"ternary", "bf16"}  # as narrow as the checkpoint itself
    with pytest.raises(BadInput, match="EW-531"):
        edgewright.export(model, to="hf", quant="fp32", embedding_quant="bf16", out=tmp_path / "no", threads=1)
    with pytest.raises(RecipeError, match="EW-503"):
        edgewright.export(model, to="hf", quant="nf4", embedding_quant="nf4", out=tmp_path / "no", threads=1)


def test_weights_too_large_for_fp16_are_named(tiny_model, tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(BadInput, match=r"up_proj\.weight.*fp16 \[EW-508\]"):
        edgewright.export(tmp_path / "a", to="hf", quant="fp16", out=tmp_path / "out", threads=1)


def test_large_models_are_cut_into_files(tiny_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(to_hf, "SHARD_BYTES", 30_000)
    artifact = edgewright.export(tiny_model("llama"), to="hf", quant="fp32", out=tmp_path / "out", threads=1)
    shards = sorted(artifact.path.glob("model-*.safetensors"))
    assert len(shards) > 3
    again = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    whole = load_source(tiny_model("llama"))
    for name, value in again.state_dict().items():
        assert np.array_equal(value.numpy(), whole.tensor(name))


@pytest.mark.parametrize("quant", ["int8", "nf4", "ternary"])
def test_one_changed_byte_fails_the_gate(quant, tensor_ternary, tmp_path):
    path = edgewright.export(tensor_ternary, to="hf", quant=quant, out=tmp_path / "out", threads=1).path
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8).view(-1)[77] ^= 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    parity = edgewright.verify(path, against=tensor_ternary, threads=1)
    assert parity.gate == "failed"
    assert not parity.lattice_identity


def test_a_wrong_scale_convention_fails_the_gate(tensor_ternary, tmp_path, monkeypatch):
    """autobitlinear multiplies; an inverse scale would make other weights."""
    monkeypatch.setattr(to_hf, "BITNET_LAYOUT", to_hf.BitNet(inverse=True))
    with pytest.raises(GateFailed, match="EW-504"):
        edgewright.export(tensor_ternary, to="hf", quant="ternary", out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_generation_settings_travel_along(tiny_model, tmp_path):
    model = tmp_path / "a"
    shutil.copytree(tiny_model("llama"), model)
    (model / "generation_config.json").write_text('{"max_length": 77}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    path = edgewright.export(model, to="hf", quant="bf16", out=tmp_path / "out", threads=1).path
    assert json.loads((path / "generation_config.json").read_text())["max_length"] == 77
    assert (path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
