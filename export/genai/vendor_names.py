"""What the vendor's model builder calls the weights in its own graphs."""

from __future__ import annotations

import re

from edgewright.export.source import Source

JOINED: dict[str, tuple[str, ...]] = {
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Layers that a graph joins into one, by rows, and their parts."""

RENAMED = {"attn.o_proj": "self_attn.dense", "final_norm_layernorm": "model.final_layernorm"}
"""Modules that some families (phi) call otherwise than most; by the builder's name."""

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+?)(?:\.MatMul|\.Add|\.layernorm)?\.(weight|bias)")


def checkpoint_names(initializer: str, source: Source) -> tuple[str, ...] | None:
    """The checkpoint's names of an initializer of the builder's graph, in the order of its rows.

    None when it is no weight, bias or norm of the checkpoint, such as a table of rotary positions.
    """
    ends = {"lm_head.MatMul.weight": source.head, "lm_head.Add.bias": "lm_head.bias"}
    ends |= {"model.embed_tokens.weight": source.embedding}
    if initializer in ends:
        return (ends[initializer],)
    match = _IN_LAYER.fullmatch(initializer)
    if match is None:
        return None
    layer, module, kind = match.groups()
    known = [names for names in _candidates(layer, module, kind) if source.files.keys() >= set(names)]
    return known[0] if known else None


def _candidates(layer: str, module: str, kind: str) -> list[tuple[str, ...]]:
    """What a module may be in the checkpoint."""
    prefix = f"model.layers.{layer}."
    if module == "final_norm_layernorm":
        return [(f"model.norm.{kind}",), (f"{RENAMED[module]}.{kind}",)]
    names = [re.sub(r"^attn\.", "self_attn.", module), *([RENAMED[module]] if module in RENAMED else [])]
    joined = [tuple(f"{prefix}{part}.{kind}" for part in JOINED[module])] if module in JOINED else []
    return [*joined, *((f"{prefix}{name}.{kind}",) for name in names)]
