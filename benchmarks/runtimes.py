"""Every runtime and width on the same 200M shapes, interleaved: which is fastest on this machine?

    python benchmarks/runtimes.py [--folder DIR] [--repeats 5]

Exports a dense and a ternary model (the gate is left to the tests: a random model's logits are flat), then measures all
files in turns with `edgewright bench` (prompt 32, 48 new tokens). The order is compared with the one that was measured
with scripts of each runtime's own, before this project had code: rank correlation over the rows that both have.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import header
from models import mid

import edgewright
from edgewright.bench import bench

# Name, ternary checkpoint?, target, width, embedding width, tokens/s of the earlier measurement (None: not in it).
ROWS = [
    ("torch fp32", False, None, None, None, 24.9),
    ("ORT fp32", False, "genai", "fp32", "fp32", 57.4),
    ("ORT int8", False, "genai", "int8", "int8", 211.7),
    ("ORT int4", False, "genai", "int4", "int4", 309.4),
    ("ORT ternary + int4", True, "genai", "ternary", "int4", 451.7),
    ("ORT ternary + int8", True, "genai", "ternary", "int8", 351.0),
    ("llama.cpp F16", False, "gguf", "f16", "f16", 102.8),
    ("llama.cpp Q8_0", False, "gguf", "q8_0", "q8_0", 160.4),
    ("llama.cpp Q4_0", False, "gguf", "q4_0", "q4_0", 314.9),
    ("llama.cpp TQ2_0 + Q8_0", True, "gguf", "tq2_0", "q8_0", 242.2),
    ("llama.cpp TQ2_0 + Q4_0", True, "gguf", "tq2_0", "q4_0", 287.7),
    ("llama.cpp TQ1_0 + Q4_0", True, "gguf", "tq1_0", "q4_0", 220.8),
    ("OpenVINO fp32", False, "openvino", "fp32", "fp32", 55.4),
    ("OpenVINO int8", False, "openvino", "int8", "int8", 151.5),
    ("OpenVINO int4", False, "openvino", "int4", "int4", 220.4),
    ("OpenVINO ternary + int8", True, "openvino", "ternary", "int8", 249.7),
    ("plain ONNX fp32", False, "onnx", "fp32", "fp32", None),
    ("plain ONNX int4", False, "onnx", "int4", "int4", None),
    ("plain ONNX ternary + int4", True, "onnx", "ternary", "int4", None),
]
TOGETHER = 5
"""Files that are open at a time: the baseline and the next ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="keeps models and files for the next time")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        header()
        models = {kind: mid(folder / ("ternary" if kind else "dense"), ternary=kind) for kind in (False, True)}
        paths = [_exported(folder, models[row[1]], row) for row in ROWS]
        report(measure(paths, given.repeats), paths)


def _exported(folder: Path, model: Path, row: tuple) -> Path:
    name, _, to, quant, embedding, _ = row
    if to is None:
        return model
    out = folder / name.replace(" ", "-").replace("+", "and")
    if not out.exists():
        edgewright.export(model, to=to, quant=quant, embedding_quant=embedding, out=out, verify=False)
    return next(iter(out.glob("*.gguf")), out)


def measure(paths: list[Path], repeats: int) -> dict[Path, tuple[float, float, float, int]]:
    """Decode tokens/s, its ratio to ORT fp32 in the same heat, prompt tokens/s, peak memory; by path."""
    baseline = paths[1]
    found = {}
    rest = [path for path in paths if path != baseline]
    for start in range(0, len(rest), TOGETHER - 1):
        heat = [baseline, *rest[start : start + TOGETHER - 1]]
        rows = bench(*heat, prompt=32, generate=48, repeats=repeats).artifacts
        for path, row in zip(heat, rows, strict=True):
            ratio = row.tokens_per_s / rows[0].tokens_per_s
            found[path] = (row.tokens_per_s, ratio, row.prompt_tokens_per_s, row.peak_memory)
    return found


def report(found: dict[Path, tuple[float, float, float, int]], paths: list[Path]) -> None:
    both = []
    for row, path in zip(ROWS, paths, strict=True):
        speed, ratio, prompt, memory = found[path]
        earlier = "" if row[5] is None else f"   earlier {row[5] / 57.4:.2f}"
        print(
            f"{row[0]:26s} {speed:7.1f} tokens/s   x ORT fp32 {ratio:5.2f}{earlier:16s}   prompt {prompt:7.0f}   "
            f"peak {memory / 1e6:6.0f} MB"
        )
        if row[5] is not None:
            both.append((ratio, row[5]))
    ranks = [np.argsort(np.argsort(values)) for values in zip(*both, strict=True)]
    print(f"rank correlation with the earlier order: {np.corrcoef(*ranks)[0, 1]:.3f} over {len(both)} rows")


if __name__ == "__main__":
    main()
