"""Distillation from teachers: what it gains over the text alone, on disk, in 4 bits, from an ensemble.

    python benchmarks/distill.py [--scale small|tiny|smoke|gpu] [--seeds 2] [--only ROW ...] [--minutes N]
    python benchmarks/distill.py --list | --table
    python benchmarks/distill.py --teacher DIRECTORY ...  # one that is there already, for all seeds
    python benchmarks/distill.py --step-time      # cached against online, interleaved
    python benchmarks/distill.py --cache-size     # planned against written, 5M tokens
    python benchmarks/distill.py --teacher-memory # 4 bits against bf16

Trains one run after the other, each in a process of its own and with the SDK's own recipes, and writes one JSON result
per run into benchmarks/distill/. Kill it anywhere and start it again: it goes on inside the run that was cut off. Text
as in `quality.py`. See `distill_runs.py` for what is trained.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from common import ROOT, header
from distill_runs import ROWS, SCALES, Job, jobs
from quality import data_section, read_results, work_off
from quality_runs import Places


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small", help="smoke: does everything run?")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[name for name, _, _ in ROWS])
    parser.add_argument("--minutes", type=float, help="stop after so long; the run in progress keeps what it has")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATTERN", help="text files in place of the usual")
    parser.add_argument("--teacher", type=Path, help="a finished model with the same tokenizer; none is trained")
    parser.add_argument("--work", type=Path, default=ROOT / "build/distill", help="where runs lie")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/distill", help="where results lie")
    parser.add_argument("--list", action="store_true", help="what there is to do, and what is done")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--step-time", action="store_true", help="seconds of a student's step, cached and online")
    parser.add_argument("--cache-size", action="store_true", help="bytes of a cache, planned and written")
    parser.add_argument("--teacher-memory", action="store_true", help="bytes of a teacher, in 4 bits and in bf16")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="of the text, for --cache-size")
    parser.add_argument("--rounds", type=int, default=12, help="for --step-time")
    parser.add_argument("--worker", metavar="RUN", help=argparse.SUPPRESS)
    return parser.parse_args()


def forwarded(arguments: argparse.Namespace) -> list[str]:
    options = ["--seeds", str(arguments.seeds), "--scale", arguments.scale]
    places = ["--work", str(arguments.work), "--results", str(arguments.results)]
    given = ["--teacher", str(arguments.teacher)] if arguments.teacher else []
    return [*options, *places, *given, *(["--data", *arguments.data] if arguments.data else [])]


def chosen(queue: list[Job], names: list[str] | None) -> list[Job]:
    """The runs of some rows; what they need has to be there, or among them."""
    return [job for job in queue if names is None or job.name.rpartition("-s")[0] in names]


def measurements(arguments: argparse.Namespace, places: Places) -> bool:
    """What needs no training; whether one was asked for."""
    import distill_measure

    if arguments.step_time:
        distill_measure.step_time(SCALES[arguments.scale], places, arguments.rounds)
    if arguments.cache_size:
        distill_measure.cache_size(places, arguments.tokens)
    if arguments.teacher_memory:
        distill_measure.teacher_memory()
    return arguments.step_time or arguments.cache_size or arguments.teacher_memory


def main() -> None:
    arguments = parse()
    scale = replace(SCALES[arguments.scale], given=str(arguments.teacher.absolute()) if arguments.teacher else "")
    places = Places(
        data=data_section(arguments.data or scale.text),
        work=arguments.work / scale.name,
        results=arguments.results / scale.name,
    )
    queue = chosen(jobs(scale, arguments.seeds), arguments.only)
    if arguments.worker:
        import distill_run

        sys.exit(distill_run.run(next(job for job in queue if job.name == arguments.worker), places))
    if arguments.list:
        for job in queue:
            print(f"{'done' if places.result(job).exists() else '    '}  {job.name:16} {job.what}")
        return
    places.results.mkdir(parents=True, exist_ok=True)
    places.work.mkdir(parents=True, exist_ok=True)
    header()
    if measurements(arguments, places):
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run in progress stops, too
    worker = [sys.executable, __file__, *forwarded(arguments), "--worker"]
    fine = arguments.table or work_off(queue, places, worker, arguments.minutes)
    import distill_table

    met = distill_table.print_all(read_results(queue, places), places.results)
    sys.exit(not (fine and (met or scale.name == "smoke")))  # whose bars say nothing


if __name__ == "__main__":
    main()
