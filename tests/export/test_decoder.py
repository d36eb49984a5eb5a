"""What a checkpoint is, as data: rotary positions as transformers has them, and settings that are not known."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, WINDOW, save_family

from edgewright.export.architecture import open_config, read_config
from edgewright.export.onnx import decoder, decoder_graph
from edgewright.export.onnx.decoder import ACTIVATIONS, describe
from edgewright.export.onnx.files import save_graph
from edgewright.export.onnx.rotary import KINDS, rotary
from edgewright.export.onnx.written_graph import _ACTIVATIONS
from edgewright.export.source import Source, load_source

Models = Callable[[str], Path]

SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
PART = {"partial_rotary_factor": 0.5}
ROTARIES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": None},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    {"rope_type": "llama3", "rope_theta": 50.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, **SCALED},
    {"rope_type": "yarn", "rope_theta": 10000.0, **SCALED},
    {"rope_type": "yarn", "rope_theta": 500.0, "beta_fast": 16, "beta_slow": 2, "truncate": False, **SCALED},
    {"rope_type": "yarn", "rope_theta": 500.0, "attention_factor": 1.3, **SCALED},
    {"rope_type": "yarn", "rope_theta": 500.0, "mscale": 1.0, "mscale_all_dim": 0.5, **SCALED},
]


@pytest.mark.parametrize("parameters", ROTARIES, ids=lambda parameters: str(parameters["rope_type"]))
@pytest.mark.parametrize("head_size", [16, 64, 128])
def test_rotary_positions_are_those_of_transformers(parameters: dict[str, Any], head_size: int) -> None:
    """Llama's, which heeds no `partial_rotary_factor`."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4, max_position_embeddings=128, rope_parameters=dict(parameters)
    )
    kind = parameters["rope_type"]
    if kind == "default":
        inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, None)
    found = rotary(parameters, head_size, partial=False)
    assert found is not None
    assert found.size == 2 * len(inverse)
    assert found.inverse.dtype == np.float32
    np.testing.assert_allclose(found.inverse, inverse.numpy(), rtol=3e-7)
    assert found.factor == pytest.approx(factor, rel=1e-12)


def test_a_part_of_a_head_turns_where_the_family_heeds_it() -> None:
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    config = PhiConfig(hidden_size=256, num_attention_heads=4, rope_parameters=dict(parameters))
    found = rotary(parameters, 64, partial=True)
    assert found is not None
    np.testing.assert_allclose(
        found.inverse, PhiRotaryEmbedding.compute_default_rope_parameters(config)[0].numpy(), rtol=3e-7
    )
    for heeded in (True, False):
        assert rotary({**parameters, "rope_type": "linear", "factor": 2.0}, 64, partial=heeded) is None


def test_every_kind_is_compared() -> None:
    assert {parameters["rope_type"] for parameters in ROTARIES} == set(KINDS)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "of tomorrow"])
def test_rotations_that_depend_on_the_text_are_not_written(kind: str) -> None:
    assert rotary({"rope_type": kind, "rope_theta": 1e4, **SCALED}, 64, partial=False) is None
    assert rotary({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, 64, partial=False) is None, "no length"


def test_activations_are_those_that_are_written() -> None:
    assert set(_ACTIVATIONS) == ACTIVATIONS


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "mish"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("phi", {"qk_layernorm": True}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"attn_logit_softcapping": 3.0}),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}),
        ("llama", {"is_causal": False}),
        ("llama", {"sliding_window": 24}),
        ("llama", {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("phi3-window", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("phi", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, **PART}}),
        ("gpt2", {}),
    ],
)
def test_what_is_not_known_is_traced(family: str, changes: dict[str, Any], tiny_model: Models, tmp_path: Path) -> None:
    import dataclasses

    shutil.copytree(tiny_model(family), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert describe(dataclasses.replace(load_source(tiny_model(family)), directory=tmp_path / "model")) is None


def test_a_setting_of_tomorrow_is_traced(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the family's class has, and that is neither honoured nor known not to matter, whatever its value."""
    source = load_source(tiny_model("llama"))
    assert describe(source) is not None
    monkeypatch.setattr(decoder, "_HONOURED", decoder._HONOURED - {"mlp_bias"})
    assert describe(source) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
        ("llama", {"num_key_value_heads": 4, "hidden_act": "relu", "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **PART}, "hidden_act": "swish"}),
        ("qwen2", {"head_dim": 32}),
        ("phi", {"head_dim": 32, "tie_word_embeddings": True}),
        ("smollm3", {"head_dim": 32, "no_rope_layers": [1, 0, 0, 1, 0]}),
        ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
        ("gemma", {"hidden_size": 72}),
        ("gemma3", {"final_logit_softcapping": 4.0}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **PART}, "head_dim": 32}),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1], "attention_bias": True}),
    ],
)
def test_settings_of_a_family_are_honoured(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from test_decoder_graph import LENGTH, Graph

    model = save_family(family, tmp_path / "model", changes)
    assert describe(load_source(model)) is not None
    graph = Graph(model, tmp_path / "graph")
    assert graph.worst([40, *[1] * (LENGTH - 40)]) < 1e-5


ALTERNATING = {"layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in FAMILIES), ("mistral-window", ALTERNATING)]
)
def test_settings_are_those_of_transformers(
    family: str, changes: dict[str, Any], tiny_model: Models, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    config = json.loads((tiny_model(family) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    found, expected = open_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert type(found) is type(expected)
    assert {**found.to_dict(), "_name_or_path": str(tmp_path)} == expected.to_dict()
    assert read_config(tmp_path)["model_type"] == expected.model_type


def test_mistral_with_kinds_of_layers_is_ministral(tiny_model: Models, tmp_path: Path) -> None:
    """As transformers opens it: a window in every second layer alone."""
    from test_decoder_graph import LENGTH, Graph

    shutil.copytree(tiny_model("mistral-window"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ALTERNATING))
    found = describe(load_source(tmp_path / "model"))
    assert found is not None and [layer.window for layer in found.layers] == [None, WINDOW]
    assert Graph(tmp_path / "model", tmp_path / "graph").worst([40, *[1] * (LENGTH - 40)]) < 1e-5


def test_few_weights_are_in_memory(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None while the graph is written down; none twice when it is saved, and no more than two ahead."""
    read: list[str] = []
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    tensor = Source.tensor

    def watched(self: Source, name: str) -> np.ndarray:
        nonlocal most
        value = tensor(self, name)
        read.append(name)
        alive.append(weakref.ref(value))
        most = max(most, sum(each() is not None for each in alive))
        return value

    source = load_source(tiny_model("llama"))
    monkeypatch.setattr(Source, "tensor", watched)
    model = decoder_graph.build(source)
    assert read == []
    save_graph(model, tmp_path)
    assert sorted(read) == source.names
    assert most <= 4  # one is being written, two wait, one is being read


def test_the_table_of_families_is_the_one_of_the_tests() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "phi", "phi3"} <= set(decoder.FAMILIES)
    named = {family.split("-")[0].replace("gemma3", "gemma3_text") for family in FAMILIES}
    assert named >= set(decoder.FAMILIES) - {"ministral"}  # Mistral with kinds of layers, compared above
