"""Speed and memory of model files, measured with llama-bench's protocol and the same loop for every runtime.

Each artifact lives in a process of its own (`bench_worker.py`), so that peak memory is its own. All processes are open
at once and take turns, round by round (A B C, A B C, ...), so that a machine that slows down slows all of them down.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgewright._verbs import VerbModule
from edgewright.errors import RecipeError
from edgewright.export.runtimes.spinning import SETTLE_SECONDS
from edgewright.inventory import ModelFile, describe_model
from edgewright.machine import available_cores, describe_machine
from edgewright.worker import WorkerProcess

Loop = Literal["steps", "native"]

WORKER_COMMAND = (sys.executable, "-P", "-m", "edgewright.bench_worker")
FEWEST_REPEATS_TO_TRUST = 5
SPREAD_ALLOWED = 0.15  # standard deviation of tokens/s, as a share of the mean


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One artifact's numbers: mean over the repeats, `_sd` = sample standard deviation.

    Args:
        artifact: path, target, width, size, gate.
        runtime: what opened it: `torch`, `llamacpp`, `genai`.
        load_ms: opening the file, in milliseconds; includes importing the runtime's library.
        ttft_ms: time to first token in milliseconds: from handing over the prompt to having chosen the first new token.
        prompt_tokens_per_s: tokens of the prompt per second while it is processed at once.
        tokens_per_s: new tokens per second, one at a time, greedy.
        peak_memory: the most bytes that the artifact's process ever had in memory (VmHWM); the interpreter and the
            runtime's library are in it.
        baseline_memory: bytes that process had in memory before it opened anything: subtract it to compare runtimes.
    """

    artifact: ModelFile
    runtime: str
    load_ms: float
    ttft_ms: float
    ttft_ms_sd: float
    prompt_tokens_per_s: float
    prompt_tokens_per_s_sd: float
    tokens_per_s: float
    tokens_per_s_sd: float
    peak_memory: int
    baseline_memory: int | None
    device: str | None = None
    """Where it was measured, when that is not this machine."""

    def to_json(self) -> dict[str, object]:
        """The row as `bench --json` and `report --json` show it; quality is not measured here, so it is null."""
        return {
            "path": str(self.artifact.path),
            "to": self.artifact.to,
            "quant": self.artifact.quant,
            "bytes": self.artifact.bytes,
            "bits_per_byte": None,
            "kl": None,
            "ttft_ms": self.ttft_ms,
            "ttft_ms_sd": self.ttft_ms_sd,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "prompt_tokens_per_s_sd": self.prompt_tokens_per_s_sd,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_sd": self.tokens_per_s_sd,
            "peak_memory": self.peak_memory,
            "baseline_memory": self.baseline_memory,
            "gate": self.artifact.gate,
            "load_ms": self.load_ms,
            "runtime": self.runtime,
            "device": self.device,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Result of `bench`: rows in the order in which the artifacts were given."""

    command: str
    machine: dict[str, object]
    threads: int
    prompt: int
    generate: int
    repeats: int
    artifacts: tuple[BenchRow, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "command": self.command,
            "machine": self.machine,
            "threads": self.threads,
            "prompt": self.prompt,
            "generate": self.generate,
            "repeats": self.repeats,
            "artifacts": [row.to_json() for row in self.artifacts],
            "warnings": list(self.warnings),
        }


def bench(
    *artifacts: str | Path,
    prompt: int = 128,
    generate: int = 64,
    repeats: int = 5,
    threads: int | None = None,
    loop: Loop = "steps",
) -> BenchReport:
    """Measure speed and memory of model files and folders, all of them interleaved.

    One unmeasured round to warm up, then `repeats` rounds. A round processes `prompt` random tokens at once and then,
    from an empty cache, `generate` tokens one by one (greedy). The last logits' way into numpy and the argmax are in
    the numbers; tokenization is not. All artifacts are open at the same time: together they must fit into memory.

    Args:
        artifacts: GGUF files, GenAI, ONNX and OpenVINO folders, Hugging Face directories; bundles of a target and its
            draft, which get two rows; and `result.json` of packs that were measured on other devices
            (`bench_pack.py`), whose rows follow those of this machine.
        prompt: tokens of the prompt test.
        generate: tokens of the generation test.
        repeats: measured rounds; below 5 the report carries a warning.
        threads: threads of every runtime; None = all cores that this process may use.
        loop: how tokens are generated: "steps" asks every runtime for the logits of one token after the other (the
            time is the runtime's, choosing is numpy's argmax for all); "native" is each runtime's own greedy loop, its
            sampling included.

    Raises:
        RecipeError: EW-190 when there is nothing to measure or a number is not positive.
        BadInput: EW-390 / EW-391 for what is no model, EW-610 when an artifact's process dies, EW-611 when a test is
            longer than a model's context, and whatever opening it raises.
    """
    if not artifacts:
        raise RecipeError("EW-190", "there is nothing to measure", expected="at least one file or directory")
    threads = available_cores() if threads is None else threads
    _check_positive({"prompt": prompt, "generate": generate, "repeats": repeats, "threads": threads})
    from edgewright.bench_pack import read_result

    results = [read_result(Path(path)) for path in artifacts if Path(path).suffix == ".json"]
    files = [each for path in artifacts if Path(path).suffix != ".json" for each in _measured(Path(path), loop)]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(file, threads=threads)) for file, _ in files]
        for worker, (_, own) in zip(workers, files, strict=True):
            worker.open(prompt=prompt, generate=generate, threads=threads, loop=own)
        for worker in workers:
            worker.round()
        for worker in workers:
            worker.forget()
        for _ in range(repeats):
            for worker in workers:
                time.sleep(SETTLE_SECONDS)
                worker.round()
        rows = tuple(worker.row(prompt=prompt, generate=generate) for worker in workers)
        warnings = [warning for worker in workers for warning in worker.warnings()]
        warnings += [warning for row in rows for warning in _spread_warnings(row)]
    if files and repeats < FEWEST_REPEATS_TO_TRUST:
        warnings.append(f"Only {repeats} repeats: below {FEWEST_REPEATS_TO_TRUST} the spread says little.")
    return BenchReport(
        command=_command(artifacts, prompt=prompt, generate=generate, repeats=repeats, threads=threads, loop=loop),
        machine=describe_machine(threads=threads),
        threads=threads,
        prompt=prompt,
        generate=generate,
        repeats=repeats,
        artifacts=(*rows, *(_device_row(result, row) for result in results for row in result["artifacts"])),
        warnings=tuple(warnings),
    )


def _measured(path: Path, loop: Loop) -> list[tuple[ModelFile, Loop]]:
    """What is measured of an artifact, and by which loop. A bundle has two rows, its target alone and the pair, both by
    the runtime's own loop, since that is where drafts are used."""
    from edgewright.export.pairs.bundle import bundle_of

    bundle = bundle_of(path)
    if bundle is None:
        return [(describe_model(path), loop)]
    return [(describe_model(bundle.target), "native"), (describe_model(path), "native")]


def _device_row(result: dict[str, Any], row: dict[str, Any]) -> BenchRow:
    """A row that a pack measured on its device."""
    file = ModelFile(
        path=Path(row["path"]), to=str(row["to"]), quant=row["quant"], bytes=int(row["bytes"]), gate=row["gate"]
    )
    numbers = (
        "load_ms", "ttft_ms", "ttft_ms_sd", "prompt_tokens_per_s", "prompt_tokens_per_s_sd", "tokens_per_s",
        "tokens_per_s_sd",
    )  # fmt: skip
    return BenchRow(
        artifact=file,
        runtime=str(row["runtime"]),
        **{name: float(row[name]) for name in numbers},
        peak_memory=int(row["peak_memory"]),
        baseline_memory=row["baseline_memory"],
        device=str(result["device"]),
    )


class Worker(WorkerProcess):
    """The parent's end of one artifact's process."""

    def __init__(self, file: ModelFile, *, threads: int) -> None:
        super().__init__(WORKER_COMMAND, file.path, threads=threads)
        self.file = file
        self.rounds: list[dict[str, float]] = []
        self.opened: dict[str, object] = {}

    def open(self, *, prompt: int, generate: int, threads: int, loop: Loop) -> None:
        """Let the process open its artifact."""
        path = str(self.file.path.absolute())
        self.opened = self.ask(
            {"do": "open", "path": path, "threads": threads, "prompt": prompt, "generate": generate, "loop": loop}
        )

    def round(self) -> None:
        """Run both tests once and keep the times."""
        reply = self.ask({"do": "round"})
        self.rounds.append({name: float(str(value)) for name, value in reply.items()})

    def forget(self) -> None:
        """Drop what was measured so far: it was the warm-up."""
        super().forget()
        self.rounds.clear()

    def row(self, *, prompt: int, generate: int) -> BenchRow:
        """Mean and sample standard deviation over the rounds kept."""
        ttft, ttft_sd = _mean_sd([1000 * times["first"] for times in self.rounds])
        prompt_rate, prompt_sd = _mean_sd([prompt / times["prompt"] for times in self.rounds])
        rate, rate_sd = _mean_sd([generate / times["generate"] for times in self.rounds])
        baseline = self.opened["baseline_memory"]
        return BenchRow(
            artifact=self.file,
            runtime=str(self.opened["runtime"]),
            load_ms=1000 * float(str(self.opened["load"])),
            ttft_ms=ttft,
            ttft_ms_sd=ttft_sd,
            prompt_tokens_per_s=prompt_rate,
            prompt_tokens_per_s_sd=prompt_sd,
            tokens_per_s=rate,
            tokens_per_s_sd=rate_sd,
            peak_memory=int(max(times["peak_memory"] for times in self.rounds)),
            baseline_memory=None if baseline is None else int(str(baseline)),
        )


def _spread_warnings(row: BenchRow) -> list[str]:
    """Says so when the repeats disagree so much that the mean means little."""
    share = row.tokens_per_s_sd / row.tokens_per_s
    if share <= SPREAD_ALLOWED:
        return []
    return [f"{row.artifact.path}: tokens/s spread by {share:.0%}: the machine was busy, or the test too short."]


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _check_positive(numbers: Mapping[str, int]) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise RecipeError("EW-190", f"{name} must be positive", expected="at least 1", found=value)


def _command(
    artifacts: Sequence[str | Path], *, prompt: int, generate: int, repeats: int, threads: int, loop: Loop
) -> str:
    paths = " ".join(map(str, artifacts))
    tests = f"--prompt {prompt} --generate {generate} --repeats {repeats} --threads {threads}"
    return f"edgewright bench {paths} {tests}" + (f" --loop {loop}" if loop != "steps" else "")


sys.modules[__name__].__class__ = VerbModule
