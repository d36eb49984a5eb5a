"""What `starts.py` trains: the sizes, one row per way to start, and the recipe of each run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_runs import ADAMW, SWEEP
from quality_scales import SEQUENCE, Section

from edgewright.compress.elastic import ElasticConfig
from edgewright.student import PresetStudentConfig

BUSY = 6
SHARES = (0.1, 0.2, 0.3, 0.4)
"""Of the tokens of the model from scratch that the pruned ones get."""
MASKS = 0.25
"""Share of a sheared run's tokens in which its masks are learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of models, and what goes with them."""

    name: str
    full: dict[str, int]
    half: dict[str, int]
    """What changes where half of the parameters are left."""
    elastic: dict[str, list[int]]
    """The lists of the method elastic."""
    alone: tuple[str, ...]
    """Sub-networks that are trained alone as well, beside the whole; with heads of the size of the whole's."""
    vocabulary: int
    batch: int
    rates: tuple[float, ...]
    tokens_per_parameter: float = 20.0
    judged_tokens: int = 100_000

    def student(self, **sizes: int) -> Section:
        return {"type": "preset", "preset": "llama-1m", **self.full, **sizes}

    def parameters(self, **sizes: int) -> int:
        return PresetStudentConfig.model_validate(self.student(**sizes)).parameters(self.vocabulary)

    def steps(self, **sizes: int) -> int:
        """Optimizer steps of a model trained by itself."""
        return math.ceil(self.tokens_per_parameter * self.parameters(**sizes) / self.step_tokens)

    @property
    def step_tokens(self) -> int:
        return self.batch * SEQUENCE

    def method(self) -> Section:
        return {"type": "elastic", **self.elastic}

    def sizes(self) -> dict[str, dict[str, int]]:
        """Every sub-network's sizes by its name."""
        from transformers import LlamaConfig

        config = LlamaConfig(**PresetStudentConfig.model_validate(self.student()).sizes())
        found = ElasticConfig.model_validate(self.method()).sizes(config)
        return {size.name: size.shape.numbers() for size in found}


