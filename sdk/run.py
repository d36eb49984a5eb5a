"""A run directory: corpus, stages, exports, measurements, report. The same command again goes on where it stopped.

```
<output_dir>/  recipe.yaml  recipe.resolved.yaml  env.json  lock  results.json  report.html
               data/  exports/<name>/
               stages/<name>/{metrics.jsonl, checkpoints/, model/, done.json}, or cache/, or corpus/
```
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright._verbs import VerbModule
from edgewright.files import write_json, write_text

if TYPE_CHECKING:
    from edgewright.data import Corpus
    from edgewright.data.held_out import HeldOut
    from edgewright.evaluate import Evaluation
    from edgewright.recipe import Recipe
    from edgewright.world import World

Say = Callable[[str], None]

MOST_DOCUMENTS = 1000
"""Held-out documents that a limited evaluation spreads its tokens over: they are held in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a finished run leaves.

    Args:
        directory: the run directory.
        report: the HTML page in it.
        results: the content of `results.json`.
    """

    directory: Path
    report: Path
    results: dict[str, Any]

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "directory": str(self.directory),
            "report": str(self.report),
            "artifacts": self.results["artifacts"],
            "checkpoints": self.results["checkpoints"],
            "samples": self.results["samples"],
            "warnings": self.results["warnings"],
        }


def run(recipe: str | Path, *overrides: str, fresh: bool = False, say: Say | None = None) -> RunResult:
    """Run a recipe from the corpus to the report, or go on with it, or find that all is done.

    Args:
        recipe: path of the YAML file.
        overrides: `section.key=value`.
        fresh: remove what an earlier run left in the directory first.
        say: receives lines of progress; standard error by default.

    Raises:
        RecipeErrors: the recipe is wrong. Locked: EW-402, another process works in the directory.
        Unsafe: EW-405, the directory holds what is not a run's. OutOfResources: EW-406, it cannot be written.
        Interrupted: a signal; the same command goes on. Every other EdgewrightError as its part raises it.
    """
    from edgewright.recipe import load_recipe
    from edgewright.run_directory import MARKER, taken
    from edgewright.training import StopRequest
    from edgewright.world import joined

    with joined() as world, ExitStack() as held:
        loaded = load_recipe(recipe, overrides)
        world.check(loaded)
        directory = loaded.run_directory
        loaded.data.fingerprint()  # the corpus is there; nothing is made or removed before that is known
        world.main_only(lambda: held.enter_context(taken(loaded, directory, fresh=fresh)))
        world.check_sees(directory / MARKER)
        stop = held.enter_context(StopRequest().installed())
        speak = (say or _to_stderr) if world.is_main else _to_nobody
        return _Run(Path(recipe), loaded, directory, speak, world).finish(stop)


class _Run:
    """The parts of a run, in order; each finds by itself what is done already."""

    def __init__(self, source: Path, recipe: Recipe, directory: Path, say: Say, world: World) -> None:
        self.source = source
        self.recipe = recipe
        self.directory = directory
        self.say = say
        self.world = world
        self.evaluated: HeldOut | None = None

    def finish(self, stop: Any) -> RunResult:
        from edgewright.data import prepare_data
        from edgewright.micro_batch import memory_errors
        from edgewright.stage import StageResult
        from edgewright.stage_work import StageWork

        corpus = self.world.main_first(lambda: prepare_data(self.recipe.data, self.directory / "data", say=self.say))
        self.world.main_only(lambda: self._begin(corpus))
        stages: dict[str, StageResult] = {}
        outputs: dict[str, Path] = {}
        for stage in self.recipe.stages:
            work = StageWork(
                recipe=self.recipe,
                corpus=corpus,
                directory=self.directory / "stages" / stage.name,
                earlier=dict(outputs),
                say=self.say,
                stop=stop,
                world=self.world,
            )
            with memory_errors(stage.name):
                result = stage.carry_out(work)
            outputs[stage.name] = result.output
            if isinstance(result, StageResult):
                stages[stage.name] = result
        self.world.main_only(lambda: self._conclude(corpus, stages))
        results = json.loads((self.directory / "results.json").read_text(encoding="utf-8"))
        return RunResult(directory=self.directory, report=self.directory / "report.html", results=results)

    def _begin(self, corpus: Corpus) -> None:
        """What is to be known and kept before the first stage."""
        from edgewright.compress.cache import check_caches_made_of
        from edgewright.resume import check_same_recipe

        check_caches_made_of(self.recipe, corpus)
        for stage in self.recipe.stages:
            check_same_recipe(self.recipe, stage, corpus, self.directory / "stages" / stage.name)
        _write_provenance(self.source, self.recipe, self.directory)
        self._look_ahead(corpus)
        if self.world.size == 1:
            from edgewright.planner.record import keep_plan

            keep_plan(self.recipe, self.directory, corpus.vocab_size, self.say)
        else:
            self.say("note: several processes are not predicted: a plan is of one alone")

    def _conclude(self, corpus: Corpus, stages: dict[str, Any]) -> None:
        """What comes of the finished stages: files, measurements, the report."""
        from edgewright.planner.text import compared_lines
        from edgewright.report import report

        artifacts = self._export({name: result.model for name, result in stages.items()})
        self._results(corpus, stages, artifacts)
        for line in compared_lines(self.directory):
            self.say(line)
        report(self.directory)

    def _look_ahead(self, corpus: Corpus) -> None:
        """Refuse now what would stop a later stage."""
        from edgewright.ahead import check_context, check_kept
        from edgewright.data.tokenizer import load_encoder
        from edgewright.preview import check_stages

        for stage in self.recipe.stages:
            if stage.type == "generate":
                check_context(self.recipe, stage, encoder=load_encoder(corpus.tokenizer_dir))
            elif stage.type == "cache":
                check_kept(self.recipe, stage, corpus.vocab_size)
        folders = {stage.name: self.directory / "stages" / stage.name for stage in self.recipe.trainings}
        finished = {name: folder / "model" for name, folder in folders.items() if (folder / "done.json").exists()}
        if len(finished) < len(folders):
            check_stages(self.recipe, corpus.vocab_size, finished)

    def _export(self, models: dict[str, Path]) -> dict[str, Path]:
        """Every export of the recipe that is not there yet, certified; paths by export name."""
        from edgewright.export import export
        from edgewright.export.source import weights_sha256

        paths: dict[str, Path] = {}
        for config in self.recipe.exports:
            model = models.get(config.model, Path(config.model))
            folder = self.directory / "exports" / config.name
            left_out = {"model"} if config.size else {"model", "size"}  # which older runs did not know
            asked = {**config.model_dump(mode="json", exclude=left_out), "weights": weights_sha256(model)}
            done = _finished_export(folder, asked)
            if done is not None:
                self.say(f"{config.name}: exported already")
                paths[config.name] = done
                continue
            started = time.perf_counter()
            artifact = export(
                model,
                to=config.to,
                quant=config.quant,
                size=config.size,
                out=folder,
                embedding_quant=config.embedding_quant,
                verify=config.verify,
                max_kl=config.max_kl,
            )
            write_json(_asked_file(folder), {"asked": asked, "path": os.path.relpath(artifact.path, self.directory)})
            paths[config.name] = artifact.path
            kl = (artifact.parity or {}).get("kl")
            self.say(
                f"{config.name}: {artifact.bytes:,} bytes, gate {artifact.gate}"
                + (f", KL {kl:.2e}" if kl is not None else "")
                + f", {time.perf_counter() - started:.1f} s"
            )
            for fallback in artifact.fallbacks:
                self.say(f"  {fallback.tensor} is stored as {fallback.quant}: {fallback.reason}")
        return paths

    def _results(self, corpus: Corpus, stages: dict[str, Any], artifacts: dict[str, Path]) -> None:
        """Measure everything, once: `results.json` remembers what it was measured from."""
        target = self.directory / "results.json"
        key = self._measured_from(corpus, stages, artifacts)
        if target.exists():
            before: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
            if before.get("measured_from") == key:
                self.say("measured already")
                return
        results = self._measure(corpus, stages, artifacts)
        results["measured_from"] = key
        write_json(target, results)

    def _measured_from(self, corpus: Corpus, stages: dict[str, Any], artifacts: dict[str, Path]) -> dict[str, Any]:
        from edgewright.export.artifact import read_entry
        from edgewright.export.source import weights_sha256
        from edgewright.machine import describe_machine

        recipe = self.recipe.model_dump(mode="json", include={"evaluate", "bench", "sample"})
        entries = {name: read_entry(path) for name, path in artifacts.items()}
        hashes = {name: None if entry is None else entry["sha256"] for name, entry in entries.items()}
        measured = {
            "recipe": recipe,
            "stages": {name: weights_sha256(stage.model) for name, stage in stages.items()},
            "artifacts": hashes,
            "data": corpus.fingerprint,
            "machine": describe_machine(),
        }
        return json.loads(json.dumps(measured))

    def _measure(self, corpus: Corpus, stages: dict[str, Any], artifacts: dict[str, Path]) -> dict[str, Any]:
        from edgewright.bench import bench
        from edgewright.inventory import describe_model
        from edgewright.machine import describe_machine
        from edgewright.planner.disk import disk_used

        self.evaluated = self._held_out(corpus) if self.recipe.evaluate else None
        models = {config.model: None for config in self.recipe.exports} | dict.fromkeys(stages)
        checkpoints = []
        for name in models:
            path = stages[name].model if name in stages else Path(name)
            label = name if name in stages else path.name
            quality = self._quality(path, label)
            size = describe_model(path)
            checkpoints.append(
                {
                    "name": label,
                    "path": os.path.relpath(path, self.directory),
                    "bits_per_byte": quality and quality.bits_per_byte,
                    "ci95": quality and quality.to_json()["ci95"],
                    "bytes": size.bytes,
                    "parameters": _parameters(path),
                }
            )
        rows = [self._artifact_row(name, path) for name, path in artifacts.items()]
        warnings: list[str] = []
        if self.recipe.bench and artifacts:
            settings = self.recipe.bench
            self.say(f"bench: {len(artifacts)} files, interleaved")
            measured = bench(
                *artifacts.values(),
                prompt=settings.prompt,
                generate=settings.generate,
                repeats=settings.repeats,
                threads=settings.threads,
            )
            warnings += [_by_name(warning, artifacts) for warning in measured.warnings]
            for row, speed in zip(rows, measured.artifacts, strict=True):
                figures = speed.to_json()
                row |= {name: figures[name] for name in _SPEED}
        return {
            "schema_version": 1,
            "name": self.recipe.name,
            "machine": describe_machine(threads=self.recipe.bench.threads if self.recipe.bench else None),
            "artifacts": rows,
            "checkpoints": checkpoints,
            "samples": self._samples(artifacts),
            "warnings": [*warnings, *_fallback_warnings(rows)],
            "data": corpus.report,
            "disk_used": disk_used(self.directory),
            "stages": [
                {"name": s.name, "steps": s.steps, "tokens": s.tokens, "seconds": s.seconds, "methods": s.methods}
                | ({} if s.draft is None else {"draft": s.draft})
                for s in stages.values()
            ],
        }

    def _artifact_row(self, name: str, path: Path) -> dict[str, Any]:
        from edgewright.export.artifact import read_entry, size_of

        config = next(export for export in self.recipe.exports if export.name == name)
        entry = read_entry(path)
        assert entry is not None, "an artifact has a manifest"
        parity = entry["parity"] or {}
        quality = self._quality(path, name)
        model = config.model if self.recipe.stage(config.model) else Path(config.model).name
        return {
            "name": name,
            "path": os.path.relpath(path, self.directory),
            "model": model,
            "to": config.to,
            "quant": config.quant,
            "bytes": size_of(path),
            "bits_per_byte": quality and quality.bits_per_byte,
            "bits_per_byte_ci": quality and quality.to_json()["ci95"],
            "gate": entry["gate"],
            "fallbacks": entry["fallbacks"],
            **{key: parity.get(key) for key in _PARITY},
            **dict.fromkeys(_SPEED),
        }

    def _held_out(self, corpus: Corpus) -> HeldOut:
        """What is held out and evaluated; a limited evaluation holds no more than it can need."""
        assert self.recipe.evaluate
        limit = self.recipe.evaluate.max_tokens
        most = limit and MOST_DOCUMENTS
        return corpus.held_out.for_evaluation(self.recipe.data, corpus.split, most)

    def _quality(self, path: Path, label: str) -> Evaluation | None:
        """Held-out bits per byte of a checkpoint or artifact in its own runtime, on the same windows for all of them.

        A limited evaluation draws windows at random from all held-out documents. None when the recipe skips it.
        """
        from edgewright.export.runtimes import open_session

        if self.evaluated is None or self.recipe.evaluate is None:
            return None
        limit = self.recipe.evaluate.max_tokens
        with open_session(path) as session:
            quality = self.evaluated.evaluate(
                session,
                max_tokens=limit or sys.maxsize,
                window=self.recipe.data.sequence_length,
                seed=None if limit is None else self.recipe.seed,
            )
        self.say(f"{label}: {quality.bits_per_byte:.4f} bits per byte on {quality.tokens:,} held-out tokens")
        return quality

    def _samples(self, artifacts: dict[str, Path]) -> list[dict[str, str]]:
        from edgewright.generate import generate

        settings = self.recipe.sample
        if settings is None:
            return []
        samples = []
        for name, path in artifacts.items():
            written = generate(
                path,
                settings.prompt,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=self.recipe.seed,
            )
            samples.append({"artifact": name, "prompt": settings.prompt, "text": written.text})
        return samples


_PARITY = (
    "kl",
    "kl_ci",
    "kl_limit",
    "kl_weights",
    "kl_runtime",
    "perplexity_ratio",
    "max_abs_diff",
    "top1_agreement",
    "greedy_identity",
    "lattice_identity",
    "reasons",
)
_SPEED = (
    "ttft_ms",
    "prompt_tokens_per_s",
    "prompt_tokens_per_s_sd",
    "tokens_per_s",
    "tokens_per_s_sd",
    "peak_memory",
    "baseline_memory",
)


def _asked_file(folder: Path) -> Path:
    """What an export was asked for, beside its folder, written once it is certified and in place."""
    return folder.with_name(f"{folder.name}.json")


def _finished_export(folder: Path, asked: dict[str, Any]) -> Path | None:
    """The artifact of an export, if it was made from these weights with these settings and is still what it was."""
    from edgewright.export.artifact import hash_of, read_entry

    record = _asked_file(folder)
    if not record.exists():
        return None
    remembered = json.loads(record.read_text(encoding="utf-8"))
    path: Path = folder.parent.parent / remembered["path"]
    entry = read_entry(path) if path.exists() else None
    same = remembered["asked"] == asked and entry is not None and entry["sha256"] == hash_of(path)
    return path if same else None


def _by_name(warning: str, artifacts: dict[str, Path]) -> str:
    """A warning with the exports' names in the place of paths, which are of this machine."""
    for name, path in artifacts.items():
        warning = warning.replace(str(path), name)
    return warning


def _fallback_warnings(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['name']}: {len(row['fallbacks'])} tensors are stored wider than {row['quant']}, "
        "because its blocks cannot hold their rows."
        for row in rows
        if row["fallbacks"]
    ]


def _parameters(directory: Path) -> int:
    """Number of stored parameters, from the headers of the safetensors files (tied weights once)."""
    import math

    from safetensors import safe_open

    total = 0
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _write_provenance(source: Path, recipe: Recipe, directory: Path) -> None:
    from edgewright.machine import describe_machine

    resolved = directory / "recipe.resolved.yaml"
    if source.resolve() != resolved.resolve():
        write_text(directory / "recipe.yaml", source.read_text(encoding="utf-8"))
    recipe.dump_yaml(resolved)
    write_json(directory / "env.json", describe_machine())


def _to_nobody(line: str) -> None:
    """The main process says it."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


sys.modules[__name__].__class__ = VerbModule
