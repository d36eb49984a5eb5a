"""GGUF files for llama.cpp, from a Llama-family checkpoint.

Every tensor is laid out from its lattice: the checkpoint's own codes where it is quantized, else codes made once by
ggml's rule for the type. Tensors are read, packed and written one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgewright.errors import BadInput
from edgewright.export.artifact import Fallback, Written, digest
from edgewright.export.gguf_vocabulary import read_vocabulary
from edgewright.export.lattice import LatticeTensor, round_q4_0, round_q8_0, round_ternary
from edgewright.export.layout import FORMATS
from edgewright.export.source import EMBEDDING, HEAD, Source

QUANTS: dict[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "tq1_0": (gguf.GGMLQuantizationType.TQ1_0, gguf.LlamaFileType.MOSTLY_TQ1_0),
    "tq2_0": (gguf.GGMLQuantizationType.TQ2_0, gguf.LlamaFileType.MOSTLY_TQ2_0),
}
"""Our name of a width, ggml's tensor type, and what the file as a whole is called."""

ROUND: dict[str, Callable[[np.ndarray], LatticeTensor]] = {
    "q8_0": round_q8_0,
    "q4_0": round_q4_0,
    "tq1_0": round_ternary,
    "tq2_0": round_ternary,
}
"""How a weight that has no lattice gets one."""

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
FALLBACKS = ("q8_0", "f16")
"""What takes a tensor that the width asked for cannot hold: the first of these that can."""

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
"""What config.json must say."""

ROPE_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": (
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
"""The kinds of rotary positions that llama.cpp computes for this architecture, and what each must say."""

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items()
        for kind in ("weight", "bias")
    },
}
_WHOLE = {EMBEDDING: "token_embd.weight", HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor of the checkpoint and where it goes."""

    source: str
    """Its state-dict name."""
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    quant: str
    """A key of `QUANTS`."""
    rows: np.ndarray | None
    """Row i of the file is row `rows[i]` of the checkpoint; None where the order is the same."""


def write(source: Source, path: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write a checkpoint as a GGUF file.

    Args:
        source: the checkpoint.
        path: the file; not written atomically.
        quant: a key of `QUANTS`, for the linear weights.
        embedding_quant: the type of token embedding and head; by default f32 for f32, else f16. Norms are always f32.

    Raises:
        BadInput: EW-505, the format or llama.cpp cannot hold this model; EW-506 and EW-507 for tokenizers; EW-508, a
            value does not fit the type.
    """
    embedding_quant = embedding_quant or ("f32" if quant == "f32" else "f16")
    placed, fallbacks = place(source, quant, embedding_quant)
    writer = gguf.GGUFWriter(None, "llama")
    _write_hyperparameters(writer, source.config, source, quant)
    read_vocabulary(source).write(writer)
    factors = _rope_factors(source)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, "f32")
    for tensor in placed:
        _announce(writer, tensor.name, tensor.shape, tensor.quant)
    writer.write_header_to_file(path)
    digests = {}
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in placed:
            writer.write_tensor_data(_data(source, tensor))
            digests[tensor.source] = digest(expected_values(source, tensor.source, tensor.quant))
    finally:
        writer.close()
    return Written(
        fallbacks=fallbacks,
        lattice={tensor.source: _kept(source, tensor) for tensor in placed if tensor.source in source.lattice},
        digests=digests,
        embedding_quant=embedding_quant,
        versions={"gguf": _version("gguf")},
    )


