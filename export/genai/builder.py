"""The vendor's builder: a Hugging Face directory becomes an fp32 folder that ONNX Runtime GenAI runs on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from edgewright.errors import BadInput

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
    with tempfile.TemporaryDirectory(prefix="edgewright-builder-") as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model.resolve())]
        command += ["-o", str(directory.resolve()), "-p", "fp32", "-e", "cpu", "-c", scratch]
        result = subprocess.run(
            command,
            env=_environment(scratch),
            cwd=scratch,
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


def _environment(scratch: str) -> dict[str, str]:
    """The caller's environment without what could make the builder reach out, warn, or find the caller's caches."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "TOKENIZERS_PARALLELISM": "false"}
