"""Checkpoints with packed weights, read as lattices: transformers' BitNet, bitsandbytes' NF4 and int8."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout.transformers import BitNet, Int8, Nf4

Tensors = Mapping[str, Any]
"""The torch tensors that belong to one packed weight, by what their names add to the weight's or its layer's."""

Settings = Mapping[str, Any]
"""quantization_config of config.json."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A way to pack the weights of linear layers."""

    companions: tuple[str, ...]
    """What stands beside a packed `weight` in the files, by what follows the layer's name; the first always does."""
    unpack: Callable[[Tensors, tuple[int, int], Settings], LatticeTensor]
    """From the tensors of a weight, its shape `[out, in]` and the settings."""

    def is_companion(self, stored: str) -> bool:
        """Whether a tensor in the files belongs to a packed weight."""
        return stored.endswith(tuple(f".{name}" for name in self.companions))

    def is_packed(self, stored: str, names: Container[str]) -> bool:
        """Whether the weight that the files call `stored` is packed, given all names in the files."""
        return stored.removesuffix("weight") + self.companions[0] in names

    def read(self, paths: Mapping[str, Path], stored: str, shape: tuple[int, int], settings: Settings) -> LatticeTensor:
        """The lattice of the weight that the files call `stored`, of `shape` `[out, in]`.

        Args:
            paths: the file of every tensor in the files; a weight's companions may lie in other files.
            stored: a name in the files that ends in `weight`.
            shape: `[out, in]`.
            settings: quantization_config.

        Raises:
            BadInput: EW-326, its tensors contradict each other.
        """
        from safetensors import safe_open

        tensors, layer = {}, stored.removesuffix("weight")
        for name in ("weight", *self.companions):
            if layer + name in paths:
                with safe_open(paths[layer + name], framework="pt") as file:
                    tensors[name] = file.get_tensor(layer + name)
        try:
            lattice = self.unpack(tensors, shape, settings)
            if lattice.codes.shape != shape:
                raise ValueError(f"the shape {lattice.codes.shape}, not {shape}")
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise BadInput(
                "EW-326",
                f"the packed weight {stored!r} cannot be read",
                where=paths[stored].absolute(),
                expected=f"codes and scales of a weight {list(shape)}",
                found=str(error)[:200],
                fix="download the model again, or save it again without quantization",
            ) from error
        return lattice


def find_packing(directory: Path, config: Mapping[str, Any]) -> Packing | None:
    """How the weights of a model directory are packed, by its config.json; None for plain weights.

    Raises:
        BadInput: EW-326, in a way that is not read.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    kind = _kind(settings) if isinstance(settings, dict) else "?"
    if kind not in PACKINGS:
        raise BadInput(
            "EW-326",
            f"a quantization_config of the kind {kind} is not read",
            where=(directory / "config.json").absolute(),
            expected=f"plain weights, or one of: {', '.join(PACKINGS)}",
            found=json.dumps(settings)[:200],
            fix="export the model that it was made from, or save it dequantized (model.dequantize() in transformers)",
        )
    return PACKINGS[kind]


def _kind(settings: Settings) -> str:
    """The key of `PACKINGS` for a quantization_config, or words for what it is."""
    method = str(settings.get("quant_method"))
    if method == "bitsandbytes":
        if settings.get("load_in_8bit"):
            return "bitsandbytes int8"
        return f"bitsandbytes {settings.get('bnb_4bit_quant_type', 'fp4')}"
    if method == "bitnet":
        online = settings.get("linear_class") == "autobitlinear" and settings.get("quantization_mode") == "online"
        extra = " online" if online else " with norms" if settings.get("use_rms_norm") else ""
        return f"bitnet{extra}"
    return method


def _bitnet(tensors: Tensors, shape: tuple[int, int], settings: Settings) -> LatticeTensor:
    """bitlinear divides by `weight_scale`; autobitlinear multiplies, and its codes may also be plain numbers."""
    weight, scale = tensors["weight"], tensors["weight_scale"].float().numpy()
    layout = BitNet(inverse=settings.get("linear_class", "bitlinear") == "bitlinear")
    if weight.dtype.itemsize == 1:
        return layout.unpack(weight.numpy(), scale)
    codes = weight.float().numpy()
    if layout.inverse or not np.isin(codes, (-1, 0, 1)).all():
        raise ValueError("codes that are neither packed nor -1, 0, 1")
    return LatticeTensor(codes=codes.astype(np.int8), scales=scale.reshape(1, 1), group=None, bits=2, levels="ternary")


def _nf4(tensors: Tensors, shape: tuple[int, int], settings: Settings) -> LatticeTensor:
    """Double quantization has packed the scales in 8 bits again; they are unpacked first."""
    state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].numpy()))
    absmax = tensors["weight.absmax"]
    if "nested_offset" in state:
        values = tensors["weight.nested_quant_map"][absmax.long()]
        blocks = tensors["weight.nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))[: len(absmax)]
        absmax = values * blocks + state["nested_offset"]
    if tuple(state["shape"]) != shape:
        raise ValueError(f"the shape {state['shape']}, not {list(shape)}")
    layout = Nf4(block=int(state["blocksize"]))
    return layout.unpack(tensors["weight"].numpy().ravel(), absmax.float().numpy(), shape)


def _int8(tensors: Tensors, shape: tuple[int, int], settings: Settings) -> LatticeTensor:
    if int(tensors.get("weight_format", np.zeros(1))) != 0:
        raise ValueError("the weights are in the order of some GPU, not row by row")
    return Int8().unpack(tensors["weight"].numpy(), tensors["SCB"].float().numpy())


PACKINGS: dict[str, Packing] = {
    "bitnet": Packing(("weight_scale",), _bitnet),
    "bitsandbytes nf4": Packing(
        (
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
        ),
        _nf4,
    ),
    "bitsandbytes int8": Packing(("SCB", "weight_format"), _int8),
}
"""What is read, by kind."""
