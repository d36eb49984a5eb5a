"""What a decoder of the known families computes, as data: enough to write its graph down (`written_graph.py`).

`describe` reads it from config.json, as transformers understands that. A setting that neither is honoured here nor is
known not to matter makes it give up, and the model is traced instead (`decoder_graph.build`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgewright.export.architecture import open_config
from edgewright.export.onnx.rotary import Rotary, rotary
from edgewright.export.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where the layers of a family differ; names are those of modules, in a layer where nothing else is said."""

    norm: str = "RMSNormalization"
    """ONNX's name of its norms."""
    epsilon: str = "rms_norm_eps"
    """The setting that its norms add to the variance."""
    one_more: bool = False
    """Whether its norms multiply by 1 + weight."""
    around_attention: tuple[str, str | None] = ("input_layernorm", None)
    """The norms before and behind attention."""
    around_mlp: tuple[str, str | None] | None = ("post_attention_layernorm", None)
    """The same of the feed-forward part; None where that reads what attention reads, and both are added at once."""
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    gated: bool = True
    """Whether the feed-forward part multiplies two halves, of which the first is activated."""
    final_norm: str = "model.norm"
    """Of the model."""
    activation: str = "hidden_act"
    """The setting that names the activation."""
    scales_embedding: bool = False
    """Whether the embedding is multiplied by the root of the hidden size."""
    query_scale: str | None = None
    """The setting whose root divides the scores of attention; the head size where there is none."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` is heeded where the rotation is of the kind `default`."""
    caps_scores: bool = False
    """Whether `attn_logit_softcapping` is heeded; by Gemma 3 it is where attention is computed in single steps."""


_GEMMA = Family(one_more=True, scales_embedding=True)
_GEMMA3 = Family(
    one_more=True,
    scales_embedding=True,
    around_attention=("input_layernorm", "post_attention_layernorm"),
    around_mlp=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    activation="hidden_activation",
    query_scale="query_pre_attn_scalar",
)
_GEMMA2 = replace(_GEMMA3, caps_scores=True)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "ministral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi": Family(
        norm="LayerNormalization",
        epsilon="layer_norm_eps",
        around_mlp=None,
        attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        gated=False,
        final_norm="model.final_layernorm",
        partial_rotary=True,
    ),
    "phi3": Family(attention_in=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",), partial_rotary=True),
}
"""The families whose graph is written, by `model_type`. Biases, and norms of queries and keys, are where the checkpoint
has them."""

ACTIVATIONS = frozenset({"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"})
"""The activations that `written_graph.py` writes."""

_HONOURED = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rope_parameters",
        "hidden_act",
        "hidden_activation",
        "rms_norm_eps",
        "layer_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "layer_types",
        "no_rope_layers",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)
_IMMATERIAL = frozenset(
    {
        "attention_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_sliding_window",
        "max_window_layers",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
    }
)
"""Settings of training, or whose effect stands in another setting (`layer_types`, `no_rope_layers`), or that only a
kind of rotary positions reads that is not written."""
_OFF = frozenset({"qk_layernorm", "use_bidirectional_attention"})
"""Settings that are honoured where they are switched off."""
_UNDECLARED = frozenset({"use_bidirectional_attention", "sliding_window", "layer_types", "attention_chunk_size"})
"""Settings that models, masks and caches of transformers read from config.json also where the class of the family does
not declare them; then they are honoured where they are switched off. So is `is_causal` where it is on."""

