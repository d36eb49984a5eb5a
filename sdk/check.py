"""`check`: everything that can be known about a recipe in seconds, before anything is trained."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgewright._verbs import VerbModule
from edgewright.compress.choice import LayerChoice
from edgewright.continuation import start_notes
from edgewright.derived import DerivedStudentConfig, source_of
from edgewright.errors import EdgewrightError, OutOfResources, RecipeError, RecipeErrors
from edgewright.exactness import count_parameters, held_by, not_held, not_rounded, on_no_lattice, trained_lattices
from edgewright.student import CheckpointStudentConfig, PresetStudentConfig, StageStudentConfig

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedModel

    from edgewright.compress.cache_config import CacheStageConfig
    from edgewright.compress.generate_config import GenerateStageConfig
    from edgewright.compress.text_stage import TextStageConfig
    from edgewright.export.lattice import LatticeTensor
    from edgewright.preview import Preview
    from edgewright.recipe import AnyStageConfig, ExportConfig, Recipe, StageConfig
    from edgewright.show_batch import ShownBatch

FIRST_PIECES = 64
"""Documents, or pieces of long ones, that are read to see that the corpus can be."""
UNKNOWN_VOCABULARY = 1024
"""Stands for the tokenizer's, where that cannot be opened: no method's layer depends on it."""
BYTES_PER_PARAMETER = 12
"""Of a checkpoint while training: weights and both moments of AdamW, float32."""
RESERVE = 1.1

Status = Literal["ok", "note", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    what: str
    status: Status
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `check` found.

    Args:
        recipe: the file.
        checks: one for each thing that was opened.
        parameters: of each stage's model, where they are known.
        errors: what would stop the run, in the order in which it would.
    """

    recipe: Path
    checks: tuple[Check, ...]
    parameters: dict[str, int]
    errors: tuple[EdgewrightError, ...]
    batch: ShownBatch | None = None
    """What was asked for with `show_batch`."""

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def exit_code(self) -> int:
        """0, or that of the first error."""
        return self.errors[0].exit_code if self.errors else 0

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "recipe": str(self.recipe),
            "ok": self.ok,
            "checks": [{"what": c.what, "status": c.status, "found": c.found} for c in self.checks],
            "parameters": self.parameters,
            "errors": [{**error.to_json(), "message": error.message()} for error in self.errors],
            **({} if self.batch is None else {"batch": self.batch.to_json()}),
        }


def check(recipe: str | Path, *overrides: str, show_batch: bool = False) -> CheckReport:
    """Validate a recipe, open its corpus, tokenizer and models, look at the disk. Nothing is trained or written.

    Args:
        recipe: path of the YAML file.
        overrides: `section.key=value`.
        show_batch: also prepare the corpus (in a temporary folder, unless the run has it) and give the first batch of
            the first stage: tokens, what is learned of them, where documents meet.

    Raises:
        RecipeErrors: the recipe itself is wrong; all errors at once, and nothing else is looked at.
    """
    from edgewright.recipe import load_recipe

    return _Checker(Path(recipe), load_recipe(recipe, overrides)).report(show_batch=show_batch)


