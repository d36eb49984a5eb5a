"""Where a student starts: pruned against scratch, one elastic run against many, grown against scratch; on real text.

    python benchmarks/starts.py [--scale small|tiny|smoke] [--seeds 2] [--only ROW ...] [--minutes N] [--data FILE ...]
    python benchmarks/starts.py --list | --table

Trains one run after the other, each in a process of its own and with the SDK's own recipes, and writes one JSON result
per run into benchmarks/starts/. Kill it anywhere and start it again: it goes on inside the run that was cut off. Two of
them share the work. Learning rates are swept at a quarter of the tokens. At the end, and alone with --table, it prints
the table and the bars, and draws the front of all sub-networks of the elastic run: bits per byte against the bytes of
their GGUF files (q8_0). See `starts_runs.py` for what is trained.

Bars: pruned and distilled reaches the loss from scratch with at most 40 % of its tokens; sub-networks of one elastic
run within 5 % in perplexity of models of their sizes that were trained alone, five sizes compared; at least 20 sizes.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, header
from filelock import FileLock
from quality import data_section
from quality_plot import Point, draw
from quality_run import Judge, carry_out, commit_of, say
from starts_runs import BUSY, ROWS, SCALES, SHARES, Job, Places, Scale, jobs, recipe, row_named, tried

from edgewright.compress.elastic import save_sub_network, sizes_of
from edgewright.data import prepare_data
from edgewright.exactness import count_parameters
from edgewright.export.artifact import size_of
from edgewright.export.targets import export
from edgewright.files import write_json, write_text
from edgewright.recipe import load_recipe
from edgewright.stage import StageResult, train_stage
from edgewright.training import StopRequest

Result = dict[str, Any]


def run(job: Job, places: Places) -> int:
    """Train and measure, or go on with it; the exit code."""
    return carry_out(job, places, lambda stop: measure(job, places, stop))


def measure(job: Job, places: Places, stop: StopRequest) -> Result:
    """The result of a run: what it cost, and how well it predicts."""
    rate, directory = learning_rate(job, places), places.run(job)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "recipe.yaml", recipe(job, places, rate))
    loaded = load_recipe(directory / "recipe.yaml")
    with FileLock(places.work / "data.lock"):
        corpus = prepare_data(loaded.data, places.work / "data", say=say)
    stages: dict[str, StageResult] = {}
    for stage in loaded.stages:
        earlier = {name: result.model for name, result in stages.items()}
        stages[stage.name] = train_stage(
            loaded, stage, corpus, directory / "stages" / stage.name, earlier, say=say, stop=stop
        )
    judge = Judge(loaded, corpus, job.scale.judged_tokens)
    model = stages["model"].model
    return {
        "row": job.row.name,
        "seed": job.seed,
        "sweep": job.rate is not None,
        "rate": rate,
        "commit": commit_of(),
        "data": corpus.fingerprint,
        "parameters": stages["model"].parameters,
        "tokens": sum(result.tokens for result in stages.values()),
        "seconds": sum(result.seconds for result in stages.values()),
        "stages": {name: judge.quality(result.model) for name, result in stages.items()},
        **judge.quality(model),
        "sizes": front(model, directory, judge) if job.row.name == "elastic" and job.rate is None else [],
    }


def front(model: Path, directory: Path, judge: Judge) -> list[Result]:
    """Every sub-network: cut out, measured as it is and as a GGUF file; what is done already is kept."""
    found = []
    for size in sizes_of(model):
        kept = directory / "sizes" / f"{size.name}.json"
        if not kept.exists():
            folder = directory / "sizes" / size.name
            if not folder.exists():
                save_sub_network(model, size.name, folder)
            file = export(folder, to="gguf", quant="q8_0", embedding_quant="q8_0", out=directory / "sizes/files")
            result = {"name": size.name, "parameters": count_parameters(folder), **judge.quality(folder)}
            result |= {"bytes": size_of(file.path), "file_bits_per_byte": judge.quality(file.path)["bits_per_byte"]}
            write_json(kept, result)
        found.append(json.loads(kept.read_text(encoding="utf-8")))
    return found


def learning_rate(job: Job, places: Places) -> float:
    """That of a sweep's run, or the best of the sweep that the row goes by.

    Raises:
        SystemExit: the sweep, or the teacher, is not there yet.
    """
    for name in job.row.needs:
        if not places.model(name, job).exists():
            raise SystemExit(f"{name} of seed {job.seed} is not there yet: run --only {name} first")
    if job.rate is not None:
        return job.rate
    base = job.row if job.row.factors else row_named(job.row.rate_of)
    losses = {}
    for rate in tried(base, job.scale):
        result = places.result(Job(row=base, scale=job.scale, rate=rate))
        if not result.exists():
            raise SystemExit(f"{result.name} is not there yet: run --only {base.name} first")
        losses[rate] = json.loads(result.read_text(encoding="utf-8"))["loss"]
    return min(losses, key=losses.__getitem__)


def work_off(queue: list[Job], places: Places, arguments: argparse.Namespace) -> bool:
    """Run what has no result yet, until the time is up; whether all went well."""
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    fine = True
    for job in queue:
        left = None if deadline is None else deadline - time.monotonic()
        if places.result(job).exists():
            continue
        if left is not None and left <= 0:
            print("time is up; the same command goes on", flush=True)
            break
        print(f"== {job.name} {time.strftime('%H:%M:%S')}", flush=True)
        code = in_process(job, arguments, left)
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            print("stopped; the same command goes on", flush=True)
            break
        if code:
            fine = fine and code == BUSY
            print(
                f"{job.name}: " + ("another process works on it" if code == BUSY else f"failed with exit code {code}")
            )
    return fine


def in_process(job: Job, arguments: argparse.Namespace, seconds: float | None) -> int:
    """Run a job in a process of its own; when the time is up or we are stopped, it writes a checkpoint and ends."""
    forwarded = ["--scale", arguments.scale, "--seeds", str(arguments.seeds), "--work", str(arguments.work)]
    forwarded += ["--results", str(arguments.results), *(["--data", *arguments.data] if arguments.data else [])]
    process = subprocess.Popen([sys.executable, __file__, "--worker", job.name, *forwarded])
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def read_results(queue: list[Job], places: Places) -> dict[str, list[Result]]:
    """Finished runs by row, those of sweeps left out."""
    found: dict[str, list[Result]] = {}
    for job in queue:
        path = places.result(job)
        if job.rate is None and path.exists():
            found.setdefault(job.row.name, []).append(json.loads(path.read_text(encoding="utf-8")))
    return found


def show(values: list[float], digits: int = 3) -> str:
    """Mean, and the spread between seeds."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(done: dict[str, list[Result]]) -> Iterator[str]:
    yield "| row | what | seeds | parameters | tokens (M) | rate | loss | perplexity | bits per byte |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        runs = done.get(row.name, [])
        if runs:
            one = runs[0]
            yield (
                f"| {row.name} | {row.what} | {len(runs)} | {one['parameters']:,} | {one['tokens'] / 1e6:.1f} | "
                f"{one['rate']:g} | {show([r['loss'] for r in runs], 4)} | {show([r['perplexity'] for r in runs])} | "
                f"{show([r['bits_per_byte'] for r in runs], 4)} |"
            )


