"""How long an export takes, against the vendor's own tool on the same machine.

    python benchmarks/export_speed.py [--repeats 3] [--only onnx gguf] [--converter convert_hf_to_gguf.py]

A Llama of 200M parameters (untied, random; ternary where the width is) goes to every target without the gate, and
through the tools that are installed: ONNX Runtime GenAI's model builder, llama.cpp's quantizer, `optimum-cli export
onnx` where `make interop` has made its environment. Each run is a process of its own, from a cold start to the file on
the disk; ours and theirs take turns. Medians.

llama.cpp's quantizer starts from a GGUF file, not from a checkpoint. Three rows beside ours tell that apart: the
quantizer alone, from our f32 file; our f32 export and then the quantizer; and llama.cpp's own way from the checkpoint,
its converter and then the quantizer (tq2_0 and f16: the converter alone, which makes them). The converter comes with
llama.cpp's sources, the package llama-cpp-python's among them, and wants sentencepiece; `--converter` says where it is.
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
    vendors: tuple[str, ...] = ()
    """Keys of `VENDORS`; those that are not installed are left out."""

    def model(self, scratch: Path) -> Path:
        """What is exported; to gguf, one whose tokenizer llama.cpp's converter takes."""
        pieces = self.target == "gguf"
        name = f"{'ternary' if self.ternary else 'dense'}{'-pieces' if pieces else ''}"
        return mid(scratch / name, ternary=self.ternary, pieces=pieces)


PAIRS = [
    Pair("hf", "fp32"),
    Pair("onnx", "fp32", vendors=("optimum",)),
    Pair("onnx", "int4"),
    Pair("onnx", "ternary", ternary=True),
    Pair("genai", "fp32", vendors=("builder fp32",)),
    Pair("genai", "int4", vendors=("builder int4",)),
    Pair("genai", "ternary", ternary=True),
    Pair("gguf", "f16", vendors=("converter f16",)),
    Pair("gguf", "q4_0", vendors=("quantizer q4_0", "our f32 + quantizer q4_0", "converter f16 + quantizer q4_0")),
    Pair("gguf", "tq2_0", ternary=True, vendors=("quantizer tq2_0", "our f32 + quantizer tq2_0", "converter tq2_0")),
    Pair("openvino", "int4"),
    Pair("openvino", "ternary", ternary=True),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What a vendor's command line is made of."""

    model: Path
    out: Path
    converter: Path | None
    """llama.cpp's convert_hf_to_gguf.py."""

    @property
    def f32(self) -> Path:
        """Our f32 GGUF of the model, made before anything is timed."""
        return self.model.with_name(f"{self.model.name}-f32.gguf")

    @property
    def between(self) -> Path:
        """A file on the way."""
        return self.out.with_suffix(".between.gguf")


Commands = list[list[str]]

VENDORS: dict[str, Callable[[Places], Commands]] = {
    "optimum": lambda at: [
        [str(OPTIMUM), "export", "onnx", "--model", str(at.model), "--task", "text-generation-with-past", str(at.out)]
    ],
    "builder fp32": lambda at: [_builder(at, "fp32")],
    "builder int4": lambda at: [_builder(at, "int4")],
    "quantizer q4_0": lambda at: [_quantizer(at, at.f32, "Q4_0")],
    "quantizer tq2_0": lambda at: [_quantizer(at, at.f32, "TQ2_0")],
    "our f32 + quantizer q4_0": lambda at: [_f32(at, at.between), _quantizer(at, at.between, "Q4_0")],
    "our f32 + quantizer tq2_0": lambda at: [_f32(at, at.between), _quantizer(at, at.between, "TQ2_0")],
    "converter f16": lambda at: [_converter(at, at.out, "f16")],
    "converter tq2_0": lambda at: [_converter(at, at.out, "tq2_0")],
    "converter f16 + quantizer q4_0": lambda at: [
        _converter(at, at.between, "f16"),
        _quantizer(at, at.between, "Q4_0"),
    ],
}
"""The commands of a vendor's way, one after the other."""


def _builder(at: Places, precision: str) -> list[str]:
    tool = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(at.model), "-o", str(at.out)]
    return [*tool, "-p", precision, "-e", "cpu", "-c", str(at.out.with_suffix(".cache"))]


def _quantizer(at: Places, start: Path, kind: str) -> list[str]:
    end = at.out.with_suffix(".gguf")
    return [sys.executable, "-c", QUANTIZE, str(start), str(end), f"LLAMA_FTYPE_MOSTLY_{kind}"]


def _converter(at: Places, out: Path, kind: str) -> list[str]:
    return [sys.executable, str(at.converter), str(at.model), "--outtype", kind, "--outfile", str(out)]


def _f32(at: Places, out: Path) -> list[str]:
    return ours(at.model, Pair("gguf", "f32"), out)


def ours(model: Path, pair: Pair, out: Path) -> list[str]:
    """The command line of our export, without the gate."""
    tool = [sys.executable, "-m", "edgewright.cli", "export", str(model), "--to", pair.target, "--quant", pair.quant]
    return [*tool, "--out", str(out), "--no-verify"]


def seconds(commands: Commands) -> float:
    """Wall time of commands that must succeed."""
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, env=quiet)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(result.stderr or result.stdout)[-2000:]}")
    return time.perf_counter() - start


def is_there(vendor: str, converter: Path | None) -> bool:
    """Whether a vendor's way can be gone here."""
    return (vendor != "optimum" or OPTIMUM.exists()) and (not vendor.startswith("converter") or converter is not None)


def compare(pair: Pair, scratch: Path, repeats: int, converter: Path | None) -> bool:
    """Time one pair and print the line; whether the bar is met."""
    model = pair.model(scratch)
    before = Places(model=model, out=scratch / "none", converter=converter)
    if any("quantizer" in vendor for vendor in pair.vendors) and not before.f32.exists():
        seconds([_f32(before, before.f32)])

    def measure(name: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=scratch) as fresh:
            at = Places(model=model, out=Path(fresh) / "out", converter=converter)
            return {"seconds": seconds([ours(model, pair, at.out)] if name == "ours" else VENDORS[name](at))}

    names = ["ours", *(vendor for vendor in pair.vendors if is_there(vendor, converter))]
    times = {name: values["seconds"] for name, values in interleaved(names, measure, repeats).items()}
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    met = middle["ours"] <= min(BAR_SECONDS, *middle.values())
    told = [
        f"{name} {median_line(values, 's', 1)}" + (" - MISSED" if middle[name] < middle["ours"] else "")
        for name, values in times.items()
    ]
    print(f"{pair.target:9}{pair.quant:8} {'; '.join(told)}   {'met' if met else 'MISSED'}", flush=True)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="targets")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    options = parser.parse_args()
    header()
    pairs = [pair for pair in PAIRS if not options.only or pair.target in options.only]
    with tempfile.TemporaryDirectory(prefix="export-speed-") as scratch:
        met = [compare(pair, Path(scratch), options.repeats, options.converter) for pair in pairs]
    print(f"bar: at most the time of every other way, and {BAR_SECONDS} s: {sum(met)} of {len(met)} met")
    return not all(met)


if __name__ == "__main__":
    sys.exit(main())
