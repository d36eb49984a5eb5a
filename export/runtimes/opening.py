"""Which runtime opens which path."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from edgewright.errors import BadInput
from edgewright.export.guard import check_genai_folder, check_not_archive, check_onnx_folder, check_openvino_folder
from edgewright.export.runtimes.session import Session

SESSIONS = {
    "torch": ("torch_session", "TorchSession", "torch", "pip install edgewright"),
    "llamacpp": ("llamacpp", "LlamaCppSession", "llama_cpp", "pip install 'edgewright[llamacpp]'"),
    "genai": ("genai", "GenaiSession", "onnxruntime_genai", "pip install 'edgewright[genai]'"),
    "onnx": ("onnx", "OnnxSession", "onnxruntime", "pip install edgewright"),
    "openvino": ("openvino", "OpenVinoSession", "openvino_genai", "pip install 'edgewright[openvino]'"),
}
"""For each runtime its module and class, the package it needs, and the line that installs that."""

MARKERS = {"genai_config.json": "genai", "openvino_model.xml": "openvino", "model.onnx": "onnx"}
"""The file that tells which runtime a folder is for, the most telling first."""

CHECKS = {"genai": check_genai_folder, "onnx": check_onnx_folder, "openvino": check_openvino_folder}
"""What must hold before a runtime sees a folder; the other sessions check their files themselves."""

TARGET_OF = {"torch": "hf", "llamacpp": "gguf", "genai": "genai", "onnx": "onnx", "openvino": "openvino"}
"""The target whose artifacts a runtime opens."""


def open_session(path: Path | str, *, threads: int | None = None) -> Session:
    """Open a model in the runtime that it is for.

    Args:
        path: a Hugging Face directory (torch, float32), a .gguf file or a folder with exactly one (llama.cpp), or a
            folder with genai_config.json (ONNX Runtime GenAI), openvino_model.xml (OpenVINO GenAI) or model.onnx
            (ONNX Runtime).
        threads: of the runtime; by default its own choice.

    Raises:
        BadInput: EW-601, this is none of them; EW-603, the runtime is not installed; and what the guard
            and the runtime refuse.
        Unsafe: what the guard refuses.
    """
    runtime, target = runtime_of(Path(path))
    module, name, package, install = SESSIONS[runtime]
    if importlib.util.find_spec(package) is None:
        raise BadInput(
            "EW-603",
            f"the runtime of this model is not installed: {package}",
            where=target.absolute(),
            fix=install,
        )
    session: Session = vars(importlib.import_module(f"edgewright.export.runtimes.{module}"))[name](
        target, threads=threads
    )
    return session


def runtime_of(path: Path) -> tuple[str, Path]:
    """The runtime of a path, a key of `SESSIONS`, and the file or folder to open with it, which the guard has passed.

    Raises:
        BadInput: EW-601, this is no model.
        Unsafe, BadInput: what the guard refuses, before a library sees it; EW-336, it is an archive.
    """
    runtime, target = _runtime_of(path)
    if runtime in CHECKS:
        CHECKS[runtime](target)
    return runtime, target


def _runtime_of(path: Path) -> tuple[str, Path]:
    if path.is_file() and path.suffix == ".gguf":
        return "llamacpp", path
    check_not_archive(path)
    if not path.is_dir():
        raise _not_a_model(path, "this file is not a model" if path.exists() else "there is no such model", None)
    for marker, runtime in MARKERS.items():
        if (path / marker).is_file():
            return runtime, path
    files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("."))
    if len(files) == 1:
        return "llamacpp", files[0]
    if files:
        raise _not_a_model(path, "this folder holds several models", ", ".join(file.name for file in files))
    if (path / "config.json").is_file():
        return "torch", path
    names = sorted(entry.name for entry in path.iterdir())
    raise _not_a_model(path, "this folder holds no model", ", ".join(names[:8]) or "an empty folder")


def _not_a_model(path: Path, what: str, found: str | None) -> BadInput:
    return BadInput(
        "EW-601",
        what,
        where=path.absolute(),
        expected=f"a Hugging Face model directory, a .gguf file, or a folder with {', '.join(MARKERS)}",
        found=found,
        fix="name the file or the directory itself",
    )
