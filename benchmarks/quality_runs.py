"""What `quality.py` trains: one row per method, and the recipe of each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from quality_scales import SCALES, SEQUENCE, Scale, Section

from edgewright.compress.pruning import journey_phases

BUSY = 6
"""Exit code of a run that another process works on."""
SWEEP = 0.25
"""Share of a run's tokens that each learning rate of a sweep gets."""
FINE_TUNING = 0.3
"""Share of the learning rate with which SPDF goes on densely."""
Control = Literal["tokens", "compute", "FLOPs"]
COSINE: Section = {"type": "cosine", "warmup_ratio": 0.05, "final_ratio": 0.05}
LINEAR: Section = {"type": "wsd", "warmup_ratio": 0.05, "decay_ratio": 0.95, "final_ratio": 0.0}
"""Straight to zero after the warm-up (arXiv 2502.15938)."""
ADAMW: Section = {"type": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An exported file to measure."""

    to: str
    quant: str
    embedding: str
    calibrated: bool = False

    @property
    def name(self) -> str:
        return f"{self.to}-{self.quant}-{self.embedding}" + ("-calibrated" if self.calibrated else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training of a run."""

    name: str
    steps: int
    methods: tuple[Section, ...] = ()
    width: float = 1.0
    start: str | None = None
    """An earlier stage to go on from."""
    teacher: str | None = None
    """The row whose finished model of the same seed teaches."""
    rate: float = 1.0
    """Times the run's learning rate."""
    active: float = 1.0
    """Mean share of the linear weights that are not masked, over the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method under one control, trained with several seeds."""

    name: str
    what: str
    stages: Callable[[Scale], tuple[Stage, ...]]
    control: Control = "tokens"
    core: bool = False
    files: tuple[File, ...] = ()
    optimizer: Section = field(default_factory=lambda: dict(ADAMW))
    """The recipe's `optimizer:` without its rate."""
    factors: tuple[float, ...] = ()
    """Learning rates that it tries, as multiples of the dense model's best; empty: it takes those of `rate_of`."""
    rate_of: str = "dense"
    schedule: Section = field(default_factory=lambda: dict(COSINE))
    """The recipe's `schedule:`, of each stage."""

    @property
    def teachers(self) -> set[str]:
        """Rows that must be trained first."""
        return {stage.teacher for stage in self.stages(SCALES["small"]) if stage.teacher}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a row: a seed, or a rate of its sweep."""

    row: Row
    scale: Scale
    seed: int = 0
    factor: float | None = None
    """Of a sweep: multiple of the dense model's best rate; for the dense row itself, the rate."""

    @property
    def name(self) -> str:
        return f"{self.row.name}-s{self.seed}" if self.factor is None else f"{self.row.name}-rate{self.factor:g}"

    def stages(self) -> tuple[Stage, ...]:
        """What is trained, a quarter of it in a sweep."""
        return self.row.stages(self.scale)


def plain(*methods: Section, **settings: Any) -> Callable[[Scale], tuple[Stage, ...]]:
    """One stage of as many steps as the dense run."""
    return lambda scale: (Stage(name="model", steps=scale.steps, methods=methods, **settings),)


def lowrank(**settings: Any) -> Callable[[Scale], tuple[Stage, ...]]:
    return lambda scale: plain({"type": "lowrank", "rank": scale.rank, **settings})(scale)


def restarted(scale: Scale) -> tuple[Stage, ...]:
    return lowrank(restart_every=scale.restart_every)(scale)


def lowrank_flops(scale: Scale) -> tuple[Stage, ...]:
    """Low rank with as many operations as the dense run, so more tokens; attention and head cost what they cost."""
    shape = scale.shape()
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    factors = shape["num_hidden_layers"] * scale.rank * (4 * 2 * hidden + 3 * (hidden + inner))
    rest = scale.embedding() + scale.attention()
    steps = round(scale.steps * (scale.linear() + rest) / (factors + rest))
    method = {"type": "lowrank", "rank": scale.rank, "restart_every": scale.restart_every}
    return (Stage(name="model", steps=steps, methods=(method,)),)


def lost(scale: Scale) -> tuple[Stage, ...]:
    return plain({"type": "lost", "rank": scale.lost_rank})(scale)


def gradual(density: float) -> Callable[[Scale], tuple[Stage, ...]]:
    """Gradual pruning with the compute of the dense run in its linear layers: more steps (arXiv 2501.12486)."""

    def stages(scale: Scale) -> tuple[Stage, ...]:
        steps = round(journey_phases(scale.steps, density).total)
        method = {"type": "sparse", "density": density, "mask": {"type": "gradual"}}
        return (Stage(name="model", steps=steps, methods=(method,), active=scale.steps / steps),)

    return stages


def spdf(scale: Scale) -> tuple[Stage, ...]:
    """Static 75 %, then a tenth of the steps dense."""
    method = {"type": "sparse", "density": 0.25, "mask": {"type": "static"}}
    return (
        Stage(name="sparse", steps=scale.steps, methods=(method,), active=0.25),
        Stage(name="model", steps=round(scale.steps / 10), start="sparse", rate=FINE_TUNING),
    )


def continued(teacher: str | None = None) -> Callable[[Scale], tuple[Stage, ...]]:
    """60 % of the steps dense, 40 % ternary, each with its own schedule (BitCPM4); the second one may be taught."""

    def stages(scale: Scale) -> tuple[Stage, ...]:
        dense = round(0.6 * scale.steps)
        rest = scale.steps - dense
        return (
            Stage(name="dense", steps=dense),
            Stage(name="model", steps=rest, start="dense", methods=({"type": "ternary"},), teacher=teacher),
        )

    return stages


def ternary(**settings: Any) -> Section:
    return {"type": "ternary", **settings}


def gguf(quant: str, *embeddings: str, calibrated: bool = False) -> tuple[File, ...]:
    return tuple(File(to="gguf", quant=quant, embedding=name, calibrated=calibrated) for name in embeddings)


SMALL_FILES = (
    *gguf("f16", "f16"),
    *gguf("q8_0", "q8_0", calibrated=True),
    *gguf("q4_0", "q8_0", "q4_0", calibrated=True),
)
DENSE_FILES = (
    *SMALL_FILES,
    *gguf("q4_0", "q4_0"),
    File(to="genai", quant="int8", embedding="int8", calibrated=True),
    File(to="genai", quant="int4", embedding="int8", calibrated=True),
)
TERNARY_FILES = (
    *gguf("tq2_0", "q8_0", "q4_0"),
    *gguf("tq1_0", "q8_0", "q6_k", "q4_0"),
    File(to="genai", quant="ternary", embedding="int8"),
)
PLAIN_FILES = (*gguf("f16", "f16"), *gguf("q8_0", "q8_0"))
FACTOR_FILES = (File(to="onnx", quant="fp32", embedding="fp32"), File(to="onnx", quant="int8", embedding="int8"))

ROWS = (
    Row(name="dense", what="dense", stages=plain(), core=True, files=DENSE_FILES),
    Row(
        name="ternary", what="ternary, absmean, a scale per row", stages=plain(ternary()), core=True,
        files=TERNARY_FILES, factors=(1.0, 2.0, 4.0),
    ),
    Row(
        name="ternary-distilled", what="ternary, taught by the dense run", rate_of="ternary", core=True,
        stages=plain(ternary(), teacher="dense"), files=TERNARY_FILES,
    ),
    Row(
        name="ternary-continued", what="60 % dense, then 40 % ternary", stages=continued(), core=True,
        files=TERNARY_FILES, factors=(1.0, 2.0, 4.0),
    ),
    Row(
        name="ternary-continued-distilled", what="60 % dense, then 40 % ternary, taught by the dense run", core=True,
        stages=continued("dense"), rate_of="ternary-continued", files=TERNARY_FILES,
    ),
    Row(name="narrow-5of8", what="dense, 5/8 of the width", core=True, stages=plain(width=5 / 8), files=SMALL_FILES),
    Row(name="narrow-3of4", what="dense, 3/4 of the width", core=True, stages=plain(width=3 / 4), files=SMALL_FILES),
    Row(
        name="lowrank-restarts", what="low rank, refactorization + reset every 200 steps", core=True,
        stages=restarted, factors=(0.5, 1.0, 2.0), files=PLAIN_FILES,
    ),
    Row(name="lowrank", what="low rank, plain", rate_of="lowrank-restarts", core=True, stages=lowrank()),
    Row(name="lost", what="LOST", core=True, stages=lost, factors=(1.0, 2.0, 4.0), files=FACTOR_FILES),
    Row(name="sparse-50", what="gradual pruning to 50 %", control="compute", core=True, stages=gradual(0.5)),
    Row(name="spdf-75", what="static 75 % sparse, then 10 % dense", core=True, stages=spdf),
    Row(
        name="sparse-75", what="gradual pruning to 75 % sparse", control="compute", core=True, stages=gradual(0.25),
        files=PLAIN_FILES,
    ),
    Row(name="narrow-1of2", what="dense, half the width", core=True, stages=plain(width=1 / 2), files=SMALL_FILES),
    Row(name="narrow-3of8", what="dense, 3/8 of the width", core=True, stages=plain(width=3 / 8), files=SMALL_FILES),
    Row(
        name="lowrank-flops", what="low rank with restarts, more tokens", control="FLOPs", stages=lowrank_flops,
        rate_of="lowrank-restarts", files=PLAIN_FILES,
    ),
    Row(
        name="ternary-linear", what="ternary, the rate falls linearly to 0", rate_of="ternary",
        stages=plain(ternary()), schedule=LINEAR, files=TERNARY_FILES,
    ),
    Row(
        name="ternary-tequila", what="ternary, dead weights as a bias", rate_of="ternary",
        stages=plain(ternary(quantizer="tequila")), files=TERNARY_FILES,
    ),
    Row(
        name="ternary-twn", what="ternary, TWN threshold", factors=(2.0,), stages=plain(ternary(quantizer="twn")),
        files=TERNARY_FILES,
    ),
    Row(
        name="ternary-decay", what="ternary, weight decay 1", factors=(2.0,), stages=plain(ternary()),
        optimizer={**ADAMW, "weight_decay": 1.0}, files=TERNARY_FILES,
    ),
    Row(
        name="ternary-seq", what="ternary, learned scale (SEQ)", rate_of="ternary",
        stages=plain(ternary(quantizer="seq_ternary")), files=TERNARY_FILES,
    ),
    Row(
        name="integer-q4_0", what="trained on the lattice of q4_0", stages=plain({"type": "integer"}),
        files=gguf("q4_0", "q8_0", "q4_0"),
    ),
    Row(
        name="lowrank-cola", what="low rank with SiLU between the factors (CoLA)", rate_of="lowrank-restarts",
        stages=lowrank(activation="silu", init="cola"), files=FACTOR_FILES,
    ),
    Row(
        name="sltrain", what="low rank + random support", rate_of="lowrank-restarts",
        stages=lambda scale: plain({"type": "sltrain", "rank": scale.lost_rank})(scale), files=PLAIN_FILES,
    ),
    Row(
        name="granet-75", what="GraNet to 75 % sparse, random regrowth",
        stages=plain({"type": "granet", "density": 0.25}, active=0.34375),
    ),
    Row(
        name="granet-75-gradient", what="GraNet to 75 % sparse, gradient regrowth",
        stages=plain({"type": "granet", "density": 0.25, "regrow": "gradient"}, active=0.34375),
    ),
    Row(
        name="sparse-2:4", what="2:4, straight-through",
        stages=plain({"type": "sparse", "density": 0.5, "mask": {"type": "2:4"}}, active=0.5),
    ),
    Row(
        name="adamw-8bit", what="dense, AdamW with 8-bit moments", stages=plain(),
        optimizer={**ADAMW, "type": "adamw_8bit"},
    ),
    Row(name="apollo", what="dense, APOLLO at a quarter of the rank", stages=plain(), optimizer={"type": "apollo"},
        factors=(4.0, 10.0)),
    Row(name="apollo-mini-front", what="dense, APOLLO-Mini, scaled before the limiter", stages=plain(),
        optimizer={"type": "apollo_mini", "scale_front": True}, rate_of="apollo"),
    Row(name="gradnorm-lorp", what="dense, GradNormLoRP at a quarter of the rank", stages=plain(),
        optimizer={"type": "gradnorm_lorp", "rank": 0.25},
        factors=(4.0, 10.0, 20.0, 40.0)),
    Row(name="gradnorm-lorp-whole", what="dense, GradNormLoRP, the direction's step not scaled", stages=plain(),
        optimizer={"type": "gradnorm_lorp", "rank": 0.25, "scale": 1.0}, factors=(1.0, 2.0, 4.0, 10.0)),
    Row(name="gradnorm-lorp-calm", what="dense, GradNormLoRP, AdamW's rate for the magnitudes, 2.5x it for directions",
        stages=plain(), optimizer={"type": "gradnorm_lorp", "rank": 0.25, "scale": 2.5}, factors=(1.0,)),
    Row(name="gradnorm-lorp-gentle", what="dense, GradNormLoRP, an eighth on the direction's step", stages=plain(),
        optimizer={"type": "gradnorm_lorp", "rank": 0.25, "scale": 0.125}, factors=(10.0, 20.0)),
    Row(name="gradnorm-lorp-half", what="dense, GradNormLoRP at half of the rank, its default",
        stages=plain(), optimizer={"type": "gradnorm_lorp"}, factors=(10.0,)),
    Row(name="gradnorm-lorp-beta2", what="dense, GradNormLoRP, beta2 = 0.95 as AdamW here", stages=plain(),
        optimizer={"type": "gradnorm_lorp", "rank": 0.25, "betas": [0.9, 0.95]}, rate_of="gradnorm-lorp"),
    Row(name="gradnorm-lorp-often", what="dense, GradNormLoRP, beta2 = 0.95, projected anew every 50 steps",
        stages=plain(), optimizer={"type": "gradnorm_lorp", "rank": 0.25, "betas": [0.9, 0.95], "update_proj_gap": 50},
        rate_of="gradnorm-lorp"),
    *(
        Row(
            name=name, what=what, stages=plain(), optimizer={"type": name.replace("-", "_")}, factors=factors,
            rate_of="apollo",
        )
        for name, what, factors in (
            ("apollo-mini", "dense, APOLLO-Mini", ()),
            ("galore", "dense, GaLore", (10.0,)),
            ("fira", "dense, Fira", (10.0,)),
        )
    ),
)  # fmt: skip
"""In the order of their worth. GraNet's mean density: a cubic from 1 to 0.25 over half of the run, then constant."""


def jobs(scale: Scale, *, full: bool, seeds: int) -> list[Job]:
    """Everything to train, the most telling first: the sweeps and the first seed of every row, then further seeds."""
    rows = [row for row in ROWS if full or row.core]
    queue: list[Job] = []
    for row in rows:
        factors = scale.rates if row.name == "dense" else row.factors
        queue += [Job(row=row, scale=scale, factor=factor) for factor in factors]
        queue.append(Job(row=row, scale=scale))
        if row.name == "dense":  # its spread is what every difference is held against
            queue += [Job(row=row, scale=scale, seed=seed) for seed in range(1, seeds)]
    for seed in range(1, seeds):
        queue += [Job(row=row, scale=scale, seed=seed) for row in rows if row.name != "dense"]
    return queue


class Named(Protocol):
    """A run, of this benchmark or another: its name is that of its files."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things lie."""

    data: Section
    """The recipe's `data:` without tokenizer and lengths."""
    work: Path
    results: Path

    def run(self, job: Named) -> Path:
        return self.work / job.name

    def result(self, job: Named) -> Path:
        return self.results / f"{job.name.replace('/', '_')}.json"

    def model(self, job: Named) -> Path:
        """The finished model of a run."""
        return self.run(job) / "stages/model/model"


def recipe(job: Job, places: Places, rate: float) -> Section:
    """The recipe of a run, ready to be written as JSON (which is YAML)."""
    scale = job.scale
    return {
        "version": 1,
        "name": "quality",
        "seed": job.seed,
        "data": {
            **places.data,
            "tokenizer": {"type": "train", "vocab_size": scale.vocabulary},
            "sequence_length": SEQUENCE,
            "held_out": 0.03,
            "restart_at_documents": False,  # faster: attention needs no mask; the same for every row
        },
        "stages": [_stage(stage, job, places, rate) for stage in job.stages()],
        "evaluate": None,
        "bench": None,
    }


def _stage(stage: Stage, job: Job, places: Places, rate: float) -> Section:
    student = {"type": "stage", "stage": stage.start} if stage.start else job.scale.student(stage.width)
    section: Section = {
        "name": stage.name,
        "student": student,
        "methods": list(stage.methods),
        "optimizer": {**job.row.optimizer, "learning_rate": rate * stage.rate},
        "schedule": job.row.schedule,
        "budget": {"max_steps": steps_of(stage, job)},
        "training": {
            "per_device_train_batch_size": job.scale.batch,
            "gradient_accumulation_steps": job.scale.accumulation,
            "compile": "on",
            "logging_steps": 200,
            "eval_steps": 0,
            "save_steps": 2000,
        },
    }
    if stage.teacher:
        teacher = Job(row=row_named(stage.teacher), scale=job.scale, seed=job.seed)
        model = str(places.model(teacher).absolute())
        section["objective"] = {"type": "distill", "kl_weight": 0.9, "teacher": {"type": "checkpoint", "model": model}}
    return section


def steps_of(stage: Stage, job: Job) -> int:
    """Optimizer steps of a stage in this run."""
    return stage.steps if job.factor is None else round(SWEEP * stage.steps)


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)
