"""Hugging Face directories: plain weights in one precision, or packed so that transformers loads them by itself.

Packed are the weights of linear layers. Token embedding, output head, norms and biases keep the precision of the
checkpoint (or get `embedding_quant`), which config.json names as the model's dtype. A weight that the packing cannot
hold exactly, or at all, stays plain too; config.json lists it, and it is counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.artifact import Fallback, Written, digest, sync
from edgewright.export.clean_settings import clean_config
from edgewright.export.guard import read_json
from edgewright.export.in_order import AT_ONCE, in_order
from edgewright.export.lattice import SIDECAR, LatticeTensor, round_int, save_sidecar
from edgewright.export.layout import NF4, BitNet, Int8, Nf4
from edgewright.export.plain_only import refuse_factors
from edgewright.export.rounding import round_nf4
from edgewright.export.source import Source

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

PLAIN = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The plain widths, and what torch calls them."""

SHARD_BYTES = 2**31
"""A file of weights holds no more, unless a single tensor is larger; it is in memory while it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A packed width."""

    method: str
    """quant_method."""
    skip_key: str
    """The setting that lists the layers that stay plain."""
    settings: Callable[[str], dict[str, Any]]
    """The rest of quantization_config, by the dtype of the model."""
    why_not: Callable[[LatticeTensor], str | None]
    """Why a lattice cannot be stored, or None."""
    round: Callable[[np.ndarray], LatticeTensor] | None
    """How a weight without a lattice is rounded; None where it must have been trained."""
    tensors: Callable[[str, LatticeTensor, str], Tensors]
    """The tensors of a packed weight, from its layer's name (with a dot), its lattice and the dtype of the model."""
    packages: tuple[str, ...]
    """What a reader of such a directory needs beside transformers."""
    conv1d: bool = True
    """Whether GPT-2's `Conv1D` layers can be packed."""


