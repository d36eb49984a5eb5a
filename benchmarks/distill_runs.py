"""What `distill.py` trains: a teacher, students with and without it, caches, an ensemble; the recipe of each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import ROOT
from quality_runs import ADAMW, Places
from quality_scales import SEQUENCE, Section

from edgewright.student import PresetStudentConfig

MEMBERS = 8
KL_WEIGHT = 0.9
SAMPLES = 64
FEW_SAMPLES = 24
"""Draws a token, whose bytes the table prints: at most 40 are allowed."""
TOP_K = 6
"""At four or five bytes an entry as many bytes as the draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of teacher and student, and how long they train."""

    name: str
    teacher: Section
    """Four times the student's parameters."""
    student: Section
    vocabulary: int
    batch: int
    rate: float
    tokens_per_parameter: float = 20.0
    """Of the student, embedding included; the teacher gets four times as many steps."""
    judged_tokens: int = 100_000
    written: int = 2048
    """Documents that teachers write."""
    given: str = ""
    """A finished model that teaches in place of one that is trained here."""
    text: tuple[str, ...] = ()
    """Patterns of files in place of the usual text, all of which a cache stage reads."""

    def parameters(self, shape: Section) -> int:
        return PresetStudentConfig.model_validate(shape).parameters(self.vocabulary)

    @property
    def steps(self) -> int:
        """Of a student."""
        return max(2, round(self.tokens_per_parameter * self.parameters(self.student) / (self.batch * SEQUENCE)))


