"""What `drafts.py` trains: a target, and its drafts stage by stage; the prompts, and the recipe of each run."""

from __future__ import annotations

import json
import lzma
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT
from quality_runs import ADAMW, Places
from quality_scales import Section

SHARED = ROOT.parent / "shared/data"
STORIES = ("tinystories/train_prefix_2MiB.txt.xz", "tinystories/v2gpt4_head_10k_lines.txt.xz")
BOOKS = ("books/children.jsonl.xz",)
SETS = ("stories", "code", "chat")
"""Of prompts; the first is near the text of stage 1, the others are away from it."""
LONGEST = 180
"""Bytes of a prompt: even with a token for each it fits into the context with what is written."""
WRITTEN = 64
"""Tokens after each prompt."""
SHARE = 0.08
"""A draft's parameters, of the target's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes, and how long they train."""

    name: str
    target: Section
    vocabulary: int
    sequence: int
    batch: int
    target_steps: int
    steps: tuple[int, int, int]
    """Of a draft, by stage."""
    prompts: int
    """Of each set, for the text that drafts are aligned on."""
    judged: int
    """Prompts of each set that acceptance is measured after."""
    samples: int = 4
    rate: float = 3e-3


def shape(hidden: int, layers: int, heads: int, inner: int) -> Section:
    return {
        "type": "preset", "preset": "llama-1m", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": inner,
    }  # fmt: skip


SCALES = {
    "small": Scale(
        name="small", target=shape(256, 8, 4, 768), vocabulary=4096, sequence=256, batch=16, target_steps=4000,
        steps=(2000, 1500, 1000), prompts=400, judged=80,
    ),
    "tiny": Scale(
        name="tiny", target=shape(128, 4, 4, 384), vocabulary=1024, sequence=256, batch=16, target_steps=4800,
        steps=(800, 600, 400), prompts=200, judged=80,
    ),
    "smoke": Scale(
        name="smoke", target=shape(256, 2, 4, 512), vocabulary=512, sequence=256, batch=2, target_steps=3,
        steps=(3, 3, 3), prompts=4, judged=3, samples=1,
    ),
}  # fmt: skip
"""small: two CPU cores, a target of 7.9M parameters, hours. tiny: one of 984 thousand, within the hour. smoke: whether
everything runs, no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    name: str
    what: str
    scale: Scale
    seed: int
    recipe: Callable[[Job, Places], Section]

    def sibling(self, name: str) -> Job:
        """Another run of the same seed."""
        return next(job for job in jobs(self.scale, self.seed + 1) if job.name == f"{name}-s{self.seed}")


def library() -> list[str]:
    """Patterns of the interpreter's own code."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        str(root / "*.py"),
        *(str(root / name / "*.py") for name in ("asyncio", "email", "http", "json", "logging")),
    ]


def texts() -> list[str]:
    return [str(SHARED / name) for name in (*STORIES, *BOOKS)]


def data(job: Job, files: list[str], tokenizer: Section) -> Section:
    return {
        "type": "files",
        "files": files,
        "tokenizer": tokenizer,
        "sequence_length": job.scale.sequence,
        "held_out": 0.03,
        "on_bad_text": "skip",
        "restart_at_documents": False,  # faster: attention needs no mask; the same for every row
    }


def training(job: Job, name: str, student: Section, steps: int, rate: float, **more: Any) -> Section:
    """A stage that trains."""
    return {
        "name": name,
        "student": student,
        "optimizer": {**ADAMW, "learning_rate": rate},
        "schedule": {"type": "cosine", "warmup_ratio": 0.05, "final_ratio": 0.1},
        "budget": {"max_steps": steps},
        "training": {
            "per_device_train_batch_size": job.scale.batch,
            "eval_steps": 0,
            "save_steps": 500,
            "logging_steps": 100,
        },
        **more,
    }


def target(job: Job, places: Places) -> Section:
    """The target reads everything."""
    tokenizer = {"type": "train", "vocab_size": job.scale.vocabulary}
    model = training(job, "model", job.scale.target, job.scale.target_steps, job.scale.rate / 2)
    return _recipe(job, data(job, [*texts(), *library()], tokenizer), [model])


