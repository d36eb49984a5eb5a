"""GGUF files for llama.cpp, from a checkpoint of any family in `gguf/architecture.FAMILIES`.

Every weight is laid out from its lattice: the checkpoint's own codes where it is quantized, else codes made once by
ggml's rule for the type. Where others are quantized, one that is not is never rounded to a ternary type. Tensors are
read and packed a few at a time, and written one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np

from edgewright.errors import BadInput
from edgewright.export.artifact import Digest, Fallback, Written
from edgewright.export.gguf import ggml as gguf_ggml
from edgewright.export.gguf.architecture import (
    Family,
    Setting,
    family_of,
    head_counts,
    head_size,
    inner_size,
    refuse,
)
from edgewright.export.gguf.rope import rope_constants, rope_settings
from edgewright.export.gguf.vocabulary import read_vocabulary
from edgewright.export.gguf.widths import (
    BLOCKS,
    SEARCHED,
    WIDTHS,
    half,
    mix_of,
    type_in,
    width_for,
)
from edgewright.export.in_order import in_order
from edgewright.export.lattice import LatticeTensor, round_q4_0, round_q8_0, round_ternary
from edgewright.export.source import Source

ROUND: dict[str, Callable[[np.ndarray], LatticeTensor]] = {
    "q8_0": round_q8_0,
    "q4_0": round_q4_0,
    "q2_0": round_ternary,
    "tq1_0": round_ternary,
    "tq2_0": round_ternary,
}
"""How a weight gets a lattice that has none; see `_ours`."""

_NAMES_WITH_MEANING = re.compile(r"phi-?3|modern-bert", re.IGNORECASE)
"""In a model's name these make llama.cpp look for tokens that the vocabulary need not have; such a name is left out."""

TABLES = ("token_embd.weight", "output.weight")
"""The token embedding and the head, by their names in a file."""

PART = 1 << 20
"""Values that are packed at a time."""

Rows = slice | np.ndarray

POSITIONS = "position_embd.weight"
"""Embedded positions are added to every token; as in llama.cpp's own files they keep full precision."""


EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
"""What config.json may call the number that norms add to the variance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor of the file and where it comes from."""

    source: str
    """The state-dict name of the checkpoint's."""
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    width: str
    """A key of `WIDTHS`."""
    rows: np.ndarray | None
    """Row i of the file is row `rows[i]` of the checkpoint; None where they are all, in the same order."""
    offset: float = 0.0
    """What is added to every value."""


