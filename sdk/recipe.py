"""The recipe: YAML to typed, validated values and back. Every error at once, each with its line and column.

The configuration of a component lives beside the component; here they are only put together. Paths in a recipe file
start at that file's directory; paths in overrides, and `output_dir`, start at the working directory.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from edgewright import recipe_shape as shape
from edgewright.compress.align import AlignConfig, check_alignments
from edgewright.compress.cache_config import CacheStageConfig
from edgewright.compress.distill import DistillConfig
from edgewright.compress.draft import DraftStudentConfig
from edgewright.compress.draft_head import DraftHeadConfig
from edgewright.compress.draft_vocabulary import DraftVocabularyConfig
from edgewright.compress.elastic import ElasticConfig
from edgewright.compress.generate_config import GeneratedTextConfig, GenerateStageConfig
from edgewright.compress.granet import GranetConfig
from edgewright.compress.growth import GrownStudentConfig
from edgewright.compress.integer import IntegerConfig
from edgewright.compress.lora import LoraConfig
from edgewright.compress.lost import LostConfig
from edgewright.compress.lowrank import LowRankConfig
from edgewright.compress.prune import PrunedStudentConfig
from edgewright.compress.sandwich import SandwichConfig
from edgewright.compress.shear import ShearConfig
from edgewright.compress.sltrain import SLTrainConfig
from edgewright.compress.sparse import SparseConfig
from edgewright.compress.teacher_config import CachedTeacherConfig, ModelTeacherConfig, TeacherConfig
from edgewright.compress.ternary import TernaryConfig
from edgewright.compress.text_stage import TextStageConfig
from edgewright.data import DataConfig
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.objective import NextTokenConfig
from edgewright.optim.adamw import AdamWConfig
from edgewright.optim.adamw_8bit import AdamW8bitConfig
from edgewright.optim.muon import MuonConfig
from edgewright.optim.projected_config import (
    ApolloConfig,
    ApolloMiniConfig,
    FiraConfig,
    GaLoreConfig,
    GradNormLoRPConfig,
)
from edgewright.optim.q_galore_config import QGaLoreConfig
from edgewright.overrides import apply_overrides
from edgewright.paths import Name, RecipePath
from edgewright.recipe_errors import problems, untagged
from edgewright.recipe_rules import (
    check_caches,
    check_factors,
    check_hidden_tokens,
    check_offers,
    check_rules,
    check_written,
)
from edgewright.schedule import CosineConfig, ScheduleConfig
from edgewright.student import CheckpointStudentConfig, PresetStudentConfig, StageStudentConfig
from edgewright.target import put_target
from edgewright.training import BudgetConfig, TrainingConfig
from edgewright.yaml_positions import MAX_BYTES, Document, Mark, Problem, Tree, parse_yaml
from edgewright.yaml_positions import Path as TreePath

if TYPE_CHECKING:
    from edgewright.stage import StageResult
    from edgewright.stage_work import StageWork

StudentConfig = Annotated[
    PresetStudentConfig
    | CheckpointStudentConfig
    | StageStudentConfig
    | PrunedStudentConfig
    | GrownStudentConfig
    | DraftStudentConfig
    | DraftVocabularyConfig,
    Field(discriminator="type"),
]
ObjectiveConfig = Annotated[NextTokenConfig | DistillConfig | SandwichConfig | AlignConfig, Field(discriminator="type")]
MethodConfig = Annotated[
    DraftHeadConfig
    | ElasticConfig
    | GranetConfig
    | IntegerConfig
    | LoraConfig
    | LostConfig
    | LowRankConfig
    | ShearConfig
    | SLTrainConfig
    | SparseConfig
    | TernaryConfig,
    Field(discriminator="type"),
]
OptimizerConfig = Annotated[
    AdamWConfig
    | AdamW8bitConfig
    | ApolloConfig
    | ApolloMiniConfig
    | FiraConfig
    | GaLoreConfig
    | GradNormLoRPConfig
    | MuonConfig
    | QGaLoreConfig,
    Field(discriminator="type"),
]


_NULL = "tag:yaml.org,2002:null"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageConfig(_Section):
    """One training: a student, what it is taught, how its weights are represented."""

    type: Literal["train"] = "train"
    name: Name
    """Later stages, exports and folders call it by this name."""
    student: StudentConfig
    objective: ObjectiveConfig = NextTokenConfig()
    methods: tuple[MethodConfig, ...] = ()
    """Applied in this order."""
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    budget: BudgetConfig
    training: TrainingConfig = TrainingConfig()
    generated: GeneratedTextConfig | None = None
    """Text that an earlier stage wrote or read, mixed into the data; null: the recipe's data alone."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of the first weights, the order of the data and all else that is random; null: the recipe's."""

    @model_validator(mode="after")
    def _cache_has_the_text(self) -> StageConfig:
        if self.generated is not None and isinstance(self.teacher, CachedTeacherConfig):
            raise ValueError("a cache holds targets for the recipe's data alone: leave `generated` out, or the cache")
        return self

    @property
    def lesson(self) -> NextTokenConfig | DistillConfig | SandwichConfig:
        """The objective that is trained: an alignment as what it stands for."""
        return self.objective.lesson() if isinstance(self.objective, AlignConfig) else self.objective

    @property
    def teacher(self) -> TeacherConfig | None:
        """Where its targets come from; None where it learns from the text alone."""
        lesson = self.lesson
        return lesson.teacher if isinstance(lesson, DistillConfig) else None

    @property
    def judges(self) -> tuple[ModelTeacherConfig, ...]:
        """The models by which it is measured when it is trained, and which need not teach it."""
        return (self.objective.teacher,) if isinstance(self.objective, AlignConfig) else ()

    @property
    def teachers(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that run in this stage besides the student."""
        return () if self.teacher is None else self.teacher.models()

    def carry_out(self, work: StageWork) -> StageResult:
        """Train it, or go on with it, or find that it is done: see `train_stage`."""
        from edgewright.stage import train_stage

        return train_stage(
            work.recipe,
            self,
            work.corpus,
            work.directory,
            work.earlier,
            say=work.say,
            stop=work.stop,
            world=work.world,
        )