def place(source: Source, quant: str, embedding_quant: str) -> tuple[list[Placed], list[Fallback]]:
    """Where every tensor goes and in which type, with the tensors that cannot be stored as asked.

    Raises:
        BadInput: EW-505 names what the llama architecture of llama.cpp has no place for.
    """
    _check_architecture(source)
    shapes = _expected_shapes(source.config)
    names = [name for name in source.names if name in shapes]
    for name in source.names:
        if name not in shapes and not name.endswith("rotary_emb.inv_freq"):
            raise refuse(source, f"there is no place for the tensor {name!r}", "the tensors of a Llama model", name)
    placed, fallbacks = [], []
    for name in sorted(set(shapes) - {key for key in shapes if key.endswith(".bias")} | set(names)):
        if name == HEAD and source.tied:
            continue
        shape = source.shape(name)
        if shape != shapes[name]:
            raise refuse(source, f"the tensor {name!r} has another shape than config.json says", shapes[name], shape)
        asked = embedding_quant if name in (EMBEDDING, HEAD) else quant
        stored, reason = _type_of(source, name, shape, asked)
        if reason is not None:
            fallbacks.append(Fallback(name, stored, reason))
        placed.append(
            Placed(source=name, name=_target(name), shape=shape, quant=stored, rows=_row_order(source.config, name))
        )
    return placed, fallbacks


def stored_lattice(source: Source, name: str, quant: str) -> LatticeTensor:
    """The codes and scales of a tensor in a block type: the checkpoint's own where there are any.

    Scales that are not exact in fp16, the type of ggml's scales, are rounded to it; the codes stay.

    Raises:
        BadInput: EW-508, a scale does not fit fp16.
    """
    lattice = source.lattice.get(name)
    try:
        if lattice is not None:
            lattice = lattice.scales_rounded(np.float16)
            if FORMATS[quant].holds_exactly(lattice) is None:
                return lattice
        return ROUND[quant](source.tensor(name))
    except ValueError as error:  # a scale is not finite
        raise _too_large(source, name, quant) from error


def expected_values(source: Source, name: str, quant: str) -> np.ndarray:
    """float32 values that a file must give back for a checkpoint tensor stored in this type, in checkpoint order."""
    if quant == "f32":
        return source.tensor(name)
    if quant == "f16":
        return _as_f16(source, name).astype(np.float32)
    return stored_lattice(source, name, quant).dequantize()


