"""One lattice, every runtime: what was trained on a lattice comes back bit for bit from every file that can hold it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lattices import random_lattice
from safetensors.torch import load_file, save_file

import edgewright
from edgewright.export.lattice import LatticeTensor, save_sidecar
from edgewright.export.source import load_source
from edgewright.export.targets import reader_of

# transformers compiles parts of packed BitNet, and torch's compiler imports something that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

Make = Callable[[str, tuple[int, int], int], LatticeTensor]

LATTICES: dict[str, Make] = {
    "ternary per tensor": lambda name, shape, seed: random_lattice("ternary", *shape, None, seed, per_tensor=True),
    "ternary per row": lambda name, shape, seed: random_lattice("ternary", *shape, None, seed),
    "int4 per 32": lambda name, shape, seed: random_lattice("int4", *shape, 32, seed),
    "int4 per row": lambda name, shape, seed: random_lattice("int4", *shape, None, seed),
    "int8 per 32": lambda name, shape, seed: random_lattice("int8", *shape, 32, seed),
    "int8 per row": lambda name, shape, seed: random_lattice("int8", *shape, None, seed),
}
EXACT = {
    "ternary per tensor": {
        "gguf": ("tq2_0", "tq1_0", "q2_0", "q4_0", "q5_0", "q8_0"), "onnx": ("ternary", "int4", "int8"),
        "genai": ("ternary",), "openvino": ("ternary", "int4", "int8"), "hf": ("ternary", "nf4", "int8"),
    },
    "ternary per row": {
        "gguf": ("tq2_0", "tq1_0", "q2_0", "q8_0"), "onnx": ("ternary", "int8"), "genai": ("ternary",),
        "openvino": ("ternary",), "hf": ("nf4", "int8"),
    },
    "int4 per 32": {
        "gguf": ("q4_0", "q4_1", "q8_0"), "onnx": ("int4", "int8"), "genai": ("int4",), "openvino": ("int4",),
    },
    "int4 per row": {
        "gguf": ("q4_0", "q8_0"), "onnx": ("int4", "int8"), "openvino": ("int4", "int8"), "hf": ("int8",),
    },
    "int8 per 32": {"gguf": ("q8_0",), "onnx": ("int8",), "genai": ("int8",), "openvino": ("int8",)},
    "int8 per row": {"gguf": ("q8_0",), "onnx": ("int8",), "openvino": ("int8",), "hf": ("int8",)},
}  # fmt: skip
"""The widths that hold each lattice exactly, none of it in a wider type."""

PACKAGES = {"gguf": "llama_cpp", "genai": "onnxruntime_genai", "openvino": "openvino", "onnx": "onnx", "hf": "torch"}
QUICK = {
    ("ternary per tensor", "onnx", "ternary"),
    ("ternary per row", "openvino", "ternary"),
    ("ternary per row", "genai", "ternary"),
    ("int4 per 32", "openvino", "int4"),
}
"""Of the targets whose packages take seconds to load, what is looked at every time."""
CASES = [
    pytest.param(
        kind, to, quant, marks=[] if to in ("gguf", "hf") or (kind, to, quant) in QUICK else [pytest.mark.slow]
    )
    for kind, targets in EXACT.items()
    for to, quants in targets.items()
    for quant in quants
]


@pytest.fixture(scope="session")
def trained(ternary_model, tmp_path_factory) -> Callable[[str], Path]:
    """A Llama of each kind of `LATTICES`, all of whose linear layers were trained on it. Made once."""
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind in made:
            return made[kind]
        path = tmp_path_factory.mktemp("trained") / kind.replace(" ", "_")
        shutil.copytree(ternary_model, path)
        source = load_source(ternary_model)
        tensors = load_file(path / "model.safetensors")
        lattice = {}
        for seed, name in enumerate(source.linears):
            lattice[name] = LATTICES[kind](name, source.matrix(name).shape, seed)
            scale = np.float32(0.25) / np.abs(lattice[name].codes).max()
            spread = lattice[name].scales / lattice[name].scales.max()
            lattice[name].scales[...] = ((0.5 + spread) * scale).astype(np.float16)
            tensors[name] = torch.from_numpy(lattice[name].dequantize())
        save_file(tensors, path / "model.safetensors")
        save_sidecar(path, lattice)
        made[kind] = path
        return path

    return model


@pytest.mark.parametrize(("kind", "to", "quant"), CASES)
def test_what_was_trained_comes_back_bit_for_bit(kind, to, quant, trained, tmp_path):
    if importlib.util.find_spec(PACKAGES[to]) is None:
        pytest.skip(f"{PACKAGES[to]} is not installed")
    model = trained(kind)
    source = load_source(model)
    artifact = edgewright.export(model, to=to, quant=quant, out=tmp_path / "out", verify=False, threads=1)
    assert artifact.fallbacks == []
    back = dict(reader_of(to).read_weights(artifact.path, source))
    assert len(source.lattice) == 14
    unequal = [name for name, each in source.lattice.items() if not np.array_equal(back[name], each.dequantize())]
    assert unequal == []


@pytest.mark.parametrize("kind", sorted(LATTICES))
def test_no_sidecar_is_needed(kind, trained, tmp_path):
    """The same lattices are found in the plain weights."""
    model = trained(kind)
    with_sidecar = load_source(model)
    shutil.copytree(model, tmp_path / "plain")
    (tmp_path / "plain" / "lattice.safetensors").unlink()
    plain = load_source(tmp_path / "plain")
    assert plain.lattice.keys() == with_sidecar.lattice.keys()
    for name, lattice in plain.lattice.items():
        assert lattice.levels == with_sidecar.lattice[name].levels
        assert np.array_equal(lattice.dequantize(), with_sidecar.lattice[name].dequantize())