def _stage_type(stage: Any) -> str:
    """Pydantic asks of a mapping, and of a section that was built."""
    return shape.type_of(stage, usual="train")


AnyStageConfig = Annotated[
    Annotated[StageConfig, Tag("train")]
    | Annotated[CacheStageConfig, Tag("cache")]
    | Annotated[GenerateStageConfig, Tag("generate")]
    | Annotated[TextStageConfig, Tag("text")],
    Discriminator(_stage_type),
    shape.Usual("train"),
]
"""A stage; without `type` it trains."""


class ExportConfig(_Section):
    """One file or folder for a runtime."""

    name: Name
    """Folder below `exports/`, and the row of the report."""
    model: str
    """Name of a stage, or path of a model directory (absolute once loaded)."""
    to: str
    """The target: gguf or genai."""
    quant: str
    """The width, by the target's own name."""
    size: str | None = None
    """Of an elastic model the sub-network, such as h256-f512-a4-l8; None: the whole."""
    embedding_quant: str | None = None
    """Width of the embedding and head; None: the target's default."""
    max_kl: float | None = Field(default=None, gt=0)
    """Limit of the gate in nats per token; None: the width's own."""
    verify: bool = True
    """Whether the gate decides; without it the manifest says that it was skipped."""


class EvaluateConfig(_Section):
    """Bits per byte of every checkpoint and artifact on the held-out text."""

    max_tokens: int | None = Field(default=20_000, gt=0)
    """At most this many tokens; None: all."""


class BenchConfig(_Section):
    """Speed and memory of every artifact."""

    prompt: int = Field(default=128, gt=0)
    """Tokens of the prompt test."""
    generate: int = Field(default=64, gt=0)
    """Tokens of the generation test."""
    repeats: int = Field(default=5, gt=0)
    """Measured rounds after the warm-up."""
    threads: int | None = Field(default=None, gt=0)
    """Threads of the runtimes; None: their own choice."""


