"""What llama.cpp calls the weights and settings of every family, and what it computes for it: one row per family.

Everything that config.json can say and that changes what the
model computes is either written into the file or checked against what llama.cpp's graph does: nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgewright.errors import BadInput
from edgewright.export.plain_only import refuse_factors
from edgewright.export.source import Source

Config = Mapping[str, Any]
Setting = bool | int | float | str | list[bool]
"""A value of a GGUF file's metadata; an int is written as uint32, a float as float32."""

NO_SINK = -1e30
"""An attention sink that takes no weight in any softmax."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What llama.cpp makes of a family.

    Weights are named without their ends `.weight` and `.bias`, which stay the same.
    """

    arch: str
    """llama.cpp's name of the graph."""
    layer: Mapping[str, tuple[str, ...]]
    """The weights of a layer: the checkpoint's name behind the layer's number, and the file's. Where there are several
    in the file, they share out the rows of the checkpoint's in this order."""
    whole: Mapping[str, tuple[str, ...]]
    """The weights outside layers, likewise."""
    biases: frozenset[str]
    """The names in the file of all that may have a bias."""
    rules: Mapping[str, tuple[object, ...]]
    """Settings of config.json that the graph fixes, with the values that it computes; None is what is left out."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """The kinds of rotary positions that it computes; empty when positions are embedded."""
    layers: str = "model.layers."
    """What the checkpoint's names of layers begin with, before the number."""
    paired: bool = False
    """Rotary positions turn neighbours, where checkpoints turn the two halves of a head: rows must be reordered."""
    norm_offset: float = 0.0
    """What is added to the weights of norms: Gemma's multiply by 1 + weight, llama.cpp's by the weight."""
    eps: str = "attention.layer_norm_rms_epsilon"
    """The key of the epsilon of norms."""
    windowed: bool = False
    """It computes sliding windows, in the layers that the file names."""
    free_heads: bool = True
    """Heads may be of another size than hidden / heads."""
    partial_rotary: bool = False
    """Rotary positions may turn a part of a head."""
    tied_output: bool = True
    """The head may be left out where it is the embedding."""
    settings: Callable[[Source], dict[str, Setting]] = lambda source: {}
    """Further metadata, by its key behind the name of the graph."""
    check: Callable[[Source], None] = lambda source: None
    """Raises EW-505 for what rules cannot say."""
    constants: Callable[[Source], dict[str, list[float]]] = lambda source: {}
    """Vectors that the graph needs and that no checkpoint has, by their names in the file."""


def refuse(source: Source, what: str, expected: object, found: object) -> BadInput:
    """EW-505: the target cannot hold this model."""
    return BadInput(
        "EW-505",
        f"llama.cpp cannot hold this model: {what}",
        where=(source.directory / "config.json").absolute(),
        expected=expected,
        found=found,
        fix="export to another target (onnx, openvino, hf), which run what transformers runs",
    )


def head_size(config: Config) -> int:
    """Columns of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def head_counts(config: Config) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    queries = int(config["num_attention_heads"])
    return queries, int(config.get("num_key_value_heads") or queries)


def inner_size(config: Config) -> int:
    """Columns between the two halves of the feed-forward network; GPT-2 leaves its usual size out."""
    found = config["n_inner"] if "n_inner" in config else config["intermediate_size"]
    return int(found or 4 * config["hidden_size"])


def windows(config: Config) -> list[bool]:
    """For each layer, whether it sees only the last `sliding_window` tokens."""
    count = int(config["num_hidden_layers"])
    if config.get("sliding_window") is None:
        return [False] * count
    kinds = config.get("layer_types") or ["sliding_attention"] * count
    return [kind == "sliding_attention" for kind in kinds]


def needs_windows(config: Config) -> bool:
    """Whether a text can be longer than the window that some layer has."""
    return any(windows(config)) and config["sliding_window"] < config["max_position_embeddings"]


def family_of(source: Source) -> Family:
    """The row of a checkpoint, after checking that llama.cpp computes what config.json says.

    Raises:
        BadInput: EW-505 names what it does not compute; EW-723, factored layers.
    """
    refuse_factors(source, "gguf")
    config = source.config
    kind = config.get("model_type")
    family = FAMILIES.get(kind)
    if family is None:
        raise refuse(source, f"it has no graph for the family {kind!r}", ", ".join(map(str, FAMILIES)), kind)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise refuse(source, f"{key!r} in config.json", "a positive number", config.get(key))
    other = set(config.get("layer_types") or []) - {"full_attention", "sliding_attention"}
    if other:
        raise refuse(source, "'layer_types' in config.json", "full_attention or sliding_attention", sorted(other))
    if needs_windows(config) and not family.windowed:
        if kind not in WINDOWED:
            raise refuse(source, "'sliding_window' in config.json", "none", config["sliding_window"])
        family = WINDOWED[kind]
    for key, legal in family.rules.items():
        if config.get(key) not in legal:
            raise refuse(source, f"{key!r} in config.json", " or ".join(map(repr, legal)), config.get(key))
    if not family.free_heads and head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise refuse(source, "'head_dim' in config.json", "hidden_size / num_attention_heads", head_size(config))
    family.check(source)
    return family


# ---------------------------------------------------------------- names


def _same(**names: str) -> dict[str, tuple[str, ...]]:
    """One weight for one; a double underscore stands for the dot in the checkpoint's name."""
    return {ours.replace("__", "."): (theirs,) for ours, theirs in names.items()}


