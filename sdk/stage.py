"""One stage of a recipe: build what it names, go on from the newest good checkpoint, train, write the plain model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright import checkpoint
from edgewright.continuation import goes_on_from_latents, start_notes, without_load_report
from edgewright.derived import DerivedStudentConfig, source_of, start_directory
from edgewright.errors import BadInput, RecipeError
from edgewright.files import disk_errors, sync_directory, sync_tree, write_json
from edgewright.memory_rules import check_offload, check_release
from edgewright.method import Method, by_key, can_compile
from edgewright.metrics import Metrics
from edgewright.micro_batch import limit_allocator
from edgewright.planner.peak import PeakMemory
from edgewright.resume import check_same_recipe, on_these_processes, on_this_machine, several
from edgewright.student import (
    CheckpointStudentConfig,
    PresetStudentConfig,
    StageStudentConfig,
    build_preset,
    check_head,
    load_model,
    without_progress_bars,
)
from edgewright.training import StopRequest, decide, free_decisions, memory_decisions
from edgewright.vocabulary import check_rows, check_same_tokens
from edgewright.weights import check_weights, hold_weights_as, plain_state_dict, without_beside
from edgewright.world import ALONE, World

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from edgewright.data import Batches, Corpus, TokenStream
    from edgewright.objective import Objective
    from edgewright.recipe import MethodConfig, Recipe, StageConfig


COUNTED_AT_ONCE = 1 << 24
"""Tokens of a text that are in memory while they are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a finished stage leaves."""

    name: str
    model: Path
    """Hugging Face directory of the plain model; `lattice.safetensors` in it where a method quantizes."""
    steps: int
    tokens: int
    seconds: float
    parameters: int
    methods: dict[str, dict[str, float]]
    decisions: dict[str, Any]
    draft: dict[str, Any] | None = None
    """What `draft.json` beside the model says, where it was aligned as a draft."""
    peak_memory: int | None = None
    """Bytes above what the process had before; None where the system does not tell, or in a run of an older version."""

    @property
    def output(self) -> Path:
        """What later stages start from or learn from."""
        return self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The trained form of an earlier stage, from which one goes on."""

    methods: Sequence[MethodConfig]
    directory: Path
    """Its weights, with what the methods trained beside them."""