def drafts(job: Job, places: Places) -> Section:
    """Three stages, and what may stand in the place of the third."""
    scale = job.scale
    large = {"type": "checkpoint", "model": str(places.model(job.sibling("target")).absolute())}
    first, second, third = scale.steps

    def aligned(name: str, rate: float, *, runtime: str = "genai", **more: Any) -> Section:
        objective = {"type": "align", "teacher": large, "runtime": runtime, "held_out": list(SETS)}
        start = {"type": "stage", "stage": "domain"}
        generated = {"stage": "answers", "share": 1.0}
        return training(job, name, start, third, rate, objective=objective, generated=generated, **more)

    stages = [
        training(job, "pretrained", {"type": "draft", "source": large, "parameters": SHARE}, first, scale.rate),
        {"name": "library", "type": "text", "files": library(), "on_bad_text": "skip"},
        training(
            job, "domain", {"type": "stage", "stage": "pretrained"}, second, scale.rate * 0.7,
            generated={"stage": "library", "share": 0.67},
        ),
        _written(job, places, large, "answers", [0, 0.6, 0.8, 1.0], scale.samples),
        *(_written(job, places, large, name, [0, 1.0], 1) for name in SETS),
        aligned("aligned", scale.rate / 3),
        aligned("aligned-greedy", scale.rate / 3, runtime="llamacpp"),
        aligned("lora", scale.rate / 3, methods=[{"type": "lora", "rank": 16}]),
        aligned("ternary", scale.rate / 2, methods=[{"type": "ternary", "granularity": "row"}]),
        aligned("int4", scale.rate / 3, methods=[{"type": "integer"}]),
    ]  # fmt: skip
    return _recipe(job, data(job, texts(), {"type": "pretrained", "path": large["model"]}), stages)


def _written(job: Job, places: Places, large: Section, name: str, temperatures: list[float], samples: int) -> Section:
    return {
        "name": name,
        "type": "generate",
        "teacher": large,
        "prompts": {"type": "files", "files": str((places.work / "prompts" / f"{name}.jsonl").absolute())},
        "temperatures": temperatures,
        "samples": samples,
        "max_new_tokens": WRITTEN,
        "per_device_batch_size": 32,
    }


def _recipe(job: Job, source: Section, stages: list[Section]) -> Section:
    return {
        "version": 1, "name": "drafts", "seed": job.seed, "data": source, "stages": stages,
        "evaluate": None, "bench": None,
    }  # fmt: skip


ROWS = (
    ("target", "the target, on stories, books and code", target),
    ("drafts", "its drafts, in three stages and five variants of the third", drafts),
)


def jobs(scale: Scale, seeds: int) -> list[Job]:
    """All runs, seed by seed."""
    return [
        Job(name=f"{name}-s{seed}", what=what, scale=scale, seed=seed, recipe=recipe)
        for seed in range(seeds)
        for name, what, recipe in ROWS
    ]


def write_prompts(scale: Scale, folder: Path) -> None:
    """The prompts of every set: `answers.jsonl`, which drafts are aligned after, and one file that they are not."""
    folder.mkdir(parents=True, exist_ok=True)
    taught = {name: _some(ALIGNED[name](), scale.prompts, set()) for name in SETS}
    seen = {prompt for prompts in taught.values() for prompt in prompts}
    sets = {name: _some(JUDGED[name](), scale.judged, seen) for name in SETS}
    for name, prompts in {"answers": sorted(seen), **sets}.items():
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _some(prompts: Iterator[str], number: int, without: set[str]) -> list[str]:
    """The first so many, each once."""
    found: dict[str, None] = {}
    for prompt in prompts:
        text = prompt.encode()[:LONGEST].decode(errors="ignore").rstrip(" ")
        if text.strip() and text not in without:
            found.setdefault(text)
        if len(found) == number:
            break
    return list(found)


def _lines(name: str) -> Iterator[Any]:
    with lzma.open(SHARED / name, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _stories(name: str) -> Iterator[str]:
    """The first twelve words of each."""
    with lzma.open(SHARED / name, "rt", encoding="utf-8") as file:
        for story in file.read().split("<|endoftext|>"):
            words = story.split()
            if len(words) > 24:
                yield " ".join(words[:12])


def _functions() -> Iterator[str]:
    """The heads of functions of the library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from re.findall(r"^(?:def|class) .+:$", path.read_text(encoding="utf-8", errors="ignore"), re.MULTILINE)


def _instructions() -> Iterator[str]:
    for row in _lines("instruct/dolly_hhrlhf_small.jsonl.xz"):
        yield row["prompt"].partition("### Instruction:\n")[2].partition("\n\n### Response")[0] + "\n"


def _humaneval() -> Iterator[str]:
    for row in _lines("prompts/eagle_humaneval_question.jsonl.xz"):
        yield row["turns"][0].partition("\n\n")[2]


def _questions() -> Iterator[str]:
    for name in ("prompts/mt_bench_question.jsonl.xz", "prompts/spec_bench_question.jsonl.xz"):
        for row in _lines(name):
            yield row["turns"][0] + "\n"


ALIGNED: dict[str, Callable[[], Iterator[str]]] = {
    "stories": lambda: _stories("tinystories/v2gpt4_head_10k_lines.txt.xz"),
    "code": _functions,
    "chat": _instructions,
}
JUDGED: dict[str, Callable[[], Iterator[str]]] = {
    "stories": lambda: _stories("tinystories/valid_head.txt.xz"),
    "code": _humaneval,
    "chat": _questions,
}