_ATTENTION = _same(
    input_layernorm="attn_norm",
    self_attn__q_proj="attn_q",
    self_attn__k_proj="attn_k",
    self_attn__v_proj="attn_v",
    self_attn__o_proj="attn_output",
)
_GATED = _same(mlp__gate_proj="ffn_gate", mlp__up_proj="ffn_up", mlp__down_proj="ffn_down")
_LLAMA_LAYER = {**_ATTENTION, **_GATED, **_same(post_attention_layernorm="ffn_norm")}
_HEAD_NORMS = _same(self_attn__q_norm="attn_q_norm", self_attn__k_norm="attn_k_norm")
_SANDWICH = _same(
    post_attention_layernorm="post_attention_norm",
    pre_feedforward_layernorm="ffn_norm",
    post_feedforward_layernorm="post_ffw_norm",
)
_LLAMA_WHOLE = _same(model__embed_tokens="token_embd", model__norm="output_norm", lm_head="output")
_PHI3_SHARED = {
    **_same(input_layernorm="attn_norm", self_attn__o_proj="attn_output"),
    **_same(post_attention_layernorm="ffn_norm", mlp__down_proj="ffn_down"),
}
_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_LINEAR = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


# ---------------------------------------------------------------- what a row cannot say


def _window_settings(source: Source) -> dict[str, Setting]:
    """The window and the layers that have it."""
    config = source.config
    if not any(windows(config)):
        return {}
    return {
        "attention.sliding_window": int(config["sliding_window"]),
        "attention.sliding_window_pattern": windows(config),
    }


def _windowed_settings(source: Source) -> dict[str, Setting]:
    return {**_window_settings(source), "logit_scale": 1.0}


def _no_sinks(source: Source) -> dict[str, list[float]]:
    heads, _ = head_counts(source.config)
    return {f"blk.{index}.attn_sinks.weight": [NO_SINK] * heads for index in range(source.config["num_hidden_layers"])}


