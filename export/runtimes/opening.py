"""Which runtime opens which path."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import ExitStack
from pathlib import Path

from edgewright.errors import BadInput
from edgewright.export.genai.pair import check_genai_pair
from edgewright.export.guard import check_genai_folder, check_not_archive, check_onnx_folder, check_openvino_folder
from edgewright.export.pairs.bundle import Bundle, bundle_of
from edgewright.export.runtimes import spinning
from edgewright.export.runtimes.pair import PairSession
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


def open_session(path: Path | str, *, threads: int | None = None, shares_cores: bool = False) -> Session:
    """Open a model, or a target with its draft, in the runtime that it is for.

    Args:
        path: a Hugging Face directory (torch, float32), a .gguf file or a folder with exactly one (llama.cpp), or a
            folder with genai_config.json (ONNX Runtime GenAI), openvino_model.xml (OpenVINO GenAI) or model.onnx
            (ONNX Runtime); or a bundle that `export --draft` wrote.
        threads: of the runtime; by default its own choice.
        shares_cores: a session beside it in this process takes turns with it, as target and draft do. Bundles know it.

    Raises:
        BadInput: EW-601, this is none of them; EW-603, the runtime is not installed; and what the guard
            and the runtime refuse.
        Unsafe: what the guard refuses.
    """
    bundle = bundle_of(Path(path))
    if bundle is not None:
        return open_pair(bundle, threads=threads)
    runtime, target = runtime_of(Path(path))
    return _open(runtime, target, threads, shares_cores=shares_cores)


def open_pair(bundle: Bundle, *, threads: int | None = None) -> PairSession:
    """Open a bundle; errors as `open_session`, and EW-828 where GenAI could not decode with it."""
    runtime, target = runtime_of(bundle.path)
    other, draft = runtime_of(bundle.draft)
    if other != runtime:
        raise _not_a_model(bundle.path, f"its target is for {runtime}, its draft for {other}", None)
    if runtime == "genai":  # which reads a configuration of its own for the two together
        check_genai_folder(bundle.path)
        check_genai_pair(bundle.path)
    with ExitStack() as stack:  # closes the target where the draft cannot be opened
        opened = stack.enter_context(_open(runtime, target, threads))
        pair = PairSession(bundle.path, opened, _open(runtime, draft, threads), bundle.gamma)
        stack.pop_all()
    return pair


def _open(runtime: str, target: Path, threads: int | None, *, shares_cores: bool = False) -> Session:
    module, name, package, install = SESSIONS[runtime]
    if importlib.util.find_spec(package) is None:
        raise BadInput(
            "EW-603",
            f"the runtime of this model is not installed: {package}",
            where=target.absolute(),
            fix=install,
        )
    kind = vars(importlib.import_module(f"edgewright.export.runtimes.{module}"))[name]
    settings = {"shares_cores": True} if shares_cores and runtime in spinning.RUNTIMES else {}
    session: Session = kind(target, threads=threads, **settings)
    return session


def runtime_of(path: Path) -> tuple[str, Path]:
    """The runtime of a path, a key of `SESSIONS`, and the file or folder to open with it, which the guard has passed;
    of a bundle those of its target.

    Raises:
        BadInput: EW-601, this is no model.
        Unsafe, BadInput: what the guard refuses, before a library sees it; EW-336, it is an archive.
    """
    bundle = bundle_of(path)
    runtime, target = _runtime_of(path if bundle is None else bundle.target)
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