class _Checker:
    """Looks at one thing after the other and goes on after an error."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.checks: list[Check] = []
        self.errors: list[EdgewrightError] = []
        self.parameters: dict[str, int] = {}
        self.vocab_size: int | None = None
        self.sound: set[Path] = set()
        self.batch: ShownBatch | None = None
        self.left: dict[str, PreTrainedModel] = {}
        """What the stages leave that could begin."""
        self.smaller: dict[str, int] = {}
        """Parameters that stages leave whose methods change the shape of the model."""
        self.caches = 0
        """Bytes of targets that are to be written, about."""
        self._key: dict[str, Any] | None = None
        """What is known of the data for caches, once one was asked for."""

    def report(self, *, show_batch: bool = False) -> CheckReport:
        self._try("corpus", self._corpus)
        self._try("tokenizer", self._tokenizer)
        for directory in sorted(set(self._models())):
            self._try(f"model {directory.name}", partial(self._model, directory))
        for stage in self.recipe.stages:
            self._try(f"stage {stage.name}", self._look_at(stage))
        self._try("disk", self._disk)
        if show_batch and self.recipe.trainings:
            self._try("batch", self._show)
        return CheckReport(
            recipe=self.path,
            checks=tuple(self.checks),
            parameters=self.parameters,
            errors=tuple(self.errors),
            batch=self.batch,
        )

    def _look_at(self, stage: AnyStageConfig) -> Callable[[], Iterator[str]]:
        if stage.type == "train":
            return partial(self._stage, stage)
        return partial(self._reading, stage) if stage.type == "text" else partial(self._making, stage)

    def _show(self) -> Iterator[str]:
        """The first batch, and as notes what was said while the corpus was prepared."""
        from edgewright.show_batch import show_batch

        said: list[str] = []
        self.batch = show_batch(self.recipe, said.append)
        yield f"{len(self.batch.rows)} sequences, {self.batch.learned:,} tokens are learned"
        yield from said

    def _try(self, what: str, look: Callable[[], Iterator[str]]) -> None:
        """Note what a look finds: the first line is what was found, further ones are notes."""
        try:
            for number, line in enumerate(look()):
                self.checks.append(Check(what=what, status="note" if number else "ok", found=line))
        except EdgewrightError as error:
            found = error.errors if isinstance(error, RecipeErrors) else [error]
            self.checks.append(Check(what=what, status="failed", found="; ".join(one.what for one in found)))
            known = {one.message() for one in self.errors}  # each is said once, however many looks meet it
            self.errors += [one for one in found if one.message() not in known]

    def _corpus(self) -> Iterator[str]:
        from edgewright.data import HfData, iterate_documents

        source = self.recipe.data
        files = source.fingerprint()
        if isinstance(source, HfData):
            yield f"{len(files)} files; the run reads them"
            return
        pieces = list(islice(iterate_documents(source), FIRST_PIECES))
        if not pieces:
            raise RecipeError(
                "EW-131",
                "the corpus has no text",
                where=self.path.absolute(),
                expected="documents that are not blank",
                found=f"{len(files)} files",
                fix="point data to files with text",
            )
        yield f"{len(files)} files; the first {len(pieces)} documents can be read"

    def _tokenizer(self) -> Iterator[str]:
        from edgewright.data import PretrainedTokenizer
        from edgewright.data.tokenizer import load_encoder

        wanted = self.recipe.data.tokenizer
        if isinstance(wanted, PretrainedTokenizer):
            self.vocab_size = load_encoder(wanted.path).vocab_size
            yield f"{self.vocab_size:,} tokens, {wanted.path}"
        else:
            self.vocab_size = wanted.vocab_size
            yield f"{self.vocab_size:,} tokens, trained on the corpus"

    def _models(self) -> Iterator[Path]:
        """Every model directory that the recipe names."""
        for _, _, config in self._taught():
            if config.type == "checkpoint":
                yield config.model
        stages = {stage.name for stage in self.recipe.trainings}
        yield from (Path(export.model) for export in self.recipe.exports if export.model not in stages)

    def _taught(
        self,
    ) -> Iterator[tuple[AnyStageConfig, str, CheckpointStudentConfig | StageStudentConfig]]:
        """Every model that a student comes from, and every teacher, with its stage and role."""
        for stage in self.recipe.stages:
            student = stage.student if stage.type == "train" else None
            source = None if student is None else source_of(student)
            if source is not None:
                yield stage, "student", source
                if isinstance(student, DerivedStudentConfig) and student.speaks != source:
                    yield stage, "target", student.speaks
            for teacher in dict.fromkeys((*stage.teachers, *(stage.judges if stage.type == "train" else ()))):
                yield stage, "teacher", teacher

    def _model(self, directory: Path) -> Iterator[str]:
        from edgewright.compress.elastic import find_size, sizes_of
        from edgewright.export.guard import check_model_directory

        check_model_directory(directory)
        self.sound.add(directory)
        for export in self.recipe.exports:
            if export.model == str(directory) and export.size is not None:
                find_size(sizes_of(directory), export.size, f"exports.{export.name}.size")
        yield f"{count_parameters(directory):,} parameters, {directory}"

    def _stage(self, stage: StageConfig) -> Iterator[str]:
        """Parameters of the student, then whether everything speaks the data's tokens."""
        count = self._count(stage.student)
        if count is not None:
            self.parameters[stage.name] = count
        self._heads(stage)
        unknown = self._cached(stage)
        ahead = self._preview(stage)
        if ahead is not None:
            self.left[stage.name] = ahead.left
            if any(type(method).leaves is not LayerChoice.leaves for method in stage.methods):
                self.smaller[stage.name] = sum(parameter.numel() for parameter in ahead.left.parameters())
        count = self.parameters.get(stage.name)
        size = "a number of parameters that is not known yet" if count is None else f"{count:,} parameters"
        methods = ", ".join(method.type for method in stage.methods) or "no compression"
        yield f"{size}, {methods}, {stage.objective.type}"
        yield from [] if unknown is None else [unknown]
        yield from start_notes(self.recipe, stage)
        if isinstance(stage.student, DerivedStudentConfig) and count is not None:
            yield from stage.student.notes(self.recipe, stage, count)
        for owner, role, config in self._taught():
            crosses = role == "teacher" and stage.lesson.type == "distill" and stage.lesson.crosses_tokenizers
            made = stage.student if role == "student" and isinstance(stage.student, DerivedStudentConfig) else None
            if made is not None and made.speaks != made.source:
                continue
            if owner is stage and config.type == "checkpoint" and config.model in self.sound and not crosses:
                yield from self._same_tokens(config.model, f"{role} of stage {stage.name}")
        if ahead is not None:
            self._look_at_lattice(stage, ahead)

    def _reading(self, stage: TextStageConfig) -> Iterator[str]:
        """A stage that brings more text: whether it is there."""
        from edgewright.data import FilesData, iterate_documents

        source = FilesData(**stage.model_dump(exclude={"type", "name"}))
        files = source.fingerprint()
        pieces = list(islice(iterate_documents(source), FIRST_PIECES))
        yield f"text, {len(files)} files; the first {len(pieces)} documents can be read"

    def _making(self, stage: CacheStageConfig | GenerateStageConfig) -> Iterator[str]:
        """A stage that trains nothing: whether its teachers speak the data's tokens, and what it will make."""
        from edgewright.ahead import check_context, check_kept
        from edgewright.compress.prompts import check_prompts
        from edgewright.data import PretrainedTokenizer
        from edgewright.data.tokenizer import load_encoder
        from edgewright.planner.cached import guessed_bytes

        yield f"{stage.type}, {len(stage.teachers)} teacher{'s' if len(stage.teachers) > 1 else ''}"
        if stage.type == "generate":
            check_prompts(stage)
            wanted = self.recipe.data.tokenizer
            known = isinstance(wanted, PretrainedTokenizer) and self.vocab_size is not None
            encoder = load_encoder(wanted.path) if known else None  # type: ignore[union-attr]
            check_context(self.recipe, stage, encoder=encoder, sound=self.sound)
        sound = [
            config.model for config in stage.teachers if config.type == "checkpoint" and config.model in self.sound
        ]
        for model in sound:
            yield from self._same_tokens(model, f"teacher of stage {stage.name}")
        if stage.type == "cache":
            layout = check_kept(self.recipe, stage, self.vocab_size, sound=self.sound)
            self.caches += 0 if layout is None else guessed_bytes(self.recipe, stage, layout)

    def _cached(self, stage: StageConfig) -> str | None:
        """Whether a cache that another run made is there, of this data, and of use to the losses; what is not known.

        Raises:
            BadInput: EW-791, EW-793. RecipeError: EW-781, EW-794, EW-797. What preparing the corpus raises.
        """
        objective = stage.lesson
        if objective.type == "distill" and objective.teacher.type == "cache" and objective.teacher.path is not None:
            from edgewright.ahead import known_key
            from edgewright.compress.cache import check_made_of, check_pieces, read_manifest
            from edgewright.recipe_rules import check_cache

            manifest = read_manifest(objective.teacher.path)
            check_pieces(objective.teacher.path, manifest)
            check_cache(stage.name, objective, manifest["layout"]["kind"], manifest["made"]["temperature"])
            if self._key is None:
                self._key = known_key(self.recipe)
            check_made_of(objective.teacher.path, manifest, self._key)
            if "tokens" not in self._key:
                return "whether the cache is of this text is seen when the run begins: it is too much to be read here"
        return None

    def _heads(self, stage: StageConfig) -> None:
        """Whether training can make the logits of what is opened here; without a model directory torch stays out."""
        opened = [config for owner, _, config in self._taught() if owner is stage and config.type == "checkpoint"]
        if opened and all(config.model in self.sound for config in opened):
            from edgewright.preview import check_starts

            check_starts(self.recipe, stage)

    def _preview(self, stage: StageConfig) -> Preview | None:
        """What its methods would get; None when what it starts from cannot be opened.

        Without methods and losses that ask for layers or tokens, and with AdamW, torch is not imported.
        """
        if not any(self._says_more(other) for other in self.recipe.trainings):
            return None
        from edgewright.preview import architecture, check_lessons, preview

        start = source_of(stage.student)
        if (isinstance(start, StageStudentConfig) and start.stage not in self.left) or (
            isinstance(start, CheckpointStudentConfig) and start.model not in self.sound
        ):
            return None
        model = architecture(self.recipe, stage, self.vocab_size or UNKNOWN_VOCABULARY, self.left)
        if isinstance(stage.student, DerivedStudentConfig) and self.vocab_size is not None:
            self.parameters[stage.name] = sum(parameter.numel() for parameter in model.parameters())
        check_lessons(stage, model, self.left)
        return preview(self.recipe, stage, model)

    def _says_more(self, stage: StageConfig) -> bool:
        """Whether there is more to see of a stage than its numbers."""
        inside = stage.lesson.type == "distill" and stage.lesson.depends_on_shapes
        made = isinstance(stage.student, DerivedStudentConfig)
        cut = any(export.size for export in self.recipe.exports if export.model == stage.name)
        return bool(stage.methods) or stage.optimizer.chooses or inside or made or cut

    def _look_at_lattice(self, stage: StageConfig, ahead: Preview) -> None:
        """Where a stage quantizes: what holds that exactly, and whether its exports do."""
        lattices: dict[str, LatticeTensor] = {}

        def look() -> Iterator[str]:
            lattices.update(trained_lattices(ahead))
            yield f"held exactly by {held_by(lattices.values())}" if lattices else "no weight on a lattice"

        if any(method.quantizes for method in stage.methods):
            self._try(f"lattice of {stage.name}", look)
        for export in self.recipe.exports:
            if export.model == stage.name and lattices:
                self._try(f"export {export.name}", partial(self._export, export, ahead, lattices))

    def _export(self, export: ExportConfig, ahead: Preview, lattices: dict[str, LatticeTensor]) -> Iterator[str]:
        wider = list(not_held(export, lattices))
        yield f"{export.quant} in {export.to} holds {'some' if wider else 'all'} of what is trained exactly"
        yield from wider
        yield from not_rounded(export, on_no_lattice(ahead))

    def _count(self, student: BaseModel) -> int | None:
        """Parameters of a student; None when what it starts from cannot be opened, or is to be made into another."""
        if isinstance(student, PresetStudentConfig):
            return None if self.vocab_size is None else student.parameters(self.vocab_size)
        if isinstance(student, StageStudentConfig):
            return self.smaller.get(student.stage, self.parameters.get(student.stage))
        if isinstance(student, CheckpointStudentConfig) and student.model in self.sound:
            return count_parameters(student.model)
        return None

    def _same_tokens(self, model: Path, role: str) -> Iterator[str]:
        from edgewright.data import PretrainedTokenizer
        from edgewright.vocabulary import check_same_tokens

        wanted = self.recipe.data.tokenizer
        if isinstance(wanted, PretrainedTokenizer):
            yield from check_same_tokens(wanted.path, model, role=role)
            return
        raise RecipeError(
            "EW-130",
            f"the {role} has a tokenizer of its own, but the recipe trains another one",
            where=self.path.absolute(),
            expected=f"data.tokenizer: {{type: pretrained, path: {model}}}",
            found="data.tokenizer: {type: train}",
            fix=f"'data.tokenizer={{type: pretrained, path: {model}}}'",
        )

    def _disk(self) -> Iterator[str]:
        """Space for the checkpoints of the largest stage, every stage's model and every export, and for caches."""
        largest = max(
            (
                (stage.training.keep_checkpoints + 1) * self.parameters.get(stage.name, 0)
                for stage in self.recipe.trainings
            ),
            default=0,
        )
        models = (len(self.recipe.trainings) + len(self.recipe.exports)) * max(self.parameters.values(), default=0) * 4
        needed = math.ceil(RESERVE * (largest * BYTES_PER_PARAMETER + models + self.caches))
        folder = self.recipe.run_directory.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OutOfResources(
                "EW-403",
                "the disk is too small for this run",
                where=self.recipe.run_directory.absolute(),
                expected=f"{needed:,} bytes free for checkpoints, models, exports and caches",
                found=f"{free:,} bytes free",
                fix="free space, choose another output_dir, or lower training.keep_checkpoints",
            )
        yield f"about {needed / 1e6:,.0f} MB needed, {free / 1e9:,.1f} GB free"


sys.modules[__name__].__class__ = VerbModule
