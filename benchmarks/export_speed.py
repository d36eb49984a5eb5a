"""How long an export takes, against the vendor's own tool on the same machine.

    python benchmarks/export_speed.py [--repeats 3] [--only onnx gguf]

A Llama of 200M parameters (untied, random; ternary where the width is) goes to every target without the gate, and
through the tools that are installed: ONNX Runtime GenAI's model builder, llama.cpp's quantizer (from our own f32 file),
`optimum-cli export onnx` where `make interop` has made its environment. Each run is a process of its own, from a cold
start to the file on the disk; ours and theirs take turns. Medians.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, header, interleaved, median_line
from models import mid

BAR_SECONDS = 60
OPTIMUM = ROOT / ".venv-interop/bin/optimum-cli"

QUANTIZE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = vars(llama_cpp)[sys.argv[3]]
failed = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params)
sys.exit(failed)
"""
"""llama.cpp's own quantizer as a program."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An export of ours, and what the vendor offers for it."""

    target: str
    quant: str
    ternary: bool = False
    vendor: str | None = None
    """A key of `VENDORS`."""


PAIRS = [
    Pair("hf", "fp32"),
    Pair("onnx", "fp32", vendor="optimum"),
    Pair("onnx", "int4"),
    Pair("onnx", "ternary", ternary=True),
    Pair("genai", "fp32", vendor="builder fp32"),
    Pair("genai", "int4", vendor="builder int4"),
    Pair("genai", "ternary", ternary=True),
    Pair("gguf", "f16"),
    Pair("gguf", "q4_0", vendor="llama.cpp q4_0"),
    Pair("gguf", "tq2_0", ternary=True, vendor="llama.cpp tq2_0"),
    Pair("openvino", "int4"),
    Pair("openvino", "ternary", ternary=True),
]

VENDORS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "optimum": lambda model, f32, out: [
        str(OPTIMUM), "export", "onnx", "--model", str(model), "--task", "text-generation-with-past", str(out)
    ],
    "builder fp32": lambda model, f32, out: _builder(model, out, "fp32"),
    "builder int4": lambda model, f32, out: _builder(model, out, "int4"),
    "llama.cpp q4_0": lambda model, f32, out: _quantizer(f32, out, "LLAMA_FTYPE_MOSTLY_Q4_0"),
    "llama.cpp tq2_0": lambda model, f32, out: _quantizer(f32, out, "LLAMA_FTYPE_MOSTLY_TQ2_0"),
}  # fmt: skip
"""The command line of a vendor's tool: from a model directory, or from our f32 GGUF, to a path."""


def _builder(model: Path, out: Path, precision: str) -> list[str]:
    tool = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    return [*tool, "-p", precision, "-e", "cpu", "-c", str(out.with_suffix(".cache"))]


def _quantizer(f32: Path, out: Path, kind: str) -> list[str]:
    return [sys.executable, "-c", QUANTIZE, str(f32), str(out.with_suffix(".gguf")), kind]


def ours(model: Path, pair: Pair, out: Path) -> list[str]:
    """The command line of our export, without the gate."""
    tool = [sys.executable, "-m", "edgewright.cli", "export", str(model), "--to", pair.target, "--quant", pair.quant]
    return [*tool, "--out", str(out), "--no-verify"]


def seconds(command: list[str]) -> float:
    """Wall time of a command that must succeed."""
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(result.stderr or result.stdout)[-2000:]}")
    return time.perf_counter() - start


def compare(pair: Pair, scratch: Path, repeats: int) -> bool:
    """Time one pair and print the line; whether the bar is met."""
    model = mid(scratch / ("ternary" if pair.ternary else "dense"), ternary=pair.ternary)
    f32 = scratch / f"{model.name}-f32.gguf"
    if pair.vendor is not None and pair.vendor.startswith("llama.cpp") and not f32.exists():
        seconds(ours(model, Pair("gguf", "f32"), f32))
    names = ["ours"]
    if pair.vendor is not None and (pair.vendor != "optimum" or OPTIMUM.exists()):
        names.append(pair.vendor)

    def measure(name: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=scratch) as fresh:
            out = Path(fresh) / "out"
            command = ours(model, pair, out) if name == "ours" else VENDORS[name](model, f32, out)
            return {"seconds": seconds(command)}

    times = {name: values["seconds"] for name, values in interleaved(names, measure, repeats).items()}
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    met = middle["ours"] <= min(BAR_SECONDS, *middle.values())
    told = "; ".join(f"{name} {median_line(values, 's', 1)}" for name, values in times.items())
    print(f"{pair.target:9}{pair.quant:8} {told}   {'met' if met else 'MISSED'}", flush=True)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="targets")
    options = parser.parse_args()
    header()
    pairs = [pair for pair in PAIRS if not options.only or pair.target in options.only]
    with tempfile.TemporaryDirectory(prefix="export-speed-") as scratch:
        met = [compare(pair, Path(scratch), options.repeats) for pair in pairs]
    print(f"bar: at most the vendor's time, and {BAR_SECONDS} s: {sum(met)} of {len(met)} met")
    return not all(met)


if __name__ == "__main__":
    sys.exit(main())
