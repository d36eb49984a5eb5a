"""The vendor's builder: a Hugging Face directory becomes an fp32 folder that ONNX Runtime GenAI runs on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from edgewright.errors import BadInput
from edgewright.export.scratch import scratch

PACKAGES = ("onnxruntime_genai", "onnx_ir")
"""What the builder imports; onnxruntime-genai does not declare the second one."""


def check_installed() -> None:
    """Raises BadInput (EW-603) where onnxruntime-genai, or what its builder needs, is missing."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInput(
            "EW-603",
            "ONNX Runtime GenAI, or what its model builder needs, is not installed",
            expected="the packages of the extra `genai`",
            found=f"no {' and no '.join(missing)}",
            fix='pip install "edgewright[genai]"',
        )


def build(model: Path, directory: Path) -> None:
    """Run the builder, as a process of its own, offline: it prints a lot, and keeps the model in memory.

    Args:
        model: a Hugging Face directory.
        directory: gets model.onnx, its data, genai_config.json and the tokenizer.

    Raises:
        BadInput: EW-603, it is not installed; EW-520, it cannot make a graph of this model.
    """
    check_installed()
    with scratch(directory) as place:
        given = _in_float32(model, place / "model")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(given)]
        command += ["-o", str(directory.resolve()), "-p", "fp32", "-e", "cpu", "-c", str(place)]
        result = subprocess.run(
            command,
            env=_environment(str(place)),
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    if result.returncode or not (directory / "model.onnx").is_file() or not (directory / "genai_config.json").is_file():
        raise BadInput(
            "EW-520",
            "the GenAI model builder cannot turn this model into a graph",
            where=model.absolute(),
            expected="a causal language model with its tokenizer, as save_pretrained writes them",
            found=(result.stdout.strip().splitlines() or ["no output"])[-1],
            fix="export to gguf, or save the model and its tokenizer again with save_pretrained",
        )


def _in_float32(model: Path, directory: Path) -> Path:
    """The same model with a config that says float32: the builder rounds the weights to the type that stands there."""
    directory.mkdir(parents=True)
    for path in model.resolve().iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return directory


def _environment(home: str) -> dict[str, str]:
    """The caller's environment without what could make the builder reach out, warn, or find the caller's caches."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "TOKENIZERS_PARALLELISM": "false"}