def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write a Hugging Face directory.

    Args:
        source: the checkpoint.
        directory: made if it is not there; the caller swaps it into place.
        quant: a key of `PLAIN` or `PACKINGS`.
        embedding_quant: for a packed width, the precision of all that is not packed, a key of `PLAIN`; None takes the
            narrowest that holds it exactly. A plain directory has one precision, so there it is `quant` or None.

    Raises:
        BadInput: EW-508, a weight is too large for fp16; EW-530, a lattice that the packing cannot express; EW-531,
            two precisions in a plain directory; EW-723, the checkpoint has factored layers.
    """
    refuse_factors(source, "hf")
    directory.mkdir(parents=True, exist_ok=True)
    writing = _Writing(source=source, directory=directory, packing=PACKINGS.get(quant))
    if writing.packing is None and embedding_quant not in (None, quant):
        raise _two_precisions(quant, embedding_quant)
    if writing.packing is not None:
        writing.choose_packed(writing.packing, quant)
    writing.width = quant if writing.packing is None else embedding_quant or writing.own_width()
    writing.weights()
    writing.settings()
    writing.sidecar()
    sync(directory)
    return Written(
        fallbacks=[Fallback(name, writing.width, reason) for name, reason in writing.kept_plain.items()],
        lattice=writing.stored,
        digests=writing.digests,
        embedding_quant=writing.width,
        versions={name: version(name) for name in ("transformers", "safetensors", "torch")},
    )


@dataclass(slots=True, kw_only=True)
class _Writing:
    """One directory on its way."""

    source: Source
    directory: Path
    packing: Packing | None
    width: str = "fp32"
    """Of everything that is not packed, a key of `PLAIN`."""
    packed: dict[str, LatticeTensor] = field(default_factory=dict)
    kept_plain: dict[str, str] = field(default_factory=dict)
    """Weights of linear layers that are not packed, and why."""
    stored: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return PLAIN[self.width]

    def choose_packed(self, packing: Packing, quant: str) -> None:
        """Decide which weights are packed.

        Raises:
            BadInput: EW-530, none can be, or a lattice of the right kind has too many scales.
        """
        for name in self.source.linears:
            if name == self.source.head:
                continue
            lattice = self.source.lattice.get(name)
            reason = _out_of_reach(self.source, name, packing)
            if reason is None and lattice is None:
                lattice = None if packing.round is None else packing.round(self.source.matrix(name))
                reason = "it was not trained to be ternary" if lattice is None else None
            reason = reason or (None if lattice is None else packing.why_not(lattice))
            if reason is None and lattice is not None:
                self.packed[name] = lattice
                continue
            if packing.method == "bitnet" and lattice is not None and _needs_more_scales(lattice):
                raise _too_many_scales(self.source, name, str(reason))
            self.kept_plain[name] = str(reason)
        if not self.packed:
            raise _nothing_to_pack(self.source, quant, next(iter(self.kept_plain.values()), "it has no linear layers"))

    def own_width(self) -> str:
        """The narrowest precision that holds all plain weights exactly, and the scales that are stored in it."""
        import torch

        left = [width for width in ("bf16", "fp16") if self._scales_fit(width)]
        for name in self.source.names:
            if name not in self.packed:
                value = torch.from_numpy(self._value(name))
                left = [width for width in left if value.to(getattr(torch, PLAIN[width])).float().equal(value)]
            if not left:
                return "fp32"
        return left[0]

    def _scales_fit(self, width: str) -> bool:
        """Whether BitNet's scales, which have the precision of the model, are exact in it."""
        import torch

        if self.packing is None or self.packing.method != "bitnet":
            return True
        scales = torch.from_numpy(np.array([lattice.scales.flat[0] for lattice in self.packed.values()]))
        return bool(scales.to(getattr(torch, PLAIN[width])).float().equal(scales))

    def _value(self, name: str) -> np.ndarray:
        """A tensor as the checkpoint stores it; a quantized weight is what its lattice says."""
        lattice = self.source.lattice.get(name)
        if lattice is None:
            return self.source.tensor(name)
        exact = lattice.dequantize()
        return np.ascontiguousarray(exact.T) if self.source.stores_transposed(name) else exact

    def weights(self) -> None:
        """Write the safetensors files, one after the other, and the index where there are several."""
        from safetensors.torch import save_file

        shards = list(_shards(self.source, _ITEM_BYTES[self.width], self.packed))
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
        index: dict[str, str] = {}
        total = 0
        for file, tensor_names in zip(names, shards, strict=True):
            made = dict(zip(tensor_names, in_order(self._tensors, tensor_names), strict=True))
            tensors = {key: tensor for each in made.values() for key, tensor in each.items()}
            with ThreadPoolExecutor(AT_ONCE) as pool:  # they are compared while the file is written
                given_back = pool.map(self._given_back, made.items())
                save_file(tensors, self.directory / file, metadata={"format": "pt"})
            for name, (values, stored) in zip(tensor_names, given_back, strict=True):
                self.digests |= {} if values is None else {name: values}
                self.stored |= {} if stored is None else {name: stored}
            index |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
            _write_json(self.directory / "model.safetensors.index.json", content)

    def _tensors(self, name: str) -> Tensors:
        """The tensors of one weight."""
        if name in self.packed and self.packing is not None:
            return self.packing.tensors(name.removesuffix("weight"), self.packed[name], self.dtype)
        import torch

        rounded = torch.from_numpy(self._value(name)).to(getattr(torch, self.dtype))
        if self.width != "fp32" and not all(map(isfinite, rounded.flatten().aminmax())):
            raise _too_large(self.source, name, self.width)
        return {name: rounded.contiguous()}

    def _given_back(self, made: tuple[str, Tensors]) -> tuple[str | None, str | None]:
        """The digest of what the tensors of a weight give back (None unless it is a matrix), and what became of its
        lattice (None where the checkpoint has none)."""
        name, tensors = made
        lattice = self.source.lattice.get(name)
        if name in self.packed:
            return digest(self.packed[name].dequantize()), None if lattice is None else "exact"
        value = tensors[name].float().numpy()
        value = value.T if self.source.stores_transposed(name) else value
        exact = self.width == "fp32" or lattice is None or np.array_equal(value, lattice.dequantize())
        stored = "exact" if exact else f"rounded to {self.width}"
        return digest(value) if value.ndim == 2 else None, None if lattice is None else stored

    def settings(self) -> None:
        """config.json, generation_config.json and the tokenizer."""
        config = clean_config(read_json(self.source.directory / "config.json"))
        config.pop("torch_dtype", None)
        config |= {"dtype": self.dtype, "tie_word_embeddings": self.source.tied}
        if self.packing is not None:
            skipped = [self.source.architecture.head, *self.kept_plain]
            config["quantization_config"] = {
                "quant_method": self.packing.method,
                **self.packing.settings(self.dtype),
                self.packing.skip_key: [name.removesuffix(".weight") for name in skipped],
            }
        _write_json(self.directory / "config.json", config)
        generation = self.source.directory / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, self.directory / generation.name)
        self.source.write_tokenizer(self.directory)

    def sidecar(self) -> None:
        """Codes and scales beside plain weights: rounded weights alone would not be those that were trained."""
        if self.packing is None and self.source.lattice:
            save_sidecar(self.directory, self.source.lattice)
            sync(self.directory / SIDECAR)


# ---------------------------------------------------------------- packed widths


NF4_LAYOUT = Nf4()
NF4_ROWS = 32
INT8_LAYOUT = Int8()
BITNET_LAYOUT = BitNet()


def _nf4_why_not(lattice: LatticeTensor) -> str | None:
    """Beyond the format, what bitsandbytes 0.50 can run on a CPU: it reads a weight as if every row began a block, and
    rows in packs of `NF4_ROWS`."""
    rows, columns = lattice.codes.shape
    if columns % NF4_LAYOUT.block:
        return f"{columns} columns are no multiple of the block of {NF4_LAYOUT.block}"
    if rows % NF4_ROWS:
        return f"{rows} rows are no multiple of {NF4_ROWS}"
    return NF4_LAYOUT.holds_exactly(lattice)