_WINDOWS = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What may differ from layer to layer."""

    window: int | None
    """Tokens that attention sees, itself among them; None for all."""
    rotary: Rotary | None
    """None where positions are not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder whose graph can be written."""

    family: Family
    hidden_size: int
    heads: int
    key_heads: int
    """Heads of keys and values."""
    head_size: int
    vocabulary: int
    context: int
    """Longest text."""
    layers: tuple[Layer, ...]
    epsilon: float
    activation: str
    scale: float
    """What the scores of attention are multiplied by."""
    softcap: float | None
    """Largest score of attention."""
    logit_softcap: float | None


def describe(source: Source) -> Decoder | None:
    """The decoder that a checkpoint is; None where something in its configuration is not known here."""
    config = open_config(source.directory)
    family = FAMILIES.get(config.model_type)
    if family is None:
        return None
    settings = _settings(config, family)
    if settings is None or settings[family.activation] not in ACTIVATIONS:
        return None
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    size = settings.get("head_dim") or hidden // heads
    layers = _layers(settings, size, partial=family.partial_rotary)
    if layers is None:
        return None
    return Decoder(
        family=family,
        hidden_size=hidden,
        heads=heads,
        key_heads=settings.get("num_key_value_heads") or heads,
        head_size=size,
        vocabulary=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        layers=layers,
        epsilon=settings[family.epsilon],
        activation=settings[family.activation],
        scale=float(settings[family.query_scale] if family.query_scale else size) ** -0.5,
        softcap=settings.get("attn_logit_softcapping"),
        logit_softcap=settings.get("final_logit_softcapping"),
    )


def _settings(config: PretrainedConfig, family: Family) -> dict[str, Any] | None:
    """What counts of a configuration; None where something that counts is not honoured.

    That is what the class of the family declares, and the size of heads, which every model reads.
    """
    declared, given = set(type(config).__dataclass_fields__), config.to_dict()
    settings = {name: value for name, value in given.items() if name in {*declared, "head_dim"}}
    unknown = settings.keys() - _HONOURED - _IMMATERIAL - _OFF - _base_settings()
    off = _OFF if family.caps_scores else {*_OFF, "attn_logit_softcapping"}
    if unknown or any(settings.get(name) for name in off):
        return None
    if config.is_heterogeneous or not given.get("is_causal", True):
        return None
    return None if any(given.get(name) for name in _UNDECLARED - declared) else settings


def _base_settings() -> set[str]:
    """The settings of every configuration, none of which changes what a decoder computes."""
    from transformers import PreTrainedConfig

    return set(PreTrainedConfig.__dataclass_fields__)


def _layers(settings: Mapping[str, Any], head_size: int, *, partial: bool) -> tuple[Layer, ...] | None:
    """Window and rotation of each layer; None where one of them is of a kind that is not known here."""
    count, window = settings["num_hidden_layers"], settings.get("sliding_window")
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = settings.get("layer_types") or [usual] * count
    if len(kinds) != count or not _WINDOWS.keys() >= set(kinds) or (window is None and "sliding_attention" in kinds):
        return None
    rotaries = _rotaries(settings["rope_parameters"], set(kinds), head_size, partial=partial)
    turning = settings.get("no_rope_layers") or [True] * count
    if None in rotaries.values() or len(turning) < count:
        return None
    return tuple(
        Layer(window=window if _WINDOWS[kind] else None, rotary=rotaries[kind] if turns else None)
        for kind, turns in zip(kinds, turning[:count], strict=True)
    )


def _rotaries(
    parameters: Mapping[str, Any], kinds: set[str], head_size: int, *, partial: bool
) -> dict[str, Rotary | None]:
    """The rotation of each kind of layer: of its own, or one for all."""
    if kinds <= parameters.keys():
        return {kind: rotary(parameters[kind], head_size, partial=partial) for kind in kinds}
    return dict.fromkeys(kinds, rotary(parameters, head_size, partial=partial))


def has_windows(source: Source) -> bool:
    """Whether layers see only the last tokens. Of a family that is not known here the settings alone tell."""
    decoder = describe(source)
    if decoder is not None:
        return any(layer.window is not None for layer in decoder.layers)
    kinds = source.config.get("layer_types")
    return bool(set(kinds) - {"full_attention"} if kinds else source.config.get("sliding_window"))
