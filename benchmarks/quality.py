"""Every method against dense training, on real text, at equal tokens, compute or operations; and at equal bytes.

    python benchmarks/quality.py [--tier core|full] [--gpu] [--seeds 2] [--only ROW ...] [--minutes N]
    python benchmarks/quality.py --list | --table

Trains one run after the other, each in a process of its own and with the SDK's own recipes, and writes one JSON result
per run into benchmarks/quality/. Kill it anywhere and start it again: it goes on inside the run that was cut off. Two
of them share the work. At the end, and alone with --table, it prints the table, the files, the bars, and draws the plot
of bits per byte against exported bytes. See `quality_runs.py` for what is trained and why in that order.

The learning rate of the dense model is swept at a quarter of the tokens, those of ternary, low rank, LOST and APOLLO as
well, as multiples of it; their variants take theirs. Text: the files of --data, else tinystories and the children's
books of ../shared/data, else the interpreter's standard library.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, header
from quality_runs import BUSY, ROWS, Named, Places, jobs
from quality_scales import SCALES, Section

SHARED = ROOT.parent / "shared/data"
TEXTS = (
    "tinystories/train_prefix_2MiB.txt.xz",
    "tinystories/v2gpt4_head_10k_lines.txt.xz",
    "books/children.jsonl.xz",
)


def data_section(patterns: Sequence[str]) -> Section:
    """Where the text comes from."""
    shared = [str(SHARED / name) for name in TEXTS]
    files = [str(Path(pattern).absolute()) for pattern in patterns] or [name for name in shared if Path(name).exists()]
    return {"type": "files", "files": files} if files else {"type": "stdlib"}


def work_off(queue: Sequence[Named], places: Places, worker: Sequence[str], minutes: float | None) -> bool:
    """Run what has no result yet, until the time is up; whether all went well.

    Args:
        worker: the command that runs a job, but its name.
    """
    deadline = time.monotonic() + 60 * minutes if minutes else None
    fine = True
    for job in queue:
        if places.result(job).exists():
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            print("time is up; the same command goes on", flush=True)
            break
        print(f"== {job.name} {time.strftime('%H:%M:%S')}", flush=True)
        code = in_process([*worker, job.name], left)
        if code == -signal.SIGTERM or code == 128 + signal.SIGTERM:
            print("stopped; the same command goes on", flush=True)
            break
        if code == BUSY:
            print(f"{job.name}: another process works on it", flush=True)
        elif code:
            fine = False
            print(f"{job.name}: failed with exit code {code}", flush=True)
    return fine


def in_process(command: list[str], seconds: float | None) -> int:
    """Run a job in a process of its own; when the time is up or we are stopped, it writes a checkpoint and ends."""
    process = subprocess.Popen(command)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def forwarded(arguments: argparse.Namespace) -> list[str]:
    options = ["--seeds", str(arguments.seeds), "--tier", "full", "--scale", arguments.scale]
    places = ["--work", str(arguments.work), "--results", str(arguments.results)]
    return [*options, *places, *(["--data", *arguments.data] if arguments.data else [])]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=("core", "full"), default="core")
    parser.add_argument("--scale", choices=SCALES, default="small", help="smoke: does everything run?")
    parser.add_argument(
        "--gpu",
        dest="scale",
        action="store_const",
        const="gpu",
        help="58.7M parameters; bring a large corpus with --data",
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--minutes", type=float, help="stop after so long; the run in progress keeps what it has")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATTERN", help="text files in place of the usual")
    parser.add_argument("--work", type=Path, default=ROOT / "build/quality", help="where runs lie")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/quality", help="where results lie")
    parser.add_argument("--list", action="store_true", help="what there is to do, and what is done")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--worker", metavar="RUN", help=argparse.SUPPRESS)
    return parser.parse_args()


def read_results(queue: Sequence[Named], places: Places) -> list[dict[str, Any]]:
    """The results that are there, in the order of the queue."""
    paths = [places.result(job) for job in queue]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def main() -> None:
    arguments = parse()
    scale = SCALES[arguments.scale]
    places = Places(
        data=data_section(arguments.data), work=arguments.work / scale.name, results=arguments.results / scale.name
    )
    everything = arguments.tier == "full" or bool(arguments.only) or arguments.table
    queue = jobs(scale, full=everything, seeds=arguments.seeds)
    if arguments.only:
        queue = [job for job in queue if job.row.name in arguments.only]
    if arguments.worker:
        import quality_run

        sys.exit(quality_run.run(next(job for job in queue if job.name == arguments.worker), places))
    if arguments.list:
        for job in queue:
            print(f"{'done' if places.result(job).exists() else '    '}  {job.name:28} {job.row.what}")
        return
    places.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run in progress stops, too
    worker = [sys.executable, __file__, *forwarded(arguments), "--worker"]
    fine = arguments.table or work_off(queue, places, worker, arguments.minutes)
    import quality_table

    header()
    met = quality_table.print_all(read_results(queue, places), scale, places.results)
    sys.exit(not (fine and met))


if __name__ == "__main__":
    main()