def train_stage(
    recipe: Recipe,
    stage: StageConfig,
    corpus: Corpus,
    directory: Path,
    earlier: dict[str, Path],
    *,
    say: Callable[[str], None],
    stop: StopRequest,
    world: World = ALONE,
) -> StageResult:
    """Train a stage, or go on with it, or find that it is done.

    Args:
        directory: the stage's own; `earlier`: model directories of the finished stages.
        world: the processes that train it together; they all call this, and all get the result.

    Raises:
        RecipeError: EW-705, the directory holds a run of another recipe; EW-704, a method changed nothing.
        Interrupted, Diverged, OutOfResources: see `Trainer.train`.
    """
    import torch

    from edgewright.compress.generate import open_generated
    from edgewright.data import MixedBatches
    from edgewright.trainer import Job, Trainer, TrainingModule

    done = directory / "done.json"
    world.main_first(lambda: check_same_recipe(recipe, stage, corpus, directory))
    if done.exists():
        say(f"{stage.name}: done already")
        return _read_result(done)
    settings, data = stage.training, recipe.data
    newest = checkpoint.newest(directory / "checkpoints", say)
    loaded = checkpoint.load(newest) if newest else None
    if loaded and loaded.state.decisions.get("processes", 1) == world.size:
        torch.set_num_threads(loaded.state.decisions["threads"])
    peak = PeakMemory.begin("cuda" if torch.cuda.is_available() else "cpu")
    model, origin = world.main_first(lambda: _student(recipe, stage, corpus, directory, earlier, say))
    tokens_per_step = settings.tokens_per_step(data.sequence_length)
    steps = stage.budget.steps(tokens_per_step)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decisions = decide(settings, parameters=parameters, tokens=steps * tokens_per_step, processes=world.size)
    decisions["compile"] &= can_compile(config.type for config in stage.methods)
    if not loaded:
        decisions |= _within_budget(recipe, stage, model, earlier, decisions, say)
    decisions = world.shared(decisions)
    state = loaded.state if loaded else checkpoint.TrainState(decisions=decisions)
    on_these_processes(state, decisions, say)
    state.decisions = memory_decisions(settings) | state.decisions | free_decisions(settings)
    on_this_machine(state, say)
    if peak is not None and state.decisions["compile"]:
        peak = peak.allowing_for_compiler()
    if state.decisions["offload_optimizer"]:
        check_offload(state.decisions["device"])
    limit_allocator(stage.budget.memory)
    torch.manual_seed(recipe.seed_of(stage))
    check_weights(model, state.decisions["weights"], methods=[config.type for config in stage.methods])
    stored = hold_weights_as(model, state.decisions["weights"])  # before the device sees them, which may be too small
    if stored:
        say(f"{stage.name}: {stored}")
    methods: list[Method] = [config.build() for config in stage.methods]
    for key, method in by_key(methods).items():
        narrow = method.before_device(model, state.decisions["device"])
        if narrow:
            say(f"{key}: {narrow}")
    for note in stage.optimizer.notes(state.decisions["device"]):
        say(f"note: {note}")
    if state.decisions["sharding"] == "none":  # else the weights get to the devices in parts
        model.to(state.decisions["device"])
    check_head(model, f"start of stage {stage.name}")
    if state.decisions["gradient_release"]:
        check_release(methods)
    for method in methods:
        method.check_run(steps)
    for method in methods:
        method.read_text(partial(_token_counts, stage, corpus, earlier), corpus.eos_id)
    _prepare(methods, model, origin, say)
    batches, held_out = (_batches(recipe, stage, corpus, stream) for stream in (corpus.train, corpus.held_out))
    packing = batches.describe()
    if packing:
        say(f"{stage.name}: {packing}")
    if stage.generated is not None:
        _check_measurable(stage, earlier)
        text = open_generated(earlier[stage.generated.stage])
        batches = MixedBatches(batches, _batches(recipe, stage, corpus, text), stage.generated.share)
    objective = _objective(recipe, stage, model, corpus, earlier, say)
    objective.attach(model)
    module = TrainingModule(model, objective, getattr(torch, state.decisions["precision"]))
    job = Job(
        model=model,
        replica=world.replicate(module, settings.sharding),  # before the optimizer, which is to own what trains
        objective=objective,
        methods=methods,
        optimizer=stage.optimizer.build(model),
        learning_rate=stage.optimizer.learning_rate,
        schedule=stage.schedule,
        batches=batches,
        held_out=held_out,
        bytes_per_token=corpus.held_out.bytes / max(1, corpus.held_out.predicted),
        total_steps=steps,
        settings=settings,
        directory=directory,
        extra_files=lambda target: _copy_tokenizer(corpus.tokenizer_dir, target),
        peak=peak,
    )
    metrics = Metrics(
        directory / "metrics.jsonl",
        name=stage.name,
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
        say=say,
        silent=not world.is_main,
    )
    trainer = Trainer(job, state, metrics, stop, world)
    metrics.rewind(state.step)
    say(f"{stage.name}: {parameters:,} parameters, {steps:,} steps of {tokens_per_step:,} tokens; {_decided(state)}")
    if loaded:
        metrics.event("resumed", step=state.step)
        trainer.restore(loaded, checkpoint.read_weights(loaded.directory / "model"))
    final = trainer.train()
    trained = job.replica.whole_model()

    def write() -> None:
        assert trained is not None, "the main process has the whole model"
        written = _write_model(methods, trained, directory / "model", job.extra_files)
        draft = _measure_draft(stage, written, corpus, earlier, torch.device(final.decisions["device"]), say)
        result = StageResult(
            name=stage.name,
            model=written,
            steps=final.step,
            tokens=final.tokens,
            seconds=final.seconds,
            parameters=parameters,
            methods={key: method.describe(trained).numbers for key, method in by_key(methods).items()},
            decisions=final.decisions,
            draft=draft,
            peak_memory=max(final.peak_memory, peak.bytes()) if peak is not None else final.peak_memory or None,
        )
        write_json(done, {**asdict(result), "model": "model"})

    world.main_only(write)
    return _read_result(done)


def trained_form(stage: Path, say: Callable[[str], None]) -> Path:
    """The weights that a finished stage trained (latents, where a method has them), to go on from.

    They are in the checkpoint of its last step, and nowhere else; an older one would be another model. Where that is
    damaged the finished model stands in, loudly: it is of the same step, but rounded where a method quantizes.
    """
    last = checkpoint.directory_of(stage / "checkpoints", _read_result(stage / "done.json").steps)
    problem = checkpoint.broken(last)
    if problem is None:
        return last / "model"
    say(
        f"warning: {last.name}, the last checkpoint of stage {stage.name}, is damaged ({problem}): going on from its "
        "finished model, in which quantized weights are rounded"
    )
    return stage / "model"


def model_of(config: CheckpointStudentConfig | StageStudentConfig, earlier: dict[str, Path]) -> Path:
    """The directory that a checkpoint or an earlier stage stands for."""
    return config.model if isinstance(config, CheckpointStudentConfig) else earlier[config.stage]


