"""`make bench`: every benchmark, one after the other; what they print goes into benchmarks/RESULTS.md.

    python benchmarks/run.py [NAME ...]        only these, for instance: loss_memory parity

Nothing else should run on the machine meanwhile. A section whose bar was missed says so in its heading.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
TITLES = {
    "demo": "The demo: time, memory, quality",
    "training_speed": "Training speed against transformers.Trainer",
    "loss_memory": "Memory and speed of the chunked loss",
    "parity": "Exactness of exported files",
    "ternary_decode": "Ternary decoding of 200M against llama.cpp, the memory roofline, peak memory",
    "runtimes": "Every runtime and width on the same 200M shapes",
    "calibration": "Calibrated 4 bits against plain rounding",
    "export_speed": "Export time against the vendors' tools",
    "quality": "Quality of every method against dense training, at equal tokens, compute and bytes",
    "method_speed": "Step time and memory of methods against dense training",
    "optimizer_speed": "Time of an update and bytes of state of every optimizer",
    "seven_billion": "A Llama of 7B in 12 GB",
    "plan_memory": "Predicted against measured memory",
    "plan_time": "Predicted against measured time",
    "drafts_lossless": "Speculative decoding: the target's own text in every runtime, and what the loop costs",
    "guard": "Hostile files: refused, in what time and memory",
    "data_speed": "Reading, tokenizing and packing",
    "kill_resume": "kill -9 and resume",
    "kill_optimizers": "kill -9 and resume, every optimizer",
    "onnx_block_size": "Why MatMulNBits is packed as it is",
}
ARGUMENTS = {"quality": ["--table"]}
"""Scripts that are not run as they are: quality.py trains for hours, so only its committed results are shown."""
INTRODUCTION = """# Results

Each section is what a script of this folder printed: command, commit, machine, figures, bars. `make bench` measures
all again; `python benchmarks/run.py NAME` one of them. Missed bars are marked; negative results are kept.
"""


def sections() -> dict[str, str]:
    """The sections that are there, by script name."""
    if not RESULTS.exists():
        return {}
    found = {}
    for part in RESULTS.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        name = title.rpartition("(")[2].partition(".py")[0]
        found[name] = f"## {title}\n{body.rstrip()}\n"
    return found


def measure(name: str) -> str:
    """Run a script; its output as a section."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"{name}.py"), *ARGUMENTS.get(name, [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    missed = " - bar missed" if process.wait() else ""
    return f"## {TITLES[name]}{missed} ({name}.py)\n\n```\n{''.join(lines).rstrip()}\n```\n"


def main(names: list[str]) -> None:
    for name in names or TITLES:
        print(f"== {name}", flush=True)
        known = sections()
        known[name] = measure(name)
        ordered = [known[key] for key in TITLES if key in known]
        RESULTS.write_text("\n".join([INTRODUCTION, *ordered]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
