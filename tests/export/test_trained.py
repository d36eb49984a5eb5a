"""What every rounding rule trains is certified in every format that holds it: nothing stored wider, nothing lost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_byte_tokenizer

import edgewright
from edgewright.compress.choice import LayerChoice
from edgewright.compress.integer import IntegerConfig
from edgewright.compress.ternary import TernaryConfig
from edgewright.export.lattice import LatticeTensor, save_sidecar
from edgewright.export.source import load_source
from edgewright.student import PresetStudentConfig, build_preset, load_model

ONE_OF_EACH: dict[str, dict[str, LayerChoice]] = {
    "three levels": {
        "q_proj": TernaryConfig(),
        "k_proj": TernaryConfig(quantizer="median", granularity="tensor"),
        "v_proj": TernaryConfig(quantizer="twn"),
        "o_proj": TernaryConfig(quantizer="seq_ternary", granularity="group"),
        "gate_proj": TernaryConfig(quantizer="tequila", dead_bias=0.05),
        "up_proj": TernaryConfig(quantizer="sherry", granularity="group"),
        "down_proj": TernaryConfig(quantizer="tequila", dead_bias=0.05),
    },
    "four bits": {
        "q_proj": TernaryConfig(quantizer="seq_2bit"),
        "k_proj": TernaryConfig(quantizer="seq_2bit", granularity="group", group=64),
        "v_proj": IntegerConfig(),
        "o_proj": IntegerConfig(format="matmulnbits"),
        "gate_proj": IntegerConfig(),
        "up_proj": IntegerConfig(),
        "down_proj": IntegerConfig(),
    },
    "finer groups": {
        "q_proj": TernaryConfig(granularity="group", group=128),
        "k_proj": TernaryConfig(quantizer="sherry", granularity="group", group=64),
        "v_proj": TernaryConfig(quantizer="seq_ternary", granularity="group", group=64),
        "o_proj": TernaryConfig(quantizer="twn", granularity="group", group=64),
        "gate_proj": TernaryConfig(granularity="tensor"),
        "up_proj": TernaryConfig(),
        "down_proj": TernaryConfig(quantizer="median", granularity="group", group=64),
    },
    "eight bits": {
        "q_proj": IntegerConfig(format="q8_0"),
        "k_proj": IntegerConfig(format="q8_0"),
        "v_proj": IntegerConfig(format="matmulnbits", bits=8, block=64),
        "o_proj": IntegerConfig(format="matmulnbits", bits=8, block=128),
        "gate_proj": IntegerConfig(format="matmulnbits", block=64),
        "up_proj": IntegerConfig(format="matmulnbits", block=128),
        "down_proj": IntegerConfig(format="q8_0"),
    },
    "sub norm": {
        layer: TernaryConfig(quantizer="seq_ternary")
        for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    },
}
"""Models whose layers are trained by different rules."""

PACKAGES = {"gguf": "llama_cpp", "genai": "onnxruntime_genai", "openvino": "openvino", "onnx": "onnxruntime"}
CASES = [
    ("three levels", "gguf", "tq2_0"),
    ("three levels", "genai", "ternary"),
    ("four bits", "openvino", "int4"),
    ("finer groups", "gguf", "q2_0"),
    ("sub norm", "gguf", "tq1_0"),
    ("eight bits", "onnx", "int8"),
]
SLOW = [
    ("three levels", "gguf", "tq1_0"),
    ("three levels", "onnx", "ternary"),
    ("three levels", "openvino", "ternary"),
    ("four bits", "gguf", "q4_0"),
    ("four bits", "onnx", "int4"),
    ("four bits", "genai", "int4"),
    ("finer groups", "genai", "ternary"),
    ("finer groups", "onnx", "ternary"),
    ("finer groups", "openvino", "ternary"),
    ("eight bits", "openvino", "int8"),
    ("eight bits", "genai", "int8"),
    ("sub norm", "openvino", "ternary"),
]

Trained = Callable[[str], Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained(kind)` is the finished model of a few steps by the methods of `ONE_OF_EACH`. Made once."""
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("by_rule") / kind.replace(" ", "_")
            train(kind, made[kind])
        return made[kind]

    return model


def train(kind: str, directory: Path) -> None:
    directory.mkdir()
    student = PresetStudentConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sub_norm=kind == "sub norm",
    )
    size = save_byte_tokenizer(directory, bos=False)
    model = build_preset(student, vocab_size=size, max_position_embeddings=512, bos=0, eos=0, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)
            elif "norm" in name:
                parameter.uniform_(0.8, 1.2)
    methods = [
        config.model_copy(update={"layers": (layer,)}).build()  # type: ignore[attr-defined]
        for layer, config in ONE_OF_EACH[kind].items()
    ]
    for method in methods:
        method.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for seed in range(4):
        tokens = torch.randint(size, (2, 32), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lattice: dict[str, LatticeTensor] = {}
    with torch.no_grad():
        right = model(input_ids=tokens).logits
        for method in methods:
            model, found = method.finish(model)
            lattice |= found
        torch.testing.assert_close(model(input_ids=tokens).logits, right)
        model.save_pretrained(directory)
        save_sidecar(directory, lattice)
        torch.testing.assert_close(load_model(directory)(input_ids=tokens).logits, right)  # a plain model of its kind


@pytest.mark.parametrize(
    ("kind", "to", "quant"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_what_was_trained_is_certified_whole(kind: str, to: str, quant: str, trained: Trained, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[to]) is None:
        pytest.skip(f"{PACKAGES[to]} is not installed")
    model = trained(kind)
    artifact = edgewright.export(model, to=to, quant=quant, out=tmp_path / "out", threads=1)
    assert artifact.gate == "passed" and artifact.parity["lattice_identity"] is True
    assert artifact.fallbacks == []
    assert len(load_source(model).lattice) == len(ONE_OF_EACH[kind])


def test_biases_of_dead_weights_are_part_of_the_plain_model(trained: Trained) -> None:
    model = load_model(trained("three levels"))
    assert (model.config.mlp_bias, model.config.attention_bias) == (True, False)
    layer = model.model.layers[0]
    assert layer.mlp.gate_proj.bias.abs().min() > 0 and layer.mlp.down_proj.bias.abs().min() > 0
    assert torch.count_nonzero(layer.mlp.up_proj.bias) == 0, "it needs one, being of the same kind"
    assert layer.self_attn.q_proj.bias is None
