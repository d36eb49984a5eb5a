"""Damage to written files: what a wrong exporter, a bad disk or a careless hand would do to them.

Each target's file is opened as arrays that can be changed, by the names of the checkpoint; every kind of damage is then
one function for all of them. Nothing of the exporters is used, only the formats' own packages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gguf
import numpy as np

HEADS = 8
"""Of queries in stories260K."""
ROWS = {"q_proj": slice(0, 64), "up_proj": slice(172, 344)}
"""Which rows of a matrix that holds several weights are one's own."""

QUERY = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
OTHER_UP = "model.layers.3.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@dataclass(frozen=True)
class Stored:
    """A weight in a file: views into its bytes, or arrays that are written back."""

    rows: list[np.ndarray]
    """Codes and scales (or values), each with the rows of the weight first."""
    scales: np.ndarray
    """What multiplies the codes; the values themselves where there are none."""


Open = Callable[[str], Stored]


# ---------------------------------------------------------------- kinds


def wrong_rope_order(open_: Open) -> None:
    """Queries in neighbouring pairs where halves belong, or the other way round, in one layer."""
    for array in open_(QUERY).rows:
        heads = array.reshape(HEADS, -1, *array.shape[1:])
        array[:] = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(array.shape)


def doubled_scale(open_: Open) -> None:
    """All scales of one weight."""
    scales = open_(UP).scales
    scales[:] = scales * 2


def swapped_tensors(open_: Open) -> None:
    """Two weights of one shape in each other's place."""
    for one, other in zip(open_(UP).rows, open_(OTHER_UP).rows, strict=True):
        one[:], other[:] = other.copy(), one.copy()


def changed_norm(open_: Open) -> None:
    values = open_(NORM).scales
    values[: len(values) // 2] = values[: len(values) // 2] * 1.5


def flipped_code(open_: Open) -> None:
    """One bit of one weight."""
    codes = open_(UP).rows[0]
    place = tuple(size // 2 for size in codes.shape)
    codes[place] = np.nextafter(codes[place], np.inf) if codes.dtype.kind == "f" else codes[place] ^ 1


WEIGHTS = {
    "RoPE order": wrong_rope_order,
    "doubled scale": doubled_scale,
    "swapped tensors": swapped_tensors,
    "changed norm": changed_norm,
    "flipped code": flipped_code,
}
"""Damage that the first guard sees, the one that reads the weights."""

IMMATERIAL = frozenset({"flipped code"})
"""What no runtime can notice: one weight of millions, by one step."""


# ---------------------------------------------------------------- formats


@contextmanager
def opened_gguf(path: Path) -> Iterator[Open]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)

    def stored(name: str) -> Stored:
        tensor = tensors[str(names.get_name(name, try_suffixes=(".weight",)))]
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            return Stored([tensor.data], tensor.data)
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        blocks = tensor.data.reshape(len(tensor.data), -1, 34)  # half-precision scale, 32 codes
        return Stored([blocks[:, :, 2:], blocks[:, :, :2]], blocks[:, :, :2].view(np.float16))

    yield stored


@contextmanager
def opened_onnx(path: Path) -> Iterator[Open]:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path / "model.onnx")
    arrays = {each.name: numpy_helper.to_array(each).copy() for each in model.graph.initializer}
    yield lambda name: _packed(arrays, name)
    for each in model.graph.initializer:
        each.CopyFrom(numpy_helper.from_array(arrays[each.name], each.name))
    (path / "model.onnx.data").unlink()
    onnx.save(model, path / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def _packed(arrays: dict[str, np.ndarray], name: str) -> Stored:
    """A weight of a graph: a matrix of its own, or some rows of one that joins several by their names."""
    if name in arrays:
        return Stored([arrays[name]], arrays[name])
    stem = next(each.removesuffix("_Q8") for each in arrays if each.endswith("_Q8") and name in each[:-3].split("+"))
    rows = next((rows for part, rows in ROWS.items() if "+" in stem and part in name), slice(None))
    codes, scales = (arrays[f"{stem}{end}"][rows] for end in ("_Q8", "_scales"))
    return Stored([codes, scales], scales)


@contextmanager
def opened_openvino(path: Path) -> Iterator[Open]:
    """The graph is XML; a constant in it says where its bytes lie."""
    net = ElementTree.parse(path / "openvino_model.xml").getroot()
    layers = {layer.get("id"): layer for layer in net.iter("layer")}
    ids = {layer.get("name"): number for number, layer in layers.items()}
    inputs: dict[Any, list[Any]] = {}
    for edge in net.iter("edge"):
        inputs.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    types = {"i8": np.int8, "f16": np.float16, "f32": np.float32}

    def constants(number: Any) -> Iterator[np.ndarray]:
        """What a layer is computed from."""
        data = layers[number].find("data")
        if layers[number].get("type") == "Const" and data is not None and data.get("element_type") in types:
            dtype, shape = (
                types[str(data.get("element_type"))],
                [int(size) for size in str(data.get("shape")).split(",")],
            )
            yield np.memmap(path / "openvino_model.bin", dtype, "r+", int(str(data.get("offset"))), tuple(shape))
        for other in inputs.get(number, []):
            yield from constants(other)

    def stored(name: str) -> Stored:
        arrays = sorted(constants(ids[name]), key=lambda array: -array.size)[:2]
        return Stored(arrays, arrays[-1])

    yield stored


@contextmanager
def opened_hf(path: Path) -> Iterator[Open]:
    from safetensors.numpy import load_file, save_file

    weights = {name: np.array(value) for name, value in load_file(path / "model.safetensors").items()}
    yield lambda name: Stored([weights[name]], weights[name])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


OPENED: dict[str, Callable[[Path], Any]] = {
    "gguf": opened_gguf,
    "onnx": opened_onnx,
    "genai": opened_onnx,
    "openvino": opened_openvino,
    "hf": opened_hf,
}

QUANT = {"gguf": "q8_0", "onnx": "int8", "genai": "int8", "openvino": "int8", "hf": "fp32"}
"""A width with codes and scales, where the target has one; fine enough for a wrong weight to stand out."""


def damaged(path: Path, to: str, kind: str, place: Path) -> Path:
    """A copy of an exported file, with one kind of damage."""
    copy = place / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    with OPENED[to](copy) as open_:
        WEIGHTS[kind](open_)
    return copy


# ---------------------------------------------------------------- what is no weight


def shift_vocabulary(path: Path) -> None:
    """Two common pieces of text in each other's place, in the file that the runtime's tokenizer is made from."""
    if path.is_dir():
        file = path / "tokenizer.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["▁and"], vocabulary["▁was"] = vocabulary["▁was"], vocabulary["▁and"]
        file.write_text(json.dumps(tokenizer), encoding="utf-8")
        return
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["tokenizer.ggml.tokens"]
    texts = [bytes(field.parts[index]).decode() for index in field.data]
    one, other = field.data[texts.index("▁and")], field.data[texts.index("▁was")]
    first, second = field.parts[one], field.parts[other]
    assert len(first) == len(second)
    first[:], second[:] = second.copy(), first.copy()


def truncate(path: Path) -> None:
    """The last third of the weights is missing."""
    file = path if path.is_file() else max(path.iterdir(), key=lambda each: each.stat().st_size)
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size * 2 // 3)