def _nf4_tensors(layer: str, lattice: LatticeTensor, dtype: str) -> Tensors:
    import torch

    codes, absmax = NF4_LAYOUT.pack(lattice)
    state = {"quant_type": "nf4", "blocksize": NF4_LAYOUT.block, "dtype": dtype, "shape": list(lattice.codes.shape)}
    return {
        f"{layer}weight": torch.from_numpy(codes.reshape(-1, 1)),
        f"{layer}weight.absmax": torch.from_numpy(absmax.copy()),
        f"{layer}weight.quant_map": torch.from_numpy(NF4.copy()),
        f"{layer}weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def _int8_tensors(layer: str, lattice: LatticeTensor, dtype: str) -> Tensors:
    import torch

    codes, absmax = INT8_LAYOUT.pack(lattice)
    return {
        f"{layer}weight": torch.from_numpy(codes),
        f"{layer}SCB": torch.from_numpy(absmax.copy()),
        f"{layer}weight_format": torch.tensor(0, dtype=torch.uint8),  # row by row
    }


def _bitnet_tensors(layer: str, lattice: LatticeTensor, dtype: str) -> Tensors:
    import torch

    codes, scale = BITNET_LAYOUT.pack(lattice)
    return {
        f"{layer}weight": torch.from_numpy(codes),
        f"{layer}weight_scale": torch.from_numpy(scale).to(getattr(torch, dtype)),
    }


def _nf4_settings(dtype: str) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def _int8_settings(dtype: str) -> dict[str, Any]:
    return {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}


def _bitnet_settings(dtype: str) -> dict[str, Any]:
    """autobitlinear multiplies by the scale, so that it is the lattice's own; bitlinear divides by an inverse."""
    return {"linear_class": "autobitlinear", "quantization_mode": "offline", "use_rms_norm": False}


PACKINGS: Mapping[str, Packing] = {
    "nf4": Packing(
        method="bitsandbytes",
        skip_key="llm_int8_skip_modules",
        settings=_nf4_settings,
        why_not=_nf4_why_not,
        round=round_nf4,
        tensors=_nf4_tensors,
        packages=("bitsandbytes", "accelerate"),
    ),
    "int8": Packing(
        method="bitsandbytes",
        skip_key="llm_int8_skip_modules",
        settings=_int8_settings,
        why_not=INT8_LAYOUT.holds_exactly,
        round=lambda weight: round_int(weight, bits=8, group=None, scale_dtype=np.float32),
        tensors=_int8_tensors,
        packages=("bitsandbytes", "accelerate"),
    ),
    "ternary": Packing(
        method="bitnet",
        skip_key="modules_to_not_convert",
        settings=_bitnet_settings,
        why_not=BITNET_LAYOUT.holds_exactly,
        round=None,
        tensors=_bitnet_tensors,
        packages=("accelerate",),
        conv1d=False,
    ),
}
"""The packed widths."""


def _out_of_reach(source: Source, name: str, packing: Packing) -> str | None:
    """Why no weight of this layer could be packed, whatever its values."""
    if source.stores_transposed(name) and not packing.conv1d:
        return "transformers replaces only nn.Linear layers by packed ones, and this is a Conv1D"
    return None


def _needs_more_scales(lattice: LatticeTensor) -> bool:
    """Whether a ternary weight was trained with more scales than one."""
    return lattice.levels == "ternary" and lattice.single_scale is None


# ---------------------------------------------------------------- files


_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def _shards(source: Source, item: int, packed: Mapping[str, LatticeTensor]) -> Iterator[list[str]]:
    """The names of the tensors, cut into files."""
    names: list[str] = []
    size = 0
    for name in source.names:
        more = prod(source.shape(name)) * (1 if name in packed else item)
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(path)


# ---------------------------------------------------------------- what cannot be


def _too_many_scales(source: Source, name: str, reason: str) -> BadInput:
    return BadInput(
        "EW-530",
        f"packed BitNet cannot hold the ternary weight {name!r}: {reason}",
        where=source.directory.absolute(),
        expected="one scale per tensor: train with granularity: tensor",
        found=f"scales {list(source.lattice[name].scales.shape)}",
        fix="export to gguf (tq2_0), genai, onnx or openvino (ternary), or to hf as nf4, which hold it exactly",
    )


def _nothing_to_pack(source: Source, quant: str, reason: str) -> BadInput:
    return BadInput(
        "EW-530",
        f"no weight of this model can be packed as {quant}",
        where=source.directory.absolute(),
        expected="weights of linear layers that the packing holds",
        found=f"{len(source.linears)} linear weights; of the first: {reason}",
        fix="choose another width; a ternary model must be trained with the ternary method",
    )


def _two_precisions(quant: str, embedding_quant: str | None) -> BadInput:
    return BadInput(
        "EW-531",
        "a plain Hugging Face directory has one precision",
        expected=f"embedding_quant {quant}, or none",
        found=embedding_quant,
        fix="leave embedding_quant out, or choose a packed width (nf4, int8, ternary)",
    )


def _too_large(source: Source, name: str, width: str) -> BadInput:
    return BadInput(
        "EW-508",
        f"the weight {name!r} is too large for {width}",
        where=source.directory.absolute(),
        expected="values that the type holds",
        found=f"up to {np.abs(source.tensor(name)).max():.3g}",
        fix="choose bf16 or fp32",
    )