def verdict(what: str, found: str, met: bool | None) -> tuple[str, bool | None]:
    word = {True: "met", False: "MISSED", None: "not measured"}[met]
    return f"- {what}: {found or 'no run yet'}: {word}", met


def bars(done: dict[str, list[Result]], scale: Scale) -> Iterator[tuple[str, bool | None]]:
    yield pruned_bar(done)
    yield elastic_bar(done, scale)
    sizes = [len(result["sizes"]) for result in done.get("elastic", [])]
    yield verdict(
        "sizes of one elastic run >= 20", str(min(sizes)) if sizes else "", min(sizes) >= 20 if sizes else None
    )


def pruned_bar(done: dict[str, list[Result]]) -> tuple[str, bool | None]:
    """The smallest share of tokens with which the mean loss is that from scratch, over the seeds that both have."""
    what = "pruned and distilled reaches the loss from scratch with <= 40 % of its tokens"
    if "scratch" not in done:
        return verdict(what, "", None)
    target, reached, seen = {r["seed"]: r["loss"] for r in done["scratch"]}, [], []
    for share in SHARES:
        runs = {r["seed"]: r["loss"] for r in done.get(f"pruned-{share * 100:.0f}", [])}
        common = runs.keys() & target.keys()
        if common:
            theirs, ours = (statistics.mean(side[seed] for seed in common) for side in (target, runs))
            seen.append(f"{share:.0%}: {ours:.4f} against {theirs:.4f}")
            reached += [share] if ours <= theirs else []
    if not seen:
        return verdict(what, "", None)
    return verdict(what, "; ".join(seen), bool(reached))