def _as_f16(source: Source, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = source.tensor(name).astype(np.float16)
    if not np.isfinite(value).all():
        raise _too_large(source, name, "f16")
    return value


def _data(source: Source, tensor: Placed) -> np.ndarray:
    """The bytes of a tensor as the file holds them."""
    if tensor.quant in FORMATS:
        lattice = stored_lattice(source, tensor.source, tensor.quant)
        return FORMATS[tensor.quant].pack(lattice if tensor.rows is None else lattice.rows_reordered(tensor.rows))
    value = source.tensor(tensor.source) if tensor.quant == "f32" else _as_f16(source, tensor.source)
    return np.ascontiguousarray(value if tensor.rows is None else value[tensor.rows])


def _kept(source: Source, tensor: Placed) -> str:
    """What became of a lattice tensor of the checkpoint: `exact`, or in words what was lost."""
    if np.array_equal(expected_values(source, tensor.source, tensor.quant), source.lattice[tensor.source].dequantize()):
        return "exact"
    return f"values rounded to {tensor.quant}" if tensor.quant == "f16" else "scales rounded to float16"


def _type_of(source: Source, name: str, shape: tuple[int, ...], asked: str) -> tuple[str, str | None]:
    """The type that stores a tensor, and why it is not the one asked for, or None."""
    if len(shape) == 1:
        return "f32", None
    problems = [(quant, _problem(source, name, shape, quant)) for quant in (asked, *FALLBACKS)]
    stored = next(quant for quant, problem in problems if problem is None)
    return stored, problems[0][1]


def _problem(source: Source, name: str, shape: tuple[int, ...], quant: str) -> str | None:
    """Why a type cannot hold a tensor, or None."""
    if quant not in FORMATS:
        return None
    if shape[-1] % FORMATS[quant].block:
        return f"its rows of {shape[-1]} are no multiple of the block of {FORMATS[quant].block}"
    lattice = source.lattice.get(name)
    if lattice is None or not FORMATS[quant].holds_exactly(lattice):
        return None
    if np.abs(lattice.scales).max() > np.finfo(np.float16).max:
        return "a scale is too large for float16"
    return FORMATS[quant].holds_exactly(lattice.scales_rounded(np.float16))


# ---------------------------------------------------------------- names, shapes, rows


def _target(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}"


def head_size(config: dict[str, Any]) -> int:
    """Columns of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the architecture may have, by state-dict name."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (count * head_size(config) for count in _heads(config))
    linear = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    layer |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    return shapes | {EMBEDDING: (vocabulary, hidden), HEAD: (vocabulary, hidden), "model.norm.weight": (hidden,)}


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    queries = int(config["num_attention_heads"])
    return queries, int(config.get("num_key_value_heads") or queries)


def _row_order(config: dict[str, Any], name: str) -> np.ndarray | None:
    """The order of rows that rotary positions ask for.

    A checkpoint pairs row j of a head with row j + size / 2, llama.cpp pairs neighbours.
    """
    heads = dict(zip(("q_proj", "k_proj"), _heads(config), strict=True)).get(name.split(".")[-2])
    if heads is None:
        return None
    return np.arange(heads * head_size(config)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], quant: str) -> None:
    kind = QUANTS[quant][0]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind)


# ---------------------------------------------------------------- hyperparameters


def _check_architecture(source: Source) -> None:
    """Refuse what the llama architecture of llama.cpp does not compute.

    Raises:
        BadInput: EW-505.
    """
    config = source.config
    for key in SIZES:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise refuse(source, f"{key!r} in config.json", "a positive number", config.get(key))
    rope = rope_parameters(config)
    needed = (
        ("architectures", config.get("architectures"), [[name] for name in ARCHITECTURES]),
        ("hidden_act", config.get("hidden_act", "silu"), ["silu"]),
        ("sliding_window", config.get("sliding_window"), [None]),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", config.get("partial_rotary_factor")), [None, 1.0]),
        ("rope_type", rope["rope_type"], list(ROPE_SETTINGS)),
    )
    for key, found, legal in needed:
        if found not in legal:
            raise refuse(source, f"{key!r} in config.json", " or ".join(map(str, legal)), found)
    for key in ROPE_SETTINGS[rope["rope_type"]]:
        if not isinstance(rope.get(key), int | float):
            raise refuse(source, f"{key!r} of the rotary positions in config.json", "a number", rope.get(key))


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions: transformers 5 writes `rope_parameters`, older releases `rope_theta` and `rope_scaling`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    return found


def _write_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any], source: Source, quant: str) -> None:
    queries, keys = _heads(config)
    rope = rope_parameters(config)
    writer.add_name(source.name)
    writer.add_file_type(QUANTS[quant][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(queries)
    writer.add_head_count_kv(keys)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(source: Source) -> np.ndarray | None:
    """Llama 3.1's stretching of long wavelengths, as the divisor of each frequency: float32 `[head size / 2]`."""
    rope, size = rope_parameters(source.config), head_size(source.config)
    if rope["rope_type"] != "llama3":
        return None
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


# ---------------------------------------------------------------- errors


def refuse(source: Source, what: str, expected: object, found: object) -> BadInput:
    """EW-505: the target cannot hold this model."""
    return BadInput(
        "EW-505",
        f"llama.cpp's llama architecture cannot hold this model: {what}",
        where=(source.directory / "config.json").absolute(),
        expected=expected,
        found=found,
        fix="export a Llama-family model",
    )


def _too_large(source: Source, name: str, quant: str) -> BadInput:
    return BadInput(
        "EW-508",
        f"the tensor {name!r} holds values too large for {quant}",
        where=source.directory.absolute(),
        expected="values that half precision can scale (65504)",
        found=f"a magnitude of {np.abs(source.tensor(name)).max():.3g}",
        fix="export as f32",
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