def write(source: Source, path: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write a checkpoint as a GGUF file.

    Args:
        source: the checkpoint.
        path: the file; not written atomically.
        quant: a key of `WIDTHS` or `MIXES`, for the linear weights.
        embedding_quant: the type of token embedding and head; by default f32 for f32, bf16 for bf16, for K-quants q6_k
            (a token embedding that is not the head too is then as narrow as the rest), else f16. Norms and biases are
            always f32.

    Raises:
        BadInput: EW-505, the format or llama.cpp cannot hold this model; EW-506 and EW-507 for tokenizers; EW-508, a
            value does not fit the type; EW-603, K-quants without llama-cpp-python.
    """
    family = family_of(source)
    settings = {**_settings(source, family), **rope_settings(source, family), **family.settings(source)}
    constants = {**rope_constants(source, family), **family.constants(source)}
    placed, fallbacks = place(source, quant, embedding_quant)
    writer = gguf.GGUFWriter(None, family.arch)
    if not _NAMES_WITH_MEANING.search(source.name):
        writer.add_name(source.name)
    writer.add_file_type(mix_of(quant).file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in settings.items():
        _add(writer, f"{family.arch}.{key}", value)
    vocabulary = read_vocabulary(source)
    vocabulary.write(writer)
    for name, values in constants.items():
        _announce(writer, name, (len(values),), "f32")
    for tensor in placed:
        _announce(writer, tensor.name, tensor.shape, tensor.width)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in constants.values():
            writer.write_tensor_data(np.array(values, np.float32))
        lattice, digests = _write_tensors(writer, source, placed)
    finally:
        writer.close()
    return Written(
        fallbacks=fallbacks,
        lattice=lattice,
        digests=digests,
        embedding_quant=embedding_quant or _embedding_width(quant),
        versions={name: version(name) for name in ("gguf", *(["llama-cpp-python"] if _by_library(placed) else []))},
        notes=[] if vocabulary.note is None else [vocabulary.note],
    )


def _write_tensors(
    writer: gguf.GGUFWriter, source: Source, placed: list[Placed]
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the data of all tensors; what became of each lattice, and the digest of every tensor of the checkpoint."""
    lattice, digests = {}, {}
    groups = (list(group) for _, group in groupby(placed, key=lambda tensor: tensor.source))
    for laid in in_order(lambda group: _lay_out_group(source, group), groups):
        for data in laid.data:
            writer.write_tensor_data(data)
        digests[laid.name] = laid.digest
        if laid.kept is not None:
            lattice[laid.name] = laid.kept
    return lattice, digests


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaidOut:
    """A tensor of the checkpoint as the file holds it."""

    name: str
    data: list[np.ndarray]
    """The bytes of each tensor of the file that it makes up."""
    digest: str
    """Of the values that it must be read as."""
    kept: str | None
    """What became of its lattice; None where it has none."""


def _lay_out_group(source: Source, group: list[Placed]) -> _LaidOut:
    """All tensors of the file that one of the checkpoint makes up; errors as `_lay_out`.

    A few rows at a time, which stay in the cache from the first look at them to the last.
    """
    weight = _Weight.read(source, group[0].source)
    comparison = _Comparison(weight, in_order=False)
    data = []
    for tensor in group:
        if tensor.rows is None:  # the whole weight, a tied head for the second time
            comparison = _Comparison(weight, in_order=True)
        parts = []
        for rows in _row_parts(weight, tensor):
            part = weight.part(rows)
            blocks, values = _lay_out(source, part, tensor)
            comparison.add(part, values, rows)
            parts.append(blocks)
        data.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return _LaidOut(name=weight.name, data=data, digest=comparison.digest(), kept=comparison.kept())


def _row_parts(weight: _Weight, tensor: Placed) -> list[Rows]:
    """The rows of a tensor of the file, some at a time; all of them where they are stored as they are."""
    if len(tensor.shape) == 1 or tensor.width == "f32":
        return [slice(None) if tensor.rows is None else tensor.rows]
    step = max(1, PART // tensor.shape[1])
    starts = range(0, tensor.shape[0], step)
    if tensor.rows is None:
        return [slice(start, start + step) for start in starts]
    return [tensor.rows[start : start + step] for start in starts]


class _Comparison:
    """What a weight must be read as, and whether that is what its lattice says."""

    def __init__(self, weight: _Weight, *, in_order: bool) -> None:
        self._weight, self._in_order, self._exact = weight, in_order, True
        self._digest = Digest(weight.shape)
        self._whole = np.empty((0, 0) if in_order else weight.shape, np.float32)

    def add(self, part: _Weight, values: np.ndarray, rows: Rows) -> None:
        """Take the values of some rows."""
        if part.lattice is not None:
            self._exact = self._exact and np.array_equal(values, part.lattice.dequantize())
        if self._in_order:
            self._digest.update(values)
        else:
            self._whole[rows] = values

    def digest(self) -> str:
        """Of the whole weight, once all rows were there."""
        if not self._in_order:
            self._digest.update(self._whole)
        return self._digest.hexdigest()

    def kept(self) -> str | None:
        """What became of the checkpoint's lattice: `exact`, or in words what was lost; None where it has none."""
        if self._weight.lattice is None:
            return None
        return "exact" if self._exact else "scales rounded to float16"


# ---------------------------------------------------------------- where everything goes


def place(source: Source, quant: str, embedding_quant: str | None = None) -> tuple[list[Placed], list[Fallback]]:
    """Where every tensor goes and in which type, with the tensors that cannot be stored as asked.

    Raises:
        BadInput: EW-505 names what llama.cpp's graph of this family has no place for.
    """
    family = family_of(source)
    placed: list[Placed] = []
    fallbacks: list[Fallback] = []
    for name in source.names:
        shape = source.shape(name)[::-1] if source.stores_transposed(name) else source.shape(name)
        reasons: dict[str, str] = {}
        for target, rows in _targets(source, family, name):
            asked = _asked(source, target, quant, embedding_quant)
            width, reason = ("f32", None)
            if len(shape) > 1 and target != POSITIONS:
                linear = target not in TABLES  # tables have the width that was asked for them
                lattice = source.lattice.get(name)
                width, reason = width_for(asked, shape[-1], lattice, beside_lattices=linear and bool(source.lattice))
            if reason is not None:
                reasons[width] = reason
            placed.append(
                Placed(
                    source=name,
                    name=target,
                    shape=shape if rows is None else (len(rows), *shape[1:]),
                    width=width,
                    rows=rows,
                    offset=family.norm_offset if len(shape) == 1 and "norm" in target else 0.0,
                )
            )
        fallbacks += [Fallback(name, width, reason) for width, reason in reasons.items()]
    return placed, fallbacks


def _targets(source: Source, family: Family, name: str) -> list[tuple[str, np.ndarray | None]]:
    """The tensors of the file that a tensor of the checkpoint makes up, each with its rows (None: all of them)."""
    stem, _, end = name.rpartition(".")
    layer = ""
    found = family.whole.get(stem)
    if stem.startswith(family.layers):
        layer, _, rest = stem.removeprefix(family.layers).partition(".")
        found = family.layer.get(rest)
        layer = f"blk.{layer}."
    allowed = found is not None and (end == "weight" or (end == "bias" and set(found) <= family.biases))
    if found is None or not allowed:
        raise refuse(source, f"there is no place for the tensor {name!r}", f"the tensors of {family.arch}", name)
    targets = [(f"{layer}{target}.{end}", _rows(source, family, target, found)) for target in found]
    if name == source.head and source.tied and not family.tied_output:
        targets.append((f"output.{end}", None))
    return targets


def _rows(source: Source, family: Family, target: str, parts: tuple[str, ...]) -> np.ndarray | None:
    """The rows of the checkpoint that a tensor of the file takes, in its order; None where it takes all as they are."""
    heads = _rotary_heads(source, family).get(target)
    if len(parts) == 1 and heads is None:
        return None
    sizes = _part_sizes(source)
    start = sum(sizes[part] for part in parts[: parts.index(target)])
    rows = np.arange(start, start + sizes[target])
    return rows if heads is None else _row_order(rows, heads)


def _part_sizes(source: Source) -> dict[str, int]:
    """Rows of the weights that can lie in one tensor with others, or are reordered."""
    queries, keys = (count * head_size(source.config) for count in head_counts(source.config))
    inner = inner_size(source.config)
    return {"attn_q": queries, "attn_k": keys, "attn_v": keys, "ffn_gate": inner, "ffn_up": inner}


def _rotary_heads(source: Source, family: Family) -> dict[str, int]:
    """How many heads the rows of the weights have that must be reordered."""
    return dict(zip(("attn_q", "attn_k"), head_counts(source.config), strict=True)) if family.paired else {}


def _row_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order that rotary positions ask for: a checkpoint pairs row j of a head with row j + size / 2, llama.cpp
    pairs neighbours."""
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _asked(source: Source, target: str, quant: str, embedding_quant: str | None) -> str:
    """The type that a matrix should have, by its name in the file; a table on a lattice needs no wider one."""
    mix = mix_of(quant)
    table = source.embedding if source.tied or target == "token_embd.weight" else source.head
    if embedding_quant is None and target in TABLES and table in source.lattice:
        return mix.base
    if target == "output.weight" or (target == "token_embd.weight" and (source.tied or mix.base not in SEARCHED)):
        return embedding_quant or _embedding_width(quant)
    if target == "token_embd.weight":
        return embedding_quant or mix.base
    return type_in(mix, target, source.config["num_hidden_layers"])


def _embedding_width(quant: str) -> str:
    if mix_of(quant).base in SEARCHED:
        return "q6_k"
    return quant if quant in ("f32", "bf16") else "f16"


def _by_library(placed: list[Placed]) -> bool:
    return any(tensor.width in {*SEARCHED, *BLOCKS} - ROUND.keys() for tensor in placed)


# ---------------------------------------------------------------- values and bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A tensor of the checkpoint, `[out, in]`, or some of its rows: its lattice, or else its values."""

    name: str
    values: np.ndarray | None
    lattice: LatticeTensor | None

    @classmethod
    def read(cls, source: Source, name: str) -> _Weight:
        lattice = source.lattice.get(name)
        return cls(name=name, lattice=lattice, values=source.matrix(name) if lattice is None else None)

    @property
    def shape(self) -> tuple[int, ...]:
        values = self.values if self.lattice is None else self.lattice.codes
        assert values is not None
        return values.shape

    def part(self, rows: Rows) -> _Weight:
        if self.lattice is not None:
            return _Weight(name=self.name, values=None, lattice=self.lattice.rows_reordered(rows))
        assert self.values is not None
        return _Weight(name=self.name, values=self.values[rows], lattice=None)

    def as_float(self, width: str) -> np.ndarray:
        """float32 values before any rounding to the type; scales of a lattice are those of a file of that type."""
        if self.lattice is None:
            assert self.values is not None
            return self.values
        return (self.lattice.scales_rounded(np.float16) if width == "f16" else self.lattice).dequantize()


def _lay_out(source: Source, weight: _Weight, tensor: Placed) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a tensor as the file holds them, and the values that the checkpoint's tensor must be read as.

    Raises:
        BadInput: EW-508, a value does not fit the type.
    """
    data, values = _packed(source, weight, tensor.width)
    if not np.isfinite(values).all():
        raise _too_large(source, weight.name, tensor.width)
    if tensor.offset:
        data = data + np.float32(tensor.offset)
    return data, values


def _packed(source: Source, weight: _Weight, width: str) -> tuple[np.ndarray, np.ndarray]:
    if width in BLOCKS and (weight.lattice is not None or _ours(width)):
        lattice = _stored_lattice(source, weight, width)
        return BLOCKS[width].pack(lattice), lattice.dequantize()
    values = weight.as_float(width)
    if gguf_ggml.makes(width):
        blocks = gguf_ggml.quantize(values, width, source.importance.get(weight.name) if width in SEARCHED else None)
        return blocks, gguf_ggml.dequantize(blocks, width, values.shape[1])
    if width == "f32":
        return np.ascontiguousarray(values), values
    return half(values, width)


def _ours(width: str) -> bool:
    """Whether blocks of plain weights are made here: ternary ones always, plain integers where ggml is not installed.

    Both follow ggml's rule bit for bit; its library is faster.
    """
    return width in ROUND and not (gguf_ggml.makes(width) and gguf_ggml.is_installed())


def _stored_lattice(source: Source, weight: _Weight, width: str) -> LatticeTensor:
    """The codes and scales of a weight in a block type: its own where it has any, with scales as fp16 holds them."""
    try:
        if weight.lattice is not None:
            return weight.lattice.scales_rounded(np.float16)
        assert weight.values is not None
        return ROUND[width](weight.values)
    except ValueError as error:  # a scale is not finite
        raise _too_large(source, weight.name, width) from error


def _too_large(source: Source, name: str, width: str) -> BadInput:
    return BadInput(
        "EW-508",
        f"the tensor {name!r} holds values too large for {width}",
        where=source.directory.absolute(),
        expected="values that half precision can scale (65504)",
        found=f"a magnitude of {np.abs(source.tensor(name)).max():.3g}",
        fix="export as f32",
    )


# ---------------------------------------------------------------- metadata


def _settings(source: Source, family: Family) -> dict[str, Setting]:
    """The metadata that every family has, by its keys behind the name of the graph."""
    config = source.config
    queries, keys = head_counts(config)
    eps = next((config[key] for key in EPSILONS if key in config), None)
    if eps is None:
        raise refuse(source, "its norms have no known epsilon", f"one of {', '.join(EPSILONS)}", "none of them")
    return {
        "vocab_size": int(config["vocab_size"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": inner_size(config),
        "block_count": int(config["num_hidden_layers"]),
        "attention.head_count": queries,
        "attention.head_count_kv": keys,
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        family.eps: float(eps),
    }


_ADD: list[tuple[type, str]] = [(bool, "add_bool"), (int, "add_uint32"), (float, "add_float32"), (str, "add_string")]


def _add(writer: gguf.GGUFWriter, key: str, value: Setting) -> None:
    """Add a value under its key; a bool is an int to Python, hence the order."""
    method = next((name for kind, name in _ADD if isinstance(value, kind)), "add_array")
    getattr(writer, method)(key, value)


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], width: str) -> None:
    kind = WIDTHS[width]
    size = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
    number: Any = kind.number  # the package does not know every type that the runtime does
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=cast(gguf.GGMLQuantizationType, number))