def shape(hidden: int, layers: int, heads: int, inner: int) -> Section:
    return {
        "type": "preset",
        "preset": "llama-1m",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


SCALES = {
    "small": Scale(
        name="small",
        teacher=shape(384, 4, 6, 768),
        student=shape(192, 3, 3, 384),
        vocabulary=2048,
        batch=16,
        rate=3e-3,
    ),
    "tiny": Scale(
        name="tiny",
        teacher=shape(192, 2, 3, 448),
        student=shape(96, 2, 3, 192),
        vocabulary=512,
        batch=16,
        rate=2e-3,  # of 0.001 ... 0.016 the best for the student, from the text alone, after a quarter of the tokens
    ),
    "smoke": Scale(
        name="smoke",
        teacher=shape(64, 2, 2, 128),
        student=shape(32, 1, 2, 64),
        vocabulary=512,
        batch=4,
        rate=3e-3,
        tokens_per_parameter=0.3,
        judged_tokens=4_000,
        written=12,
        text=(str(ROOT / "sdk/*.py"),),
    ),
    "gpu": Scale(
        name="gpu",
        teacher={"type": "preset", "preset": "llama-125m"},
        student={"type": "preset", "preset": "llama-20m"},
        vocabulary=16384,
        batch=128,
        rate=1e-3,
    ),
}
"""small: two CPU cores and a day. tiny: a student of 234 thousand parameters, two hours. smoke: whether everything
runs, no more. gpu: bring a corpus with --data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    name: str
    what: str
    scale: Scale
    seed: int
    stages: Callable[[Job, Places], list[Section]]
    model: str = "model"
    """The stage whose model is judged."""

    def sibling(self, name: str) -> Job:
        """Another run of the same seed."""
        return next(job for job in jobs(self.scale, self.seed + 1) if job.name == f"{name}-s{self.seed}")


def training(job: Job, student: Section, *, steps: int, objective: Section | None = None, **more: Any) -> Section:
    """A stage that trains."""
    return {
        "name": "model",
        "student": student,
        "objective": objective or {"type": "next_token"},
        "optimizer": {**ADAMW, "learning_rate": job.scale.rate},
        "schedule": {"type": "cosine", "warmup_ratio": 0.05, "final_ratio": 0.1},
        "budget": {"max_steps": steps},
        "training": {
            "per_device_train_batch_size": job.scale.batch,
            "eval_steps": 0,
            "save_steps": 1000,
            "logging_steps": 100,
        },
        **more,
    }


def model_of(job: Job, places: Places, name: str, **more: Any) -> Section:
    """The finished model of another run, as a teacher or a start."""
    given = job.scale.given if name == "teacher" else ""
    return {"type": "checkpoint", "model": given or str(places.model(job.sibling(name)).absolute()), **more}


def teacher(job: Job, places: Places) -> list[Section]:
    return [training(job, job.scale.teacher, steps=4 * job.scale.steps)]


def scratch(job: Job, places: Places) -> list[Section]:
    return [training(job, job.scale.student, steps=job.scale.steps)]


def taught(teacher: Section, **settings: Any) -> Section:
    return {"type": "distill", "teacher": teacher, "kl_weight": KL_WEIGHT, **settings}


def from_cache(kind: str) -> Section:
    """The objective for the stage `targets`, in the proportion of `taught`."""
    function = {"sampled": "rs_kd", "top_k": "top_k"}[kind]
    losses = [{"function": function, "weight": KL_WEIGHT}, {"function": "cross_entropy", "weight": "rest"}]
    return {"type": "distill", "teacher": {"type": "cache", "stage": "targets"}, "losses": losses}


def online(weights: str, **settings: Any) -> Callable[[Job, Places], list[Section]]:
    """A teacher beside the student, its weights held like this."""

    def stages(job: Job, places: Places) -> list[Section]:
        objective = taught(model_of(job, places, "teacher", weights=weights), **settings)
        return [training(job, job.scale.student, steps=job.scale.steps, objective=objective)]

    return stages


def cached(targets: Section) -> Callable[[Job, Places], list[Section]]:
    """A cache, then a student that learns from it."""

    def stages(job: Job, places: Places) -> list[Section]:
        cache = {
            "name": "targets",
            "type": "cache",
            "teacher": model_of(job, places, "teacher"),
            "targets": targets,
            "per_device_batch_size": job.scale.batch,
        }
        objective = from_cache(targets["type"])
        return [cache, training(job, job.scale.student, steps=job.scale.steps, objective=objective)]

    return stages


def written(job: Job, places: Places) -> list[Section]:
    """Documents of the teacher in every second sequence, and no other teacher."""
    generate = {
        "name": "written",
        "type": "generate",
        "teacher": model_of(job, places, "teacher"),
        "prompts": {"type": "corpus", "prompts": job.scale.written, "tokens": 16},
        "temperatures": [0.0, 1.0],
        "max_new_tokens": SEQUENCE - 20,
        "per_device_batch_size": 32,
    }
    mixed = {"generated": {"stage": "written", "share": 0.5}}
    return [generate, training(job, job.scale.student, steps=job.scale.steps, **mixed)]


def member(number: int) -> Callable[[Job, Places], list[Section]]:
    """One of the ensemble: the student's shape, its own seed, strong weight decay."""

    def stages(job: Job, places: Places) -> list[Section]:
        optimizer = {**ADAMW, "learning_rate": job.scale.rate, "weight_decay": 0.8}
        seed = 1000 * (job.seed + 1) + number
        return [training(job, job.scale.student, steps=job.scale.steps, optimizer=optimizer, seed=seed)]

    return stages


def from_ensemble(job: Job, places: Places) -> list[Section]:
    members = [model_of(job, places, f"member{number}") for number in range(MEMBERS)]
    objective = taught({"type": "ensemble", "members": members})
    return [training(job, job.scale.student, steps=job.scale.steps, objective=objective)]


ROWS: tuple[tuple[str, str, Callable[[Job, Places], list[Section]]], ...] = (
    ("teacher", "the teacher, four times the student", teacher),
    ("scratch", "the student, from the text alone", scratch),
    ("online", "forward KL, the teacher beside it in fp32", online("fp32")),
    ("online-bf16", "the same, the teacher in bf16", online("bf16")),
    ("online-nf4", "the same, the teacher in 4 bits", online("nf4")),
    ("sampled", f"a cache of {SAMPLES} draws a token", cached({"type": "sampled", "samples": SAMPLES})),
    ("sampled-few", f"a cache of {FEW_SAMPLES} draws a token", cached({"type": "sampled", "samples": FEW_SAMPLES})),
    ("top-k", f"a cache of the {TOP_K} most probable tokens", cached({"type": "top_k", "k": TOP_K})),
    ("written", "half of the text written by the teacher", written),
    *((f"member{n}", f"member {n} of the ensemble", member(n)) for n in range(MEMBERS)),
    ("ensemble", f"taught by {MEMBERS} members", from_ensemble),
)
"""Name, description, stages; in the order in which they need each other."""


def jobs(scale: Scale, seeds: int) -> list[Job]:
    """All runs, seed by seed."""
    return [
        Job(name=f"{name}-s{seed}", what=what, scale=scale, seed=seed, stages=stages)
        for seed in range(seeds)
        for name, what, stages in ROWS
        if name != "teacher" or not scale.given
    ]


def recipe(job: Job, places: Places) -> Section:
    """The recipe of a run, ready to be written as JSON (which is YAML).

    The tokenizer is trained once, by the first run that prepares the data; models know it by their own copy.
    """
    return {
        "version": 1,
        "name": "distill",
        "seed": job.seed,
        "data": {
            **places.data,
            "tokenizer": {"type": "train", "vocab_size": job.scale.vocabulary},
            "sequence_length": SEQUENCE,
            "held_out": 0.03,
            "restart_at_documents": False,  # faster: attention needs no mask; the same for every row
        },
        "stages": job.stages(job, places),
        "evaluate": None,
        "bench": None,
    }