def _soft_caps(source: Source) -> dict[str, Setting]:
    found = {
        "final_logit_softcapping": source.config.get("final_logit_softcapping"),
        "attn_logit_softcapping": source.config.get("attn_logit_softcapping"),
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def _gemma_settings(source: Source) -> dict[str, Setting]:
    settings = {**_window_settings(source), **_soft_caps(source)}
    if "attention.sliding_window" not in settings and source.config["model_type"] == "gemma2":
        settings["attention.sliding_window"] = int(source.config["max_position_embeddings"])  # it must have one
    local = (source.config.get("rope_parameters") or {}).get("sliding_attention")
    if local is not None and any(windows(source.config)):
        settings["rope.freq_base_swa"] = float(local["rope_theta"])
    return settings


def _check_gemma_scale(source: Source) -> None:
    """llama.cpp knows the largest models by their number of layers, and takes the size of heads for all others."""
    config = source.config
    largest = {"gemma2": 46, "gemma3_text": 62}[config["model_type"]] == config["num_hidden_layers"]
    expected = config["hidden_size"] // config["num_attention_heads"] if largest else head_size(config)
    if config.get("query_pre_attn_scalar") != expected:
        raise refuse(source, "'query_pre_attn_scalar' in config.json", expected, config.get("query_pre_attn_scalar"))


def _check_gemma2(source: Source) -> None:
    _check_gemma_scale(source)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not source.config.get(key):
            raise refuse(source, f"{key!r} in config.json", "a positive number", source.config.get(key))


def _check_gemma3(source: Source) -> None:
    _check_gemma_scale(source)
    local = (source.config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise refuse(source, "the rotary positions of windowed layers in config.json", "default", local["rope_type"])


def _check_smollm3(source: Source) -> None:
    """Every fourth layer has no positions."""
    count = source.config["num_hidden_layers"]
    expected = [int((index + 1) % 4 != 0) for index in range(count)]
    found = source.config.get("no_rope_layers")
    if found != expected:
        raise refuse(source, "'no_rope_layers' in config.json", expected, found)


# ---------------------------------------------------------------- the table

_LLAMA = Family(
    arch="llama",
    layer=_LLAMA_LAYER,
    whole=_LLAMA_WHOLE,
    biases=_LINEAR,
    rules={"hidden_act": ("silu",)},
    ropes=("default", "linear", "llama3", "yarn", "longrope"),
    paired=True,
)
_PHI3 = Family(
    arch="phi3",
    layer={
        **_PHI3_SHARED,
        "self_attn.qkv_proj": ("attn_qkv",),
        "mlp.gate_up_proj": ("ffn_up",),
    },
    whole=_LLAMA_WHOLE,
    biases=frozenset(),
    rules={"hidden_act": ("silu",)},
    ropes=("default", "longrope"),
    partial_rotary=True,
    free_heads=False,
)
_WINDOWED_LLAMA = replace(
    _LLAMA, arch="granite_swa", windowed=True, settings=_windowed_settings, constants=_no_sinks
)  # the graph of llama with windows; its scales are left at 1, its sinks take nothing
_QWEN2 = Family(
    arch="qwen2", layer=_LLAMA_LAYER, whole=_LLAMA_WHOLE, biases=_QKV, rules={"hidden_act": ("silu",)}, free_heads=False
)
_GEMMA = Family(
    arch="gemma",
    layer=_LLAMA_LAYER,
    whole={key: value for key, value in _LLAMA_WHOLE.items() if key != "lm_head"},
    biases=_QKV,
    rules={"hidden_act": ("gelu", *_TANH_GELU), "use_bidirectional_attention": (None, False)},  # gelu is its old name
    norm_offset=1.0,
)
_GEMMA2_RULES = {"hidden_activation": _TANH_GELU, "use_bidirectional_attention": (None, False)}

FAMILIES: dict[str | None, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": replace(_QWEN2, arch="qwen3", layer={**_LLAMA_LAYER, **_HEAD_NORMS}, free_heads=True),
    "smollm3": replace(
        _QWEN2, arch="smollm3", paired=True, free_heads=True, check=_check_smollm3
    ),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        arch="gemma2",
        layer={**_ATTENTION, **_GATED, **_SANDWICH},
        rules=_GEMMA2_RULES,
        windowed=True,
        settings=_gemma_settings,
        check=_check_gemma2,
    ),
    "gemma3_text": replace(
        _GEMMA,
        arch="gemma3",
        layer={**_ATTENTION, **_GATED, **_SANDWICH, **_HEAD_NORMS},
        whole=_LLAMA_WHOLE,
        rules={**_GEMMA2_RULES, "attn_logit_softcapping": (None,)},
        ropes=("default", "linear"),
        windowed=True,
        settings=_gemma_settings,
        check=_check_gemma3,
    ),
    "phi": Family(
        arch="phi2",
        layer=_same(
            input_layernorm="attn_norm",
            self_attn__q_proj="attn_q",
            self_attn__k_proj="attn_k",
            self_attn__v_proj="attn_v",
            self_attn__dense="attn_output",
            mlp__fc1="ffn_up",
            mlp__fc2="ffn_down",
        ),
        whole=_same(model__embed_tokens="token_embd", model__final_layernorm="output_norm", lm_head="output"),
        biases=_LINEAR | {"attn_norm", "output_norm", "output"},
        rules={"hidden_act": _TANH_GELU, "qk_layernorm": (None, False)},
        eps="attention.layer_norm_epsilon",
        partial_rotary=True,
        free_heads=False,
        tied_output=False,
    ),
    "phi3": _PHI3,
    "bitnet": Family(
        arch="bitnet",
        layer={**_LLAMA_LAYER, **_same(self_attn__attn_sub_norm="attn_sub_norm", mlp__ffn_sub_norm="ffn_sub_norm")},
        whole={key: value for key, value in _LLAMA_WHOLE.items() if key != "lm_head"},  # the head is the embedding
        biases=frozenset(),
        rules={"hidden_act": ("silu",), "tie_word_embeddings": (True,)},
        free_heads=False,
    ),
    "gpt2": Family(
        arch="gpt2",
        layer=_same(
            ln_1="attn_norm",
            attn__c_attn="attn_qkv",
            attn__c_proj="attn_output",
            ln_2="ffn_norm",
            mlp__c_fc="ffn_up",
            mlp__c_proj="ffn_down",
        ),
        whole=_same(
            transformer__wte="token_embd", transformer__wpe="position_embd", transformer__ln_f="output_norm",
            lm_head="output",
        ),
        biases=frozenset({"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}),
        rules={
            "activation_function": _TANH_GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (None, False),
            "add_cross_attention": (None, False),
        },
        ropes=(),
        layers="transformer.h.",
        eps="attention.layer_norm_epsilon",
        free_heads=False,
    ),
}  # fmt: skip
"""By `model_type` in config.json, from which transformers takes the class of the model."""

WINDOWED: dict[str | None, Family] = {
    "mistral": _WINDOWED_LLAMA,
    "ministral": _WINDOWED_LLAMA,
    "qwen2": _WINDOWED_LLAMA,
    "phi3": replace(
        _WINDOWED_LLAMA,
        layer={
            **_PHI3_SHARED,
            "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
            "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
        },
        biases=frozenset(),
        ropes=_PHI3.ropes,
    ),
}
"""The rows of families whose usual graph has no sliding windows, for models that need them."""