class SampleConfig(_Section):
    """A text that every artifact continues, for the report."""

    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(default=64, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy."""


class Recipe(_Section):
    """From a corpus to certified files."""

    version: Literal[1]
    """Of this format."""
    name: Name
    output_dir: Path | None = None
    """The run directory, relative to the working directory; None: runs/NAME."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything that is random."""
    target: RecipePath | None = None
    """The model that a draft is made for: it stands wherever a path of the recipe is the word `target`."""
    data: DataConfig
    stages: tuple[AnyStageConfig, ...] = Field(min_length=1)
    exports: tuple[ExportConfig, ...] = ()
    evaluate: EvaluateConfig | None = EvaluateConfig()
    """null: skipped."""
    bench: BenchConfig | None = BenchConfig()
    """null: skipped."""
    sample: SampleConfig | None = None

    @property
    def run_directory(self) -> Path:
        """Where the run lives."""
        return self.output_dir or Path("runs") / self.name

    @property
    def trainings(self) -> tuple[StageConfig, ...]:
        """The stages that train a model, in order."""
        return tuple(stage for stage in self.stages if isinstance(stage, StageConfig))

    def stage(self, name: str) -> StageConfig | None:
        """The training of that name, None if it is none."""
        return next((stage for stage in self.trainings if stage.name == name), None)

    def seed_of(self, stage: StageConfig) -> int:
        """Of all that is random in a stage."""
        return self.seed if stage.seed is None else stage.seed

    def input_paths(self) -> list[Path]:
        """Files, patterns and directories that the recipe reads."""
        return [Path(value) for _, value in _path_values(self.model_dump(mode="json"))]

    def to_yaml(self, directory: Path) -> str:
        """The resolved recipe, every default spelled out; runnable from a file in `directory`."""
        from ruamel.yaml import YAML
        from ruamel.yaml.representer import RoundTripRepresenter

        class _Representer(RoundTripRepresenter):
            """Spells out null, which ruamel.yaml leaves empty."""

        _Representer.add_representer(type(None), lambda self, _: self.represent_scalar(_NULL, "null"))
        tree = self.model_dump(mode="json")
        for path, value in _path_values(tree):
            _put(tree, path, os.path.relpath(value, directory.absolute()) if os.path.isabs(value) else value)
        for export in tree["exports"]:
            if os.path.isabs(export["model"]):  # ./ tells a directory from a stage of the same name
                export["model"] = os.path.join(".", os.path.relpath(export["model"], directory.absolute()))
        writer = YAML()
        writer.Representer = _Representer
        writer.width = 120
        text = io.StringIO()
        writer.dump(tree, text)
        return text.getvalue()

    def dump_yaml(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, atomically."""
        from edgewright.files import write_text

        path = Path(path)
        header = "# The recipe of this run, with every default. It can be run again as it is.\n"
        write_text(path, header + self.to_yaml(path.parent))


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides, and validate everything.

    Raises:
        RecipeErrors: all errors, each with `file:line:column` or `override '...'` (EW-101 to EW-126).
    """
    path = Path(path)
    document = parse_yaml(_read(path))
    if not document.problems and not isinstance(document.tree, dict):
        document.problems.append(_no_mapping(document.tree))
    if not isinstance(document.tree, dict):
        raise RecipeErrors(_positioned(path, document, {}, document.problems))
    tree = document.tree
    origins, found = apply_overrides(tree, overrides)
    found = [*document.problems, *found, *put_target(Recipe, tree, path.parent.absolute(), Path.cwd(), origins)]
    rules = check_rules(tree, path.parent.absolute(), Path.cwd(), origins)
    found += rules
    _resolve_paths(tree, path.parent.absolute(), origins)
    found += untagged(Recipe, tree)
    recipe = None
    try:
        recipe = Recipe.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        found += problems(error, Recipe, tree)
    if recipe is not None and not found:
        for rule in (check_factors, check_caches, check_offers, check_hidden_tokens, check_written, check_alignments):
            found += rule(recipe)
    if found or recipe is None:
        raise RecipeErrors(_positioned(path, document, origins, found))
    return recipe


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        raw = path.read_bytes()[: MAX_BYTES + 1] if size <= MAX_BYTES and path.is_file() else None
    except OSError as error:
        fix = "check the path; recipes to start from are in examples/"
        raise _unreadable(path, "a recipe file", error.strerror or str(error), fix) from None
    if raw is None:
        what = f"{size} bytes" if path.is_file() else "a directory or a device"
        raise _unreadable(path, f"a YAML file of at most {MAX_BYTES} bytes", what, "point to the recipe itself")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        where = f"{path}:{line}:{column}"
        raise _unreadable(where, "UTF-8", f"byte 0x{raw[error.start]:02x}", "save the file as UTF-8") from None


def _unreadable(where: str | Path, expected: str, found: str, fix: str) -> RecipeErrors:
    place = os.path.abspath(where)
    return RecipeErrors(
        [RecipeError("EW-101", "this recipe cannot be read", where=place, expected=expected, found=found, fix=fix)]
    )


def _no_mapping(tree: Tree) -> Problem:
    found = "an empty file" if tree is None else "a list" if isinstance(tree, list) else "a single value"
    fix = "start from one of examples/*.yaml"
    what, expected = "this is no recipe", "sections: version, name, data, stages, ..."
    return Problem(code="EW-103", what=what, mark=Mark(1, 1), expected=expected, found=found, fix=fix)


def _positioned(
    path: Path, document: Document, origins: dict[TreePath, str], found: list[Problem]
) -> list[RecipeError]:
    """Problems as errors with their places, in the order of the file; those of overrides last."""
    placed = []
    for problem in found:
        override = _override_of(problem.path, document, origins)
        mark = problem.mark or _mark(problem, document)
        where = f"override {override!r}" if override is not None else f"{path.absolute()}:{mark.line}:{mark.column}"
        order = (override is not None, mark.line, mark.column)
        error = RecipeError(
            problem.code, problem.what, where=where, expected=problem.expected, found=problem.found, fix=problem.fix
        )
        placed.append((order, error))
    return [error for _, error in sorted(placed, key=lambda item: item[0])]


def _override_of(path: TreePath, document: Document, origins: dict[TreePath, str]) -> str | None:
    """The override that set this value or made this section, the last one if there are several."""
    setters = [text for known, text in origins.items() if path[: len(known)] == known]
    if not setters and path not in document.values and path:
        setters = [text for known, text in origins.items() if known[: len(path)] == path]
    return setters[-1] if setters else None


def _mark(problem: Problem, document: Document) -> Mark:
    """Where a path stands; where it is missing, where the section stands in which it should be."""
    if problem.at_key and problem.path in document.keys:
        return document.keys[problem.path]
    for length in range(len(problem.path), 0, -1):
        path = problem.path[:length]
        if path in document.values:
            return (
                document.values[path] if length == len(problem.path) else document.keys.get(path, document.values[path])
            )
    return Mark(1, 1)


def _path_values(tree: Tree) -> Iterator[tuple[TreePath, str]]:
    """Every text of the tree that is a path, with the place where it stands."""
    found = [
        (path, value)
        for path, annotation, value in shape.walk(Recipe, tree)
        if isinstance(value, str) and shape.is_path(annotation)
    ]
    yield from found


def _resolve_paths(tree: dict[str, Any], directory: Path, origins: dict[TreePath, str]) -> None:
    """Make the paths of the tree absolute, in place: from the recipe's directory, or from here for an override."""
    for path, annotation, value in list(shape.walk(Recipe, tree)):
        if not shape.is_path(annotation) or not isinstance(value, str):
            continue
        overridden = any(path[: len(known)] == known for known in origins)
        resolved = os.path.normpath(os.path.join(Path.cwd() if overridden else directory, os.path.expanduser(value)))
        _put(tree, path, resolved)


def _put(tree: Tree, path: TreePath, value: Tree) -> None:
    owner: Any = shape.at(tree, path[:-1])
    owner[path[-1]] = value
