"""kill -9 at random moments of the demo's training, the same command again, until it is done: the same bits?

    python benchmarks/kill_resume.py [--kills 20] [--steps 30]

The demo's student (ternary, distilled from the shipped teacher) trained for `--steps` steps, once without a kill, and
then again and again with one kill each at a moment drawn uniformly over the whole run, start-up, checkpoints and final
write included. Final weights are compared by SHA-256, loss curves as exact floats.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, header


def command(folder: Path, steps: int) -> list[str]:
    """The demo without exports and measurements."""
    return [
        *(sys.executable, "-m", "edgewright.cli", "run", str(ROOT / "examples" / "demo.yaml")),
        f"output_dir={folder}",
        f"stages.student.budget.max_steps={steps}",
        f"stages.student.training.save_steps={max(1, steps // 6)}",
        f"stages.student.training.eval_steps={max(1, steps // 3)}",
        "exports=[]",
        "evaluate=null",
        "bench=null",
        "sample=null",
    ]


def outcome(folder: Path) -> tuple[str, str]:
    """Hash of the final weights, and of the loss curve."""
    stage = folder / "stages" / "student"
    weights = hashlib.sha256((stage / "model" / "model.safetensors").read_bytes()).hexdigest()
    entries = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    curve = [(entry["step"], float(entry["loss"]).hex()) for entry in entries if "loss" in entry]
    evaluations = [(entry["step"], float(entry["eval_loss"]).hex()) for entry in entries if "eval_loss" in entry]
    return weights, hashlib.sha256(repr((curve, evaluations)).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    header()
    moments = random.Random(0)
    same = landed = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        start = time.monotonic()
        subprocess.run(command(work / "whole", arguments.steps), check=True, capture_output=True)
        seconds = time.monotonic() - start
        expected = outcome(work / "whole")
        print(f"without a kill: {seconds:.0f} s, weights {expected[0][:16]}")
        for number in range(arguments.kills):
            folder = work / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            process = subprocess.Popen(
                command(folder, arguments.steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            moment = moments.uniform(0.1, 0.98) * seconds
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                landed += 1
            subprocess.run(command(folder, arguments.steps), check=True, capture_output=True)
            equal = outcome(folder) == expected
            same += equal
            print(f"kill {number + 1:2} after {moment:5.1f} s: {'identical' if equal else 'DIFFERENT'}", flush=True)
    print(f"{same} of {arguments.kills} bit-identical in weights and loss curve; {landed} kills hit a living process")
    sys.exit(same != arguments.kills)


if __name__ == "__main__":
    main()
