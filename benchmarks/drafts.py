"""Drafts of one target after each of their three stages: how much of what they say the target accepts, by prompts.

    python benchmarks/drafts.py [--scale small|tiny|smoke] [--seeds 2] [--minutes N]
    python benchmarks/drafts.py --list | --table

Trains a target on stories, books and code, then drafts with less than a tenth of its parameters: on stories and books
(stage 1), on code as well (2), on what the target writes (3), and in place of that stage with LoRA, in ternary, in 4
bits, and with the loss for runtimes that draft greedily. Acceptance is what `draft.json` holds, the exact expectation
from both distributions, on the target's own text after prompts that nobody trained on: stories, HumanEval, chat.

Two runs for each seed, each in a process of its own and with the SDK's own recipes; the result of a run is a JSON
file in benchmarks/drafts/. Kill it anywhere and start it again: it goes on inside the stage that was cut off. Needs
the texts of ../shared/data. See `drafts_runs.py` for what is trained.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from common import ROOT, header
from drafts_runs import SCALES, SHARED, jobs
from quality import read_results, work_off
from quality_runs import Places


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small", help="smoke: does everything run?")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop after so long; the run in progress keeps what it has")
    parser.add_argument("--work", type=Path, default=ROOT / "build/drafts", help="where runs lie")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/drafts", help="where results lie")
    parser.add_argument("--list", action="store_true", help="what there is to do, and what is done")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--worker", metavar="RUN", help=argparse.SUPPRESS)
    return parser.parse_args()


def forwarded(arguments: argparse.Namespace) -> list[str]:
    options = ["--seeds", str(arguments.seeds), "--scale", arguments.scale]
    return [*options, "--work", str(arguments.work), "--results", str(arguments.results)]


def main() -> None:
    arguments = parse()
    scale = SCALES[arguments.scale]
    places = Places(data={}, work=arguments.work / scale.name, results=arguments.results / scale.name)
    queue = jobs(scale, arguments.seeds)
    if arguments.worker:
        import drafts_run

        sys.exit(drafts_run.run(next(job for job in queue if job.name == arguments.worker), places))
    if arguments.list:
        for job in queue:
            print(f"{'done' if places.result(job).exists() else '    '}  {job.name:12} {job.what}")
        return
    if not arguments.table and not SHARED.is_dir():
        sys.exit(f"the texts are not there: {SHARED}")
    places.results.mkdir(parents=True, exist_ok=True)
    places.work.mkdir(parents=True, exist_ok=True)
    header()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run in progress stops, too
    worker = [sys.executable, __file__, *forwarded(arguments), "--worker"]
    fine = arguments.table or work_off(queue, places, worker, arguments.minutes)
    import drafts_table

    met = drafts_table.print_all(read_results(queue, places), places.results)
    sys.exit(not (fine and (met or scale.name == "smoke")))  # what has learned nothing meets no bar


if __name__ == "__main__":
    main()
