"""Which graph a family gets in a GenAI folder, and what the vendor's builder calls the weights in its own.

The builder's graph (GroupQueryAttention, a key-value cache in place) decodes 1.1 times as fast as the traced one
after 50 tokens and 1.2 to 1.3 times after 400, so it is taken where it is right, which is what `FAMILIES` says. All
others get `onnx/decoder_graph`'s. Found out with onnxruntime-genai 0.18 on one tiny model of each family and kind of
rotary positions (the largest difference of a logit to transformers; logits reach 10):

    right            3e-6 to 1e-5: llama (rotary positions default and llama3), mistral, qwen2 (default and linear),
                     qwen3, gemma, gemma2, phi, phi3 whose context was not stretched
    mended           a window of all layers is dropped (13), one of some makes a cache that cannot be rewound
                     (`onnx/graph.set_windows`); phi's norms get another epsilon (7e-4, `set_epsilon`); Gemma's
                     embedding is scaled by a number of two decimals (`set_embedding_scale`); a rotary part that is no
                     multiple of 16 does not run (`split_rotary`)
    wrong            llama with linear (12) or yarn (9.6) rotary scaling, without a word: traced, 1e-5
    refused by it    gemma3, smollm3 (KeyError: they want settings that transformers 5 has renamed, or inputs that are
                     not there), phi3 with a stretched context, qwen3 with yarn, mistral with llama3, gpt2, opt:
                     traced, 5e-6 to 1e-5
    refused here     positions that depend on the length of the text (`decoder_graph.check_positions`)

fp16 is no width of this target: onnxruntime 1.31 on the CPU cannot run the builder's fp16 graph with a cache, and has
no faster kernels for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgewright.export.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the vendor's builder lays out a family."""

    rotary: frozenset[str]
    """The kinds of rotary positions that it computes as transformers does."""
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The checkpoint's modules, in the order of their rows, where they differ from `_MODULES`; by the graph's module.
    """
    final_norm: str = "model.norm"
    one_more: bool = False
    """Whether its norms multiply by 1 + weight, which is what the graph holds."""
    epsilon: str = "rms_norm_eps"
    """The setting that its norms add to the variance; the builder takes 1e-6 where it has another name."""
    one_gate_up: bool = False
    """Whether gate and up are one weight of the checkpoint; the builder takes them apart."""


_PLAIN = frozenset({"default", "linear"})

FAMILIES: dict[str, Family] = {
    "llama": Family(rotary=frozenset({"default", "llama3"})),
    "mistral": Family(rotary=_PLAIN),
    "qwen2": Family(rotary=_PLAIN),
    "qwen3": Family(rotary=_PLAIN),
    "gemma": Family(rotary=_PLAIN, one_more=True),
    "gemma2": Family(rotary=_PLAIN, one_more=True),
    "phi": Family(
        rotary=_PLAIN,
        modules={"attn.o_proj": ("self_attn.dense",)},
        final_norm="model.final_layernorm",
        epsilon="layer_norm_eps",
    ),
    "phi3": Family(
        rotary=_PLAIN,
        modules={"attn.qkv_proj": ("self_attn.qkv_proj",), "mlp.gate_up_proj": ("mlp.gate_up_proj",)},
        one_gate_up=True,
    ),
}
"""The families whose graph comes from the builder, by `model_type`."""

_MODULES: dict[str, tuple[str, ...]] = {
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Layers that a graph joins into one, by rows, and their parts."""

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+?)(?:\.MatMul|\.Add|\.layernorm)?\.(weight|bias)")


def builders_family(source: Source) -> Family | None:
    """The row of a checkpoint whose graph the builder makes; None where the traced one is taken."""
    family, config = FAMILIES.get(source.config["model_type"]), source.config
    rotary = (config.get("rope_parameters") or {}).get("rope_type", "default")
    trained = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if family is None or rotary not in family.rotary or trained != config["max_position_embeddings"]:
        return None
    return family


def checkpoint_names(initializer: str, source: Source) -> tuple[str, ...] | None:
    """The checkpoint's names of an initializer of the builder's graph, in the order of its rows.

    None when it is no weight, bias or norm of the checkpoint, such as a table of rotary positions.
    """
    family = FAMILIES[source.config["model_type"]]
    ends = {"lm_head.MatMul.weight": source.head, "lm_head.Add.bias": "lm_head.bias"}
    ends |= {"model.embed_tokens.weight": source.embedding}
    if initializer in ends:
        return (ends[initializer],)
    match = _IN_LAYER.fullmatch(initializer)
    if match is None:
        return None
    layer, module, kind = match.groups()
    if module == "final_norm_layernorm":
        return (f"{family.final_norm}.{kind}",)
    usual = re.sub(r"^attn\.", "self_attn.", module)
    parts = family.modules.get(module) or _MODULES.get(module) or (usual,)
    return tuple(f"model.layers.{layer}.{part}.{kind}" for part in parts)
