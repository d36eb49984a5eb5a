"""Read a GGUF file back: the gate's view, independent of the code that wrote it.

Blocks are taken apart by the package `gguf`, names come from its own tables, and the order of rows is undone here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from edgewright.export.gguf.file import GgufFile, open_gguf
from edgewright.export.source import Source

NAMES = {
    "bitnet": gguf.MODEL_ARCH.BITNET,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "ministral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi": gguf.MODEL_ARCH.PHI2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
"""The package's table of names for each `model_type`."""

OLDER_NAMES = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
"""What the package's tables call weights that transformers has renamed since."""

NEIGHBOURS = frozenset({"llama", "granite_swa", "smollm3"})
"""The graphs whose rotary positions turn neighbouring rows, where a checkpoint has halves of a head."""

ONE_MORE = frozenset({"gemma", "gemma2", "gemma3"})
"""The graphs whose norms multiply by the stored weight, where the checkpoint's multiply by 1 + weight."""

MIXES = {
    12: ("q3_k_m", frozenset({"q3_k", "q4_k", "q5_k", "q6_k"})),
    15: ("q4_k_m", frozenset({"q4_k", "q5_k", "q6_k"})),
    17: ("q5_k_m", frozenset({"q5_k", "q6_k"})),
}
"""llama.cpp's numbers for kinds of files that mix types, with the types."""

APART = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}
"""What Phi-3 keeps in one tensor and a windowed graph has apart."""


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and values (float32, matrices `[out, in]`) of every tensor that a file holds."""
    file = open_gguf(path)
    arch = str(file.settings["general.architecture"])
    table = gguf.get_tensor_name_map(NAMES[source.config["model_type"]], source.config["num_hidden_layers"])
    for name in source.names:
        known = ".".join(OLDER_NAMES.get(part, part) for part in name.split("."))
        target = table.get_name(known, try_suffixes=(".weight", ".bias"))
        parts = _parts(target, apart=arch == "granite_swa" and source.config["model_type"] == "phi3")
        if parts and all(part in file.tensors for part in parts):
            values = np.concatenate([_in_checkpoint_order(file, part, arch) for part in parts])
            yield name, _without_one(values, source, name) if arch in ONE_MORE and values.ndim == 1 else values
    if source.tied and "output.weight" in file.tensors:
        yield source.embedding, file.tensors["output.weight"].values()


def widths(path: Path) -> set[str]:
    """The types in which a file stores its matrices, by ggml's lower-case names; those of a mix by the mix's name.

    Embedded positions, which are added and not multiplied, do not count: they are in float32 in every file.
    """
    file = open_gguf(path)
    matrices = {name: tensor for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    found = {tensor.kind for name, tensor in matrices.items() if name != "position_embd.weight"}
    kind = file.settings.get("general.file_type")
    name, parts = MIXES.get(kind if isinstance(kind, int) else -1, ("", frozenset()))
    return (found - parts) | {name} if name and found & parts else found


def _parts(target: str | None, *, apart: bool) -> tuple[str, ...]:
    """The tensors of the file that make up one of the checkpoint."""
    if target is None:
        return ()
    head, _, end = target.rpartition(".")
    stem, _, kind = head.rpartition(".")
    if not apart or kind not in APART:
        return (target,)
    return tuple(f"{stem}.{part}.{end}" for part in APART[kind])


def _in_checkpoint_order(file: GgufFile, target: str, arch: str) -> np.ndarray:
    """float32 values, after undoing the pairing of neighbours that some rotary positions want."""
    values = file.tensors[target].values()
    keys = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    part = target.split(".")[-2]
    if arch not in NEIGHBOURS or part not in keys:
        return values
    heads = file.settings[f"{arch}.attention.{keys[part]}"]
    assert isinstance(heads, int)
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _without_one(values: np.ndarray, source: Source, name: str) -> np.ndarray:
    """The weights of a norm that was stored plus 1.

    That sum was rounded, so several weights lead to one stored value; the checkpoint's is taken where it is one.
    """
    weights = source.tensor(name)
    if weights.shape != values.shape:
        return values - np.float32(1)
    return np.where(weights + np.float32(1) == values, weights, values - np.float32(1))
