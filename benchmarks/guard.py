"""What refusing costs: every kind of hostile model, and real files, each checked in a process of its own.

    python benchmarks/guard.py [--real PATH ...] [--slowest 12]

For each kind of model how many are refused with the code that they deserve, and the worst time and memory; then the
slowest one by one; then files at the caps, the largest that the checks look at. Time is the CPU time of the check,
memory is by how much the peak of the process (mapped files included) grew. The bars: all refused, each under 1 s and
64 MB.
`--real` names models that must pass: files, or folders that are searched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import ROOT, header

sys.path.insert(0, str(ROOT / "tests" / "export"))
import hostile  # noqa: E402 - the tests' own models

import edgewright.export.guard  # noqa: E402, F401 - imported once, before the processes part

SECONDS, BYTES = 1.0, 64 * 2**20
SUFFIXES = {".safetensors": "safetensors", ".gguf": "gguf", ".onnx": "onnx"}
MARKERS = {"genai_config.json": "genai", "openvino_model.xml": "openvino"}


def measure(kind: str, path: Path) -> dict[str, Any]:
    """`hostile.peak_and_time` in a process that ends with it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, json.dumps(hostile.peak_and_time(kind, path)).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        result: dict[str, Any] = json.loads(answer.read() or b'{"code": "crash", "seconds": 0, "peak": 0}')
    os.waitpid(child, 0)
    return result


def line(name: str, result: dict[str, Any]) -> str:
    verdict = result["code"] or "passes"
    return f"  {name:58} {verdict:8} {result['seconds']:6.3f} s {result['peak'] / 2**20:6.1f} MB"


def refused() -> tuple[bool, list[str]]:
    """Check every hostile model; whether all bars hold, and the lines of the slowest."""
    results = defaultdict(list)
    for case in hostile.cases():
        with tempfile.TemporaryDirectory() as folder:
            results[case.kind].append((case, measure(case.kind, case.build(Path(folder)))))
    print(f"\n{'kind':14} refused as they deserve   slowest   most memory")
    sound = True
    for kind, found in results.items():
        right = sum(result["code"] == case.code for case, result in found)
        seconds, peak = max(result["seconds"] for _, result in found), max(result["peak"] for _, result in found)
        sound &= right == len(found) and seconds < SECONDS and peak < BYTES
        print(f"{kind:14} {right:10} of {len(found):4}   {seconds:14.3f} s   {peak / 2**20:8.1f} MB")
        for case, result in found:
            if result["code"] != case.code:
                print(line(f"WRONG {case.name}", result))
    every = sorted((pair for found in results.values() for pair in found), key=lambda pair: -pair[1]["seconds"])
    return sound, [line(f"{case.kind}: {case.name}", result) for case, result in every]


def at_the_caps() -> bool:
    """Check the files at the caps; whether the bars hold."""
    print("\nfiles at the caps")
    with tempfile.TemporaryDirectory() as folder:
        results = {name: measure(name.split()[0], path) for name, path in hostile.heavy(Path(folder) / "heavy").items()}
    for name, result in results.items():
        print(line(name, result))
    return all(result["seconds"] < SECONDS and result["peak"] < BYTES for result in results.values())


def real(roots: list[Path]) -> bool:
    """Check real models; whether all pass within the bars."""
    found: list[tuple[str, Path]] = []
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.name in MARKERS:
                found.append((MARKERS[path.name], path.parent))
            elif path.suffix in SUFFIXES:
                found.append((SUFFIXES[path.suffix], path))
    results = [(kind, path, measure(kind, path)) for kind, path in found]
    wrong = [(path, result) for _, path, result in results if result["code"]]
    for path, result in wrong:
        print(line(f"FALSE ALARM {path}", result))
    worst = max((result["seconds"] for *_, result in results), default=0.0)
    most = max((result["peak"] for *_, result in results), default=0)
    passed = f"{len(results) - len(wrong)} of {len(results)} pass"
    print(f"\nreal models: {passed}, at most {worst:.3f} s, {most / 2**20:.1f} MB")
    return not wrong and worst < SECONDS and most < BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, nargs="*", default=[ROOT / "examples" / "teacher"])
    parser.add_argument("--slowest", type=int, default=12)
    arguments = parser.parse_args()
    header()
    sound, lines = refused()
    print("\nthe slowest")
    print("\n".join(lines[: arguments.slowest]))
    sound &= at_the_caps()
    sound &= real(arguments.real)
    print(f"\nbars (all refused, real ones pass, < {SECONDS:g} s, < {BYTES >> 20} MB): {'met' if sound else 'MISSED'}")
    sys.exit(not sound)


if __name__ == "__main__":
    main()