SCALES = {
    "small": Scale(
        name="small",
        full={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
        half={"num_hidden_layers": 3, "intermediate_size": 192},
        elastic={
            "hidden_size": [128, 192],
            "intermediate_size": [128, 256],
            "num_attention_heads": [2],
            "num_hidden_layers": [2],
        },
        alone=("h128-f128-a2-l2", "h128-f512-a2-l4", "h256-f128-a4-l2", "h256-f256-a4-l4"),
        vocabulary=512,
        batch=16,
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "tiny": Scale(
        name="tiny",
        full={"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
        half={"num_hidden_layers": 3, "intermediate_size": 32},
        elastic={
            "hidden_size": [32],
            "intermediate_size": [32, 64],
            "num_attention_heads": [2],
            "num_hidden_layers": [2],
        },
        alone=("h32-f32-a2-l2", "h32-f128-a2-l4", "h64-f32-a4-l2", "h64-f64-a4-l4"),
        vocabulary=512,
        batch=16,
        rates=(2e-3, 4e-3, 8e-3),
    ),
    "smoke": Scale(
        name="smoke",
        full={"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
        half={"num_hidden_layers": 2, "intermediate_size": 32},
        elastic={
            "hidden_size": [32],
            "intermediate_size": [32, 64],
            "num_attention_heads": [2],
            "num_hidden_layers": [2],
        },
        alone=("h32-f32-a2-l2", "h32-f96-a2-l3", "h64-f32-a4-l2", "h64-f64-a4-l3"),
        vocabulary=300,
        batch=4,
        rates=(2e-3,),
        tokens_per_parameter=0.1,
        judged_tokens=2_000,
    ),
}
"""small: two CPU cores, 2.8M parameters, a day. tiny: 196 thousand parameters, an hour. smoke: whether everything runs,
no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a row: a seed, or a rate of its sweep."""

    row: Row
    scale: Scale
    seed: int = 0
    rate: float | None = None
    """Of a sweep."""

    @property
    def name(self) -> str:
        return f"{self.row.name}-s{self.seed}" if self.rate is None else f"{self.row.name}-rate{self.rate:g}"

    def length(self, steps: int) -> int:
        """A quarter of the steps in a sweep."""
        return steps if self.rate is None else max(2, round(SWEEP * steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A way to start, trained with several seeds."""

    name: str
    what: str
    stages: Callable[[Job, Places, float], list[Section]]
    """The recipe's stages, the last of which is called model; from the job, the places and the learning rate."""
    factors: tuple[float, ...] = ()
    """Learning rates that it tries, as multiples of `Scale.rates`; empty: it takes the rate of `rate_of`."""
    rate_of: str = ""
    needs: tuple[str, ...] = ()
    """Rows whose model of the same seed must be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things lie."""

    data: Section
    work: Path
    results: Path

    def run(self, job: Job) -> Path:
        return self.work / job.name

    def result(self, job: Job) -> Path:
        return self.results / f"{job.name}.json"

    def model(self, row: str, job: Job) -> Path:
        """The finished model of another row, of the same seed."""
        return (self.work / f"{row}-s{job.seed}/stages/model/model").absolute()


def stage(job: Job, student: Section, steps: int, rate: float, *, name: str = "model", **more: Any) -> Section:
    """A stage of a recipe."""
    return {
        "name": name,
        "student": student,
        "optimizer": {**ADAMW, "learning_rate": rate},
        "schedule": {"type": "cosine", "warmup_ratio": 0.05, "final_ratio": 0.05},
        "budget": {"max_steps": job.length(steps)},
        "training": {"per_device_train_batch_size": job.scale.batch, "logging_steps": 200, "eval_steps": 0,
                     "save_steps": 2000},
        **more,
    }  # fmt: skip


def alone(**sizes: int) -> Callable[[Job, Places, float], list[Section]]:
    """A preset of some sizes, for as many tokens as it has parameters, times 20."""
    return lambda job, places, rate: [stage(job, job.scale.student(**sizes), job.scale.steps(**sizes), rate)]


def teacher(job: Job, places: Places) -> Section:
    return {"type": "checkpoint", "model": str(places.model("full", job))}


def scratch(job: Job, places: Places, rate: float) -> list[Section]:
    return [stage(job, job.scale.student(**job.scale.half), job.scale.steps(**job.scale.half), rate)]


def pruned(share: float, *, taught: bool = True) -> Callable[[Job, Places, float], list[Section]]:
    """Pruned from the full model, and trained for a share of what the one from scratch gets."""

    def stages(job: Job, places: Places, rate: float) -> list[Section]:
        student = {"type": "pruned", "source": teacher(job, places), **job.scale.half}
        steps = max(4, round(share * job.scale.steps(**job.scale.half)))
        objective = {"type": "distill", "teacher": teacher(job, places), "kl_weight": 1.0}
        return [stage(job, student, steps, rate, **({"objective": objective} if taught else {}))]

    return stages


def sheared(share: float) -> Callable[[Job, Places, float], list[Section]]:
    """Learned masks in a quarter of the tokens, then distilled."""

    def stages(job: Job, places: Places, rate: float) -> list[Section]:
        steps = max(8, round(share * job.scale.steps(**job.scale.half)))
        masks = round(MASKS * steps)
        objective = {"type": "distill", "teacher": teacher(job, places), "kl_weight": 1.0}
        method = {"type": "shear", **job.scale.half, "ramp": 0.5}
        return [
            stage(job, teacher(job, places), masks, rate, name="masks", methods=[method]),
            stage(job, {"type": "stage", "stage": "masks"}, steps - masks, rate, objective=objective),
        ]

    return stages


def elastic(job: Job, places: Places, rate: float) -> list[Section]:
    student, steps = job.scale.student(), job.scale.steps()
    return [stage(job, student, steps, rate, methods=[job.scale.method()], objective={"type": "sandwich"})]


def sub_network_alone(number: int) -> Callable[[Job, Places, float], list[Section]]:
    """A model of a sub-network's sizes, trained alone for as many tokens as the elastic run."""

    def stages(job: Job, places: Places, rate: float) -> list[Section]:
        sizes = job.scale.sizes()[job.scale.alone[number]]
        student = job.scale.student(**{name: size for name, size in sizes.items() if name != "head_dim"})
        return [stage(job, student, job.scale.steps(), rate)]

    return stages


def grown(method: str) -> Callable[[Job, Places, float], list[Section]]:
    """The half model for a fifth of the full one's tokens, then the full shape for the rest."""

    def stages(job: Job, places: Places, rate: float) -> list[Section]:
        scale = job.scale
        blocks = {"num_hidden_layers": scale.full["num_hidden_layers"] // 2 or 1}
        small = blocks if method == "stack" else scale.half
        steps = scale.steps()
        sizes = {"num_hidden_layers": scale.full["num_hidden_layers"]}
        if method != "stack":
            sizes["intermediate_size"] = scale.full["intermediate_size"]
        if method == "stack":
            sizes["num_hidden_layers"] = 2 * blocks["num_hidden_layers"]
        student = {"type": "grown", "source": {"type": "stage", "stage": "small"}, "method": method, **sizes}
        return [
            stage(job, scale.student(**small), max(2, steps // 5), rate, name="small"),
            stage(job, student, max(2, steps - steps // 5), rate),
        ]

    return stages


ROWS = (
    Row(name="full", what="the full model, the teacher", stages=alone(), factors=(1.0,)),
    Row(name="scratch", what="half the parameters, from scratch", stages=scratch, factors=(1.0,)),
    *(
        Row(
            name=f"pruned-{share:.0%}".replace("%", ""), what=f"pruned and distilled, {share:.0%} of the tokens",
            stages=pruned(share), needs=("full",), factors=(0.5, 1.0) if share == max(SHARES) else (),
            rate_of=f"pruned-{max(SHARES):.0%}".replace("%", ""),
        )
        for share in reversed(SHARES)
    ),
    Row(name="elastic", what="all sizes in one run", stages=elastic, factors=(1.0,)),
    *(
        Row(name=f"alone-{number + 1}", what=f"sub-network {number + 1} trained alone",
            stages=sub_network_alone(number), rate_of="full")
        for number in range(4)
    ),
    Row(name="pruned-untaught", what="pruned, no teacher, 40 % of the tokens", stages=pruned(0.4, taught=False),
        needs=("full",), rate_of="pruned-40"),
    Row(name="sheared", what="learned masks, then distilled, 40 % of the tokens", stages=sheared(0.4), needs=("full",),
        rate_of="pruned-40"),
    Row(name="grown-same", what="grown, same function", stages=grown("function_preserving"), rate_of="full"),
    Row(name="grown-advanced", what="grown, advanced", stages=grown("advanced"), rate_of="full"),
    Row(name="grown-stack", what="grown, stacked", stages=grown("stack"), rate_of="full"),
)  # fmt: skip
"""In the order of their worth: the bars first."""


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def tried(row: Row, scale: Scale) -> list[float]:
    """The learning rates of a row's sweep."""
    return sorted({factor * rate for factor in row.factors for rate in scale.rates})


def jobs(scale: Scale, *, seeds: int) -> list[Job]:
    """Everything to train: the sweeps and the first seed of every row, then further seeds."""
    queue: list[Job] = []
    for row in ROWS:
        for rate in tried(row, scale):
            queue.append(Job(row=row, scale=scale, rate=rate))
        queue.append(Job(row=row, scale=scale))
    return queue + [Job(row=row, scale=scale, seed=seed) for seed in range(1, seeds) for row in ROWS]


def recipe(job: Job, places: Places, rate: float) -> Section:
    """The recipe of a run, ready to be written as JSON (which is YAML)."""
    return {
        "version": 1,
        "name": "starts",
        "seed": job.seed,
        "data": {
            **places.data,
            "tokenizer": {"type": "train", "vocab_size": job.scale.vocabulary},
            "sequence_length": SEQUENCE,
            "held_out": 0.03,
            "restart_at_documents": False,
        },
        "stages": job.row.stages(job, places, rate),
        "evaluate": None,
        "bench": None,
    }
