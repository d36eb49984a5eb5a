"""What `doctor` tries, each probe in a process of its own: a library that crashes takes only its probe along.

`python -m edgewright.doctor_probes NAME` runs one probe and prints what it found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from edgewright.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing to try."""

    name: str
    packages: tuple[str, ...]
    """Import names; if one cannot be found, the probe is `missing` rather than `failed`."""
    extra: str | None
    """The extra that installs them; None: they are required."""
    run: Callable[[], str]
    """Exercises it; returns what was found, raises anything if it does not work."""


def _torch() -> str:
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        product = torch.ones(4, 8, dtype=dtype) @ torch.ones(8, 4, dtype=dtype)
        if product.sum().item() != 128:
            raise ArithmeticError(f"a matrix product in {dtype} is wrong")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: trains on the CPU"
    return f"{version('torch')}, {torch.get_num_threads()} threads, {device}"


def _transformers() -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig.from_dict({**sizes, "vocab_size": 16}))
    with torch.no_grad():
        shape = tuple(model(torch.zeros(1, 3, dtype=torch.long)).logits.shape)
    if shape != (1, 3, 16):
        raise ArithmeticError(f"a small Llama gave logits of shape {shape}")
    return version("transformers")


def _tokenizers() -> str:
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 0, "b": 1, "ab": 2}
    ids = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")])).encode("abb").ids
    if ids != [2, 1]:
        raise ArithmeticError(f"'abb' became {ids}")
    return version("tokenizers")


def _onnxruntime() -> str:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result = session.run(None, {"x": np.array([1, 2], dtype=np.float32)})[0]
    if list(result) != [2, 4]:
        raise ArithmeticError(f"x + x gave {result}")
    return f"{version('onnxruntime')}, onnx {version('onnx')}"


def _gguf() -> str:
    import gguf
    import numpy as np

    from edgewright.export.guard import check_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("t", np.ones((2, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_gguf(path)
    return version("gguf")


def _genai() -> str:
    import numpy as np
    import onnxruntime_genai

    tensor = onnxruntime_genai.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
    if list(tensor.shape()) != [2, 3]:
        raise ArithmeticError(f"a tensor of [2, 3] has the shape {tensor.shape()}")
    return version("onnxruntime-genai")


def _llamacpp() -> str:
    import llama_cpp

    llama_cpp.llama_backend_init()
    features = llama_cpp.llama_print_system_info().decode()
    names = [part.split(" = ")[0].split(" : ")[-1].strip() for part in features.split("|") if " = 1" in part]
    return f"{version('llama-cpp-python')}, {' '.join(names)}"


def _openvino() -> str:
    import numpy as np

    from edgewright.export.openvino.package import load, own_signal_stack

    ov = load()
    for package in ("openvino_genai", "openvino_tokenizers"):
        load(package)
    value = ov.opset13.parameter([2], np.float32)
    model = ov.Model([ov.opset13.result(ov.opset13.add(value, value))], [value], "twice")
    core = ov.Core()
    with own_signal_stack():
        result = core.compile_model(model, "CPU")([np.array([1, 2], np.float32)])[0]
    if list(result) != [2, 4]:
        raise ArithmeticError(f"x + x gave {result}")
    return f"{version('openvino')}, genai {version('openvino-genai')}, devices {' '.join(core.available_devices)}"


def _import(package: str, distribution: str) -> Callable[[], str]:
    """A probe of a package that has nothing quick to exercise."""

    def run() -> str:
        __import__(package)
        return version(distribution)

    return run


def _datasets() -> str:
    from datasets import Dataset

    if Dataset.from_dict({"text": ["a", "b"]})[1]["text"] != "b":
        raise ArithmeticError("a data set of two rows lost one")
    return version("datasets")


def _compiler() -> str:
    """torch.compile on a CPU needs a C++ compiler with OpenMP."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    compiler = get_cpp_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1).empty(); }\n", encoding="utf-8")
        command = [compiler, "-std=c++17", "-o", str(Path(folder) / "probe"), str(source)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise BadInput("EW-608", f"{compiler} does not compile: {finished.stderr.strip()[:200]}")
    return str(compiler)


PROBES = (
    Probe(name="torch", packages=("torch",), extra=None, run=_torch),
    Probe(name="transformers", packages=("transformers",), extra=None, run=_transformers),
    Probe(name="tokenizers", packages=("tokenizers",), extra=None, run=_tokenizers),
    Probe(name="onnxruntime", packages=("onnx", "onnxruntime"), extra=None, run=_onnxruntime),
    Probe(name="gguf", packages=("gguf",), extra=None, run=_gguf),
    Probe(name="genai", packages=("onnxruntime_genai", "onnx_ir"), extra="genai", run=_genai),
    Probe(name="llamacpp", packages=("llama_cpp",), extra="llamacpp", run=_llamacpp),
    Probe(
        name="openvino",
        packages=("openvino", "openvino_genai", "openvino_tokenizers"),
        extra="openvino",
        run=_openvino,
    ),
    Probe(name="eval", packages=("lm_eval",), extra="eval", run=_import("lm_eval", "lm-eval")),
    Probe(name="track", packages=("trackio",), extra="track", run=_import("trackio", "trackio")),
    Probe(name="energy", packages=("zeus",), extra="energy", run=_import("zeus", "zeus")),
    Probe(name="data", packages=("datasets",), extra="data", run=_datasets),
)
COMPILER = Probe(name="compiler", packages=("torch",), extra=None, run=_compiler)


def main(name: str) -> None:
    """Run one probe; its finding is the only thing on standard output."""
    kept = os.dup(1)
    os.dup2(2, 1)
    probe = next(probe for probe in (*PROBES, COMPILER) if probe.name == name)
    found = probe.run()
    os.write(kept, found.encode())


if __name__ == "__main__":
    main(sys.argv[1])