def _student(
    recipe: Recipe,
    stage: StageConfig,
    corpus: Corpus,
    folder: Path,
    earlier: dict[str, Path],
    say: Callable[[str], None],
) -> tuple[PreTrainedModel, Origin | None]:
    """The model that a stage starts from, and, where that is the trained form of an earlier stage, whose."""
    config, origin = stage.student, None
    for note in start_notes(recipe, stage):
        say(f"note: {note}")
    if isinstance(config, PresetStudentConfig):
        preset = build_preset(
            config,
            vocab_size=corpus.vocab_size,
            max_position_embeddings=recipe.data.sequence_length,
            bos=corpus.start_id,
            eos=corpus.eos_id,
            seed=recipe.seed_of(stage),
        )
        return preset, None
    from edgewright.export.lattice import SIDECAR

    source = source_of(config)
    assert source is not None, "only presets start from nothing"
    directory = model_of(source, earlier)
    if isinstance(config, StageStudentConfig):
        before = recipe.stage(config.stage)
        assert before is not None, "the recipe was checked"
        if goes_on_from_latents(before):
            directory = trained_form(directory.parent, say)
            origin = Origin(methods=before.methods, directory=directory)
    if stage.methods and (directory / SIDECAR).exists():
        say(f"note: {directory.name} is quantized already; its latent weights are lost, and rounding starts anew")
    speaks = model_of(config.speaks, earlier) if isinstance(config, DerivedStudentConfig) else directory
    for note in check_same_tokens(corpus.tokenizer_dir, speaks, role=f"start of stage {stage.name}"):
        say(f"note: {note}")
    if isinstance(config, DerivedStudentConfig):
        counts = partial(_token_counts, stage, corpus, earlier)
        directory = start_directory(config, directory, folder, recipe, stage, corpus, counts, say)
    ours = isinstance(config, StageStudentConfig)
    with without_load_report() if ours else nullcontext():
        model = load_model(directory)
    if isinstance(config, DerivedStudentConfig):
        for note in config.notes(recipe, stage, sum(parameter.numel() for parameter in model.parameters())):
            say(f"note: {note}")
    if model.config.vocab_size < corpus.vocab_size:
        raise BadInput(
            "EW-702",
            "the student's vocabulary is smaller than the tokenizer's",
            where=directory,
            expected=f"at least {corpus.vocab_size} tokens",
            found=model.config.vocab_size,
            fix="use the model's own tokenizer: data.tokenizer = {type: pretrained, path: MODEL}",
        )
    if model.config.max_position_embeddings < recipe.data.sequence_length:
        raise RecipeError(
            "EW-706",
            "data.sequence_length is longer than the model's context",
            where=directory,
            expected=f"at most {model.config.max_position_embeddings}",
            found=recipe.data.sequence_length,
            fix="lower data.sequence_length",
        )
    return model, origin


def _token_counts(stage: StageConfig, corpus: Corpus, earlier: dict[str, Path]) -> np.ndarray:
    """How often each token comes in the text that a stage adds to the recipe's own, else in that; [V].

    The token that only starts documents counts for nothing: no model has to say it.
    """
    import numpy as np

    from edgewright.compress.generate import open_generated

    text = corpus.train if stage.generated is None else open_generated(earlier[stage.generated.stage])
    counts = np.zeros(corpus.vocab_size, np.int64)
    for begin in range(0, len(text.tokens), COUNTED_AT_ONCE):
        counts += np.bincount(text.tokens[begin : begin + COUNTED_AT_ONCE], minlength=corpus.vocab_size)
    if corpus.start_id != corpus.eos_id:
        counts[corpus.start_id] = 0
    return counts


