"""The demo from nothing: wall time and memory after set-up, and what the ternary student costs in quality.

    python benchmarks/demo.py

Bars: at most 5 minutes on two cores, less than 3 GB in all processes together, the student's bits per byte within 6 %
of the teacher's on the same held-out text, every gate passed; the teacher at most 1.40 bits per byte on all held-out
files and at most 9 MB; the second run says that all is done.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from common import ROOT, header


def run(folder: Path) -> tuple[float, int]:
    """Seconds, and the most bytes that the process and its children had in memory together (shared pages once)."""
    command = [sys.executable, "-m", "edgewright.cli", "run", str(ROOT / "examples/demo.yaml"), f"output_dir={folder}"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not done.wait(0.5):
            total = 0
            try:
                for member in [root, *root.children(recursive=True)]:
                    total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"the demo ended with {code}")
    return time.monotonic() - start, peak


def main() -> None:
    header()
    with tempfile.TemporaryDirectory() as name:
        seconds, peak = run(Path(name) / "demo")
        again, _ = run(Path(name) / "demo")
        results = json.loads((Path(name) / "demo/results.json").read_text(encoding="utf-8"))
    quality = {checkpoint["name"]: checkpoint["bits_per_byte"] for checkpoint in results["checkpoints"]}
    teacher, student = quality["teacher"], quality["student"]
    provenance = json.loads((ROOT / "examples/teacher/PROVENANCE.json").read_text(encoding="utf-8"))
    held_out = provenance["held_out_bits_per_byte"]["all held-out files"]["bits_per_byte"]
    size = (ROOT / "examples/teacher/model.safetensors").stat().st_size
    gates = [artifact["gate"] for artifact in results["artifacts"]]
    print(f"wall time {seconds:.0f} s (bar 300); again {again:.1f} s")
    print(f"memory of all processes together {peak / 1e9:.2f} GB (bar 3)")
    print(f"teacher {held_out:.4f} bits per byte on all held-out files (bar 1.40), {size / 1e6:.2f} MB (bar 9)")
    print(f"on the demo's held-out text: teacher {teacher:.4f}, ternary student {student:.4f} bits per byte")
    print(f"ternary against teacher: {student / teacher - 1:+.1%} (bar +6 %)")
    print(f"gates passed: {gates.count('passed')} of {len(gates)}")
    for artifact in results["artifacts"]:
        print(
            f"  {artifact['name']:16} {artifact['bytes'] / 1e6:6.2f} MB  {artifact['bits_per_byte']:.4f} bits/byte  "
            f"KL {artifact['kl']:.1e}  {artifact['ttft_ms']:6.1f} ms  "
            f"{artifact['tokens_per_s']:7,.0f} +- {artifact['tokens_per_s_sd']:5,.0f} tokens/s  "
            f"{artifact['peak_memory'] / 1e6:5.0f} MB"
        )
    missed = seconds > 300 or peak > 3e9 or student / teacher > 1.06 or held_out > 1.4 or size > 9e6
    sys.exit(missed or gates.count("passed") != len(gates))


if __name__ == "__main__":
    main()
