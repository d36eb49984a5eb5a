"""Read a Hugging Face directory back, for the gate: packed weights through the libraries that defined the packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.guard import check_model_directory, read_json
from edgewright.export.lattice import SIDECAR
from edgewright.export.source import Source
from edgewright.imports import importing_bitsandbytes

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""The types of safetensors that plain matrices have, and the widths that they are."""


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every tensor; matrices `[out, in]`.

    Raises:
        BadInput: what the guard refuses; EW-326, packed in a way that is not read.
    """
    check_model_directory(path)
    unpack = _unpacker(path)
    files = _files(path)
    for key in sorted(files):
        name = source.architecture.state_name(key)
        if name is None or key not in files:
            continue
        parts = _parts(files, key) if unpack is not None else {}
        if unpack is not None and len(parts) > 1:
            yield name, unpack(parts)
            continue
        values = _tensor(files[key], key).float().numpy()
        transposed = values.ndim == 2 and source.stores_transposed(name)
        yield name, np.ascontiguousarray(values.T) if transposed else values


def widths(path: Path) -> set[str]:
    """In which widths the matrices are stored."""
    from safetensors import safe_open

    check_model_directory(path)
    found: set[str] = set()
    for file in sorted({*_files(path).values()}):
        with safe_open(file, framework="pt") as opened:
            slices = (opened.get_slice(key) for key in sorted(opened.keys()))
            found |= {DTYPES[each.get_dtype()] for each in slices if _is_plain_matrix(each)}
    settings = read_json(path / "config.json").get("quantization_config")
    return found | ({_width(settings)} if isinstance(settings, dict) else set())


def _is_plain_matrix(each: Any) -> bool:
    return len(each.get_shape()) == 2 and each.get_dtype() in DTYPES


def _width(settings: Mapping[str, Any]) -> str:
    if settings.get("quant_method") == "bitnet":
        return "ternary"
    return "int8" if settings.get("load_in_8bit") else "nf4"


def _files(path: Path) -> dict[str, Path]:
    """The file of every tensor."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        if file.name != SIDECAR:
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
    return files


def _tensor(file: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        value: torch.Tensor = opened.get_tensor(key)
    return value


def _parts(files: Mapping[str, Path], key: str) -> dict[str, torch.Tensor]:
    """A weight and all that belongs to it, by what follows the layer's name; biases do not."""
    layer = key.removesuffix("weight")
    names = [other for other in files if other.startswith(layer) and other != f"{layer}bias"] if layer != key else []
    return {name.removeprefix(layer): _tensor(files[name], name) for name in names}


def _unpacker(path: Path) -> Callable[[Tensors], np.ndarray] | None:
    """What gives the values of a packed weight back; None for a plain directory."""
    settings = read_json(path / "config.json").get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method"))
    if method not in UNPACKERS:
        raise BadInput(
            "EW-326",
            f"a quantization_config of the kind {method} is not read",
            where=(path / "config.json").absolute(),
            expected=f"one of: {', '.join(UNPACKERS)}",
            found=method,
        )
    return lambda parts: UNPACKERS[method](parts, settings)


def _bitsandbytes(parts: Tensors, settings: Mapping[str, Any]) -> np.ndarray:
    if "SCB" in parts:
        codes, absmax = parts["weight"].float(), parts["SCB"].float()
        eight: np.ndarray = (codes * (absmax / 127)[:, None]).numpy()
        return eight
    import torch

    with importing_bitsandbytes():
        from bitsandbytes.functional import QuantState, dequantize_4bit

    stored = {name.removeprefix("weight."): value for name, value in parts.items() if name != "weight"}
    state = QuantState.from_dict(stored, device=torch.device("cpu"))
    state.dtype = torch.float32
    four: np.ndarray = dequantize_4bit(parts["weight"], state).numpy()
    return four


def _bitnet(parts: Tensors, settings: Mapping[str, Any]) -> np.ndarray:
    import torch
    from transformers.integrations.bitnet import unpack_weights

    with torch.compiler.set_stance("force_eager"):  # it is compiled by default
        codes = unpack_weights(parts["weight"], dtype=torch.float32)
    scale = parts["weight_scale"].float()
    values: np.ndarray = (codes * scale if settings.get("linear_class") == "autobitlinear" else codes / scale).numpy()
    return values


UNPACKERS = {"bitsandbytes": _bitsandbytes, "bitnet": _bitnet}
"""By quant_method."""