def _within_budget(
    recipe: Recipe,
    stage: StageConfig,
    model: PreTrainedModel,
    earlier: dict[str, Path],
    decisions: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What `budget.memory` changes in the decisions of a run that begins."""
    from edgewright.budget_search import within_budget

    choice = within_budget(recipe, stage, model, [teacher.directory(earlier) for teacher in stage.teachers], decisions)
    if choice is None:
        return {}
    say(f"{stage.name}: {choice.text}")
    return choice.settings


def _batches(recipe: Recipe, stage: StageConfig, corpus: Corpus, stream: TokenStream) -> Batches:
    """The sequences of some text in the order of this stage."""
    return stream.batches(
        sequence_length=recipe.data.sequence_length,
        seed=recipe.seed_of(stage),
        restart_at_documents=recipe.data.restart_at_documents,
        start_id=corpus.start_id,
        eos_id=corpus.eos_id,
    )


def _objective(
    recipe: Recipe,
    stage: StageConfig,
    student: PreTrainedModel,
    corpus: Corpus,
    earlier: dict[str, Path],
    say: Callable[[str], None],
) -> Objective:
    from edgewright.compress.cache import CachedTargets, CacheKey
    from edgewright.compress.cross_tokenizer import CrossTokenizerTeacher
    from edgewright.compress.sandwich import SandwichConfig
    from edgewright.compress.teacher import OnlineTeacher
    from edgewright.objective import NextTokenConfig
    from edgewright.preview import stored_architecture

    config = stage.lesson
    if isinstance(config, NextTokenConfig | SandwichConfig):
        return config.build()
    role, source = f"teacher of stage {stage.name}", config.teacher.build(earlier, CacheKey.of(recipe.data, corpus))
    if config.crosses_tokenizers and isinstance(source, OnlineTeacher) and source.directory is not None:
        say(f"note: {role}: it reads the text in its own tokens, and is compared where both have read the same")
        return config.build(CrossTokenizerTeacher(source, corpus.tokenizer_dir, source.directory))
    rows = [(source.folder, source.layout.vocab_size)] if isinstance(source, CachedTargets) else []
    for teacher in stage.teachers:
        directory = teacher.directory(earlier)
        rows.append((directory, stored_architecture(directory).config.get_text_config().vocab_size))
        for note in check_same_tokens(corpus.tokenizer_dir, directory, role=role):
            say(f"note: {note}")
    for where, count in rows:
        for note in check_rows(student.config.vocab_size, count, corpus.vocab_size, role=role, where=where):
            say(f"note: {note}")
    return config.build(source)


def _prepare(methods: list[Method], model: PreTrainedModel, origin: Origin | None, say: Callable[[str], None]) -> None:
    """Let every method change the model and go on from what it trained before; one that changes nothing is an error."""
    from edgewright.report_text import figures

    trained = checkpoint.read_weights(origin.directory) if origin and methods else None
    for key, method in by_key(methods).items():
        method.prepare(model)
        if origin and trained:
            method.go_on(origin.methods, trained)
        report = method.describe(model)
        if report.changed == 0:
            raise method.got_nothing()
        alone = ", ".join(report.skipped) or "none"
        say(f"{key}: {report.changed} layers ({figures(report.numbers)}); left alone: {alone}")


def _write_model(
    methods: list[Method], model: PreTrainedModel, target: Path, extra_files: Callable[[Path], None]
) -> Path:
    """The plain model as a Hugging Face directory in float32, its lattice beside it; atomically."""
    from edgewright.compress.factored_model import mark
    from edgewright.export.lattice import LatticeTensor, save_sidecar

    plain, lattice = model, dict[str, LatticeTensor]()
    for method in methods:
        plain, quantized = method.finish(plain)
        lattice |= quantized
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    for leftover in target.parent.glob(f".tmp-*-{target.name}"):
        shutil.rmtree(leftover)
    with disk_errors(target):
        with without_progress_bars():
            plain.save_pretrained(temporary, state_dict=without_beside(plain, plain_state_dict(plain)))
        mark(plain, temporary)
        extra_files(temporary)
        for method in methods:
            method.write_beside(temporary)
        if lattice:
            save_sidecar(temporary, lattice)
        sync_tree(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.rename(temporary, target)
    sync_directory(target.parent)
    return target


def _check_measurable(stage: StageConfig, earlier: dict[str, Path]) -> None:
    """Refuse an alignment whose draft could not be measured, before it is trained (EW-846)."""
    from edgewright.compress.acceptance import held_out_texts
    from edgewright.compress.align import AlignConfig

    if isinstance(stage.objective, AlignConfig) and stage.generated is not None:
        held_out_texts(stage.objective, earlier[stage.generated.stage], earlier)


def _measure_draft(
    stage: StageConfig,
    model: Path,
    corpus: Corpus,
    earlier: dict[str, Path],
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """The acceptance of a draft that was aligned, which lies beside it from then on."""
    from edgewright.compress.acceptance import summary, write_draft_json
    from edgewright.compress.align import AlignConfig

    if not isinstance(stage.objective, AlignConfig):
        return None
    assert stage.generated is not None, "the recipe was checked"
    generated = earlier[stage.generated.stage]
    found = write_draft_json(model, stage.objective, generated, earlier, corpus.start_id, device)
    say(f"{stage.name}: {summary(found)}")
    return found


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _decided(state: checkpoint.TrainState) -> str:
    d = state.decisions
    compiled = "compiled" if d["compile"] else "not compiled"
    processes = f"{several(d)}, " if d["processes"] > 1 else ""
    return f"{processes}{d['device']}, {d['precision']}, {d['threads']} threads, {compiled}"


def _read_result(path: Path) -> StageResult:
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("schema_version", None)
    return StageResult(**{**values, "model": path.parent / values["model"]})