def elastic_bar(done: dict[str, list[Result]], scale: Scale) -> tuple[str, bool | None]:
    """Perplexity of five sub-networks over that of the same sizes trained alone; the mean over the common seeds."""
    what = "sub-networks within 5 % in perplexity of models trained alone"
    ours: dict[str, dict[int, float]] = {}
    for result in done.get("elastic", []):
        for size in result["sizes"]:
            ours.setdefault(size["name"], {})[result["seed"]] = size["perplexity"]
    whole = list(scale.sizes())[-1]
    pairs = {name: f"alone-{number + 1}" for number, name in enumerate(scale.alone)} | {whole: "full"}
    ratios = {}
    for name, row in pairs.items():
        alone = {r["seed"]: r["perplexity"] for r in done.get(row, [])}
        common = alone.keys() & ours.get(name, {}).keys()
        if common:
            ratios[name] = statistics.mean(ours[name][seed] / alone[seed] for seed in common)
    if not ratios:
        return verdict(what, "", None)
    found = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    met = all(ratio <= 1.05 for ratio in ratios.values())
    return verdict(what, f"{found} ({len(ratios)} of {len(pairs)} sizes)", met if len(ratios) == len(pairs) else None)


def points(done: dict[str, list[Result]]) -> list[Point]:
    """The front of the first seed, by depth."""
    sizes = done["elastic"][0]["sizes"] if "elastic" in done else []
    return [
        Point(
            series=f"{size['name'].rpartition('-l')[2]} layers",
            label=size["name"],
            x=size["bytes"],
            y=size["file_bits_per_byte"],
            hollow=False,
        )
        for size in sizes
    ]


def print_all(done: dict[str, list[Result]], scale: Scale, directory: Path) -> bool:
    """Print the table and the bars, keep them beside the results; whether every bar that could be judged was met."""
    verdicts = list(bars(done, scale))
    text = "\n".join([*table(done), "", "Bars:", *(line for line, _ in verdicts)])
    print(text)
    write_text(directory / "table.md", text + "\n")
    if points(done):
        write_text(directory / "front.svg", draw(points(done)))
        print(f"plot: {directory / 'front.svg'}")
    return all(met is not False for _, met in verdicts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small", help="smoke: does everything run?")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--minutes", type=float, help="stop after so long; the run in progress keeps what it has")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATTERN", help="text files in place of the usual")
    parser.add_argument("--work", type=Path, default=ROOT / "build/starts", help="where runs lie")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/starts", help="where results lie")
    parser.add_argument("--list", action="store_true", help="what there is to do, and what is done")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--worker", metavar="RUN", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    scale = SCALES[arguments.scale]
    places = Places(
        data=data_section(arguments.data), work=arguments.work / scale.name, results=arguments.results / scale.name
    )
    queue = jobs(scale, seeds=arguments.seeds)
    if arguments.only:
        queue = [job for job in queue if job.row.name in arguments.only]
    if arguments.worker:
        sys.exit(run(next(job for job in queue if job.name == arguments.worker), places))
    if arguments.list:
        for job in queue:
            print(f"{'done' if places.result(job).exists() else '    '}  {job.name:28} {job.row.what}")
        return
    places.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run in progress stops, too
    fine = arguments.table or work_off(queue, places, arguments)
    header()
    met = print_all(read_results(jobs(scale, seeds=arguments.seeds), places), scale, places.results)
    sys.exit(not (fine and (met or scale.name == "smoke")))  # whose bars say nothing


if __name__ == "__main__":
    main()
