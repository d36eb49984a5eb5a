"""Every family as GGUF: the weights bit for bit, and the logits of torch in prefill, decoding and beyond windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from families import FAMILIES, WINDOW, save_family

from edgewright.errors import BadInput
from edgewright.export import to_gguf
from edgewright.export.gguf.file import open_gguf
from edgewright.export.gguf.reader import read_weights
from edgewright.export.parity import differences
from edgewright.export.runtimes import open_session
from edgewright.export.runtimes.llamacpp import HALF_GELU, LlamaCppSession
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.source import load_source
from edgewright.export.to_gguf import place, write

REFUSED = {"opt": "opt", "phi3-longrope": "original_max_position_embeddings"}
"""The families that llama.cpp has no graph for, or not for so short a text, and what the refusal must name."""

TEXT = [int(token) for token in np.random.default_rng(0).integers(2, 280, 100)]
"""Four windows long."""


def half_precision_gelu(session: TorchSession) -> None:
    """Let a model look its GELU up as llama.cpp does on a processor: half-precision values of half-precision inputs."""
    import torch

    class Table(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))

    assert session._model is not None
    for module in session._model.modules():
        for name in {"act_fn", "activation_fn", "act"} & set(module._modules):
            module._modules[name] = Table()


def read(session: Any, text: list[int], ways: tuple[int, ...]) -> np.ndarray:
    """The logits of a text, read in pieces of that many tokens."""
    session.rewind(0)
    rows = []
    for start, end in zip((0, *np.cumsum(ways)), np.cumsum(ways), strict=False):
        rows.append(session.append(text[start:end], "all"))
    return np.concatenate(rows)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_logits_are_those_of_torch(tiny_model, tmp_path, family):
    model = tiny_model(family)
    source = load_source(model)
    written = write(source, tmp_path / "m.gguf", quant="f32")
    assert written.fallbacks == []
    assert set(written.digests) == set(source.names)
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == []
    arch = open_gguf(tmp_path / "m.gguf").settings["general.architecture"]
    with open_session(model, threads=1) as reference, open_session(tmp_path / "m.gguf", threads=1) as candidate:
        assert candidate.capabilities.fp32_compute == (arch not in HALF_GELU)
        if arch in HALF_GELU:
            half_precision_gelu(reference)
        right = read(reference, TEXT, (100,))
        assert right.std() > 0.7  # not flat
        limit = 2e-3 if arch in HALF_GELU else 1e-4  # an input on the edge of two half-precision values may fall apart
        for ways in ((100,), (30, 70), (1,) * 100):
            assert np.abs(read(candidate, TEXT, ways) - right).max() <= limit, ways
        candidate.rewind(WINDOW + 5)
        again = candidate.append(TEXT[WINDOW + 5 :], "all")
        assert np.abs(again - right[WINDOW + 5 :]).max() <= limit


def test_a_window_that_no_text_reaches_needs_no_window(tmp_path):
    model = save_family("mistral-window", tmp_path / "model", {"sliding_window": 128})
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    assert open_gguf(tmp_path / "m.gguf").settings["general.architecture"] == "llama"


def test_windows_of_some_layers(tmp_path):
    changes = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    model = save_family("qwen2", tmp_path / "model", changes)
    source = load_source(model)
    written = write(source, tmp_path / "m.gguf", quant="f32")
    assert open_gguf(tmp_path / "m.gguf").settings["granite_swa.attention.sliding_window_pattern"] == (False, True)
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == []
    with open_session(model, threads=1) as reference, open_session(tmp_path / "m.gguf", threads=1) as candidate:
        assert np.abs(read(candidate, TEXT, (100,)) - read(reference, TEXT, (100,))).max() <= 1e-4


def test_a_cache_with_windows_can_be_cut_back_by_more_than_a_batch(tmp_path):
    model = save_family("mistral-window", tmp_path / "model", {"max_position_embeddings": 2048})
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    text = TEXT * 14
    with open_session(tmp_path / "m.gguf", threads=1) as session:
        right = session.append(text, "all")
        session.rewind(200)
        again = session.append(text[200:], "all")
    assert right is not None and again is not None
    assert np.abs(again - right[200:]).max() <= 1e-4


def test_short_and_long_factors(tmp_path):
    rope = {**FAMILIES["phi3-longrope"][1]["rope_parameters"], "original_max_position_embeddings": 256}
    changes = {"max_position_embeddings": 600, "original_max_position_embeddings": 256, "rope_parameters": rope}
    model = save_family("phi3-longrope", tmp_path / "model", changes)
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    with open_session(model, threads=1) as reference:
        for length, context in ((200, None), (400, 512)):
            text = (TEXT * 4)[:length]
            with LlamaCppSession(tmp_path / "m.gguf", threads=1, context_length=context) as candidate:
                assert candidate.context_length == (context or 256)
                assert np.abs(read(candidate, text, (length,)) - read(reference, text, (length,))).max() <= 2e-4


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "phi3", "phi3-window", "gpt2"])
def test_it_does_not_matter_how_many_rows_are_packed_at_a_time(family, quant, tiny_model, tmp_path, monkeypatch):
    source = load_source(tiny_model(family))
    at_once = write(source, tmp_path / "m.gguf", quant=quant)
    monkeypatch.setattr(to_gguf, "PART", 1000)
    in_parts = write(source, tmp_path / "parts.gguf", quant=quant)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()
    assert list(in_parts.digests.items()) == list(at_once.digests.items())
    assert differences(tmp_path / "parts.gguf", "gguf", source, digests=in_parts.digests) == []


def test_lattices_are_packed_a_few_rows_at_a_time_as_well(ternary_model, tmp_path, monkeypatch):
    source = load_source(ternary_model)
    at_once = write(source, tmp_path / "m.gguf", quant="tq2_0")
    monkeypatch.setattr(to_gguf, "PART", 1000)
    in_parts = write(source, tmp_path / "parts.gguf", quant="tq2_0")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()
    assert (in_parts.digests, in_parts.lattice) == (at_once.digests, at_once.lattice) and in_parts.lattice


def test_a_tied_head_is_written_where_the_graph_wants_one(tmp_path):
    model = save_family("phi", tmp_path / "model", {"tie_word_embeddings": True})
    source = load_source(model)
    written = write(source, tmp_path / "m.gguf", quant="f32")
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == []
    assert [name for name, _ in read_weights(tmp_path / "m.gguf", source)].count(source.embedding) == 2
    with open_session(model, threads=1) as reference, open_session(tmp_path / "m.gguf", threads=1) as candidate:
        half_precision_gelu(reference)
        assert np.abs(read(candidate, TEXT, (100,)) - read(reference, TEXT, (100,))).max() <= 2e-3


def test_norms_stored_plus_one_are_proven(tiny_model, tmp_path):
    source = load_source(tiny_model("gemma"))
    written = write(source, tmp_path / "m.gguf", quant="f32")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    norm = source.tensor("model.norm.weight") + np.float32(1)
    at = data.index(norm.tobytes())
    data[at : at + 4] = np.nextafter(norm[:1], np.float32(2)).tobytes()  # the smallest change there is
    (tmp_path / "m.gguf").write_bytes(data)
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == [
        f"model.norm.weight differs in 1 of {len(norm)} values"
    ]


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_a_graph_are_refused_by_name(tiny_model, tmp_path, family):
    with pytest.raises(BadInput, match="EW-505") as error:
        write(load_source(tiny_model(family)), tmp_path / "m.gguf", quant="f32")
    assert REFUSED[family] in str(error.value)
    assert "onnx" in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("bitnet", {"hidden_act": "relu2"}, "hidden_act"),
        ("bitnet", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("bitnet", {"attention_bias": True}, "k_proj.bias"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            "llama-yarn",
            {"rope_parameters": {**FAMILIES["llama-yarn"][1]["rope_parameters"], "beta_slow": 2.0}},
            "beta_slow",
        ),
        ("qwen2", {"head_dim": 32}, "head_dim"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, "sliding_window"),
        (
            "qwen3",
            {"rope_parameters": FAMILIES["llama-llama3"][1]["rope_parameters"]},
            "llama3",
        ),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("gemma", {"tie_word_embeddings": False}, "lm_head.weight"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_a_graph_does_not_compute_is_refused_by_name(tmp_path, family, changes, named):
    source = load_source(save_family(family, tmp_path / "model", changes))
    with pytest.raises(BadInput, match="EW-505") as error:
        write(source, tmp_path / "m.gguf", quant="f32")
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3", {"final_logit_softcapping": 2.0}),
        ("gemma3", {"sliding_window": 4096}),
        ("gemma2", {"sliding_window": 4096}),
        ("gpt2", {"n_inner": None}),
        ("llama-yarn", {"rope_parameters": {**FAMILIES["llama-yarn"][1]["rope_parameters"], "attention_factor": 1.3}}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("qwen3", {"num_key_value_heads": 4, "rope_parameters": FAMILIES["llama-yarn"][1]["rope_parameters"]}),
    ],
    ids=["soft-cap", "no-window-3", "no-window-2", "usual-inner", "yarn-factor", "partial-rotary", "qwen3-yarn"],
)
def test_settings_reach_the_graph(tmp_path, family, changes):
    model = save_family(family, tmp_path / "model", changes)
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    with open_session(model, threads=1) as reference, open_session(tmp_path / "m.gguf", threads=1) as candidate:
        if not candidate.capabilities.fp32_compute:
            half_precision_gelu(reference)
        assert np.abs(read(candidate, TEXT, (100,)) - read(reference, TEXT, (100,))).max() <= 2e-3


def test_every_tensor_of_a_graph_has_the_name_that_the_package_knows(tiny_model: Callable[[str], Path]) -> None:
    names = {"mistral-window": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2, "phi3": gguf.MODEL_ARCH.PHI3}
    for family, arch in names.items():
        source = load_source(tiny_model(family))
        table = gguf.get_tensor_name_map(arch, source.config["num_hidden_layers"])
        for tensor in place(source, "f32")[0]:
            assert table.get_name(tensor.source, try_suffixes=(".weight", ".bias")) == tensor.name
