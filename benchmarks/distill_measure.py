"""What `distill.py` measures without training to an end: step times, the size of a cache, the memory of a teacher."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, interleaved, median_line, worker
from distill_runs import SAMPLES, SEQUENCE, Scale, from_cache, taught, training
from quality_run import say
from quality_runs import Places
from quality_scales import Section

from edgewright.compress.cache import read_manifest
from edgewright.data import prepare_data
from edgewright.files import write_json
from edgewright.recipe import Recipe, load_recipe
from edgewright.stage_work import StageWork
from edgewright.student import build_preset
from edgewright.training import StopRequest
from edgewright.world import ALONE

TEACHER = ROOT / "examples/teacher"
WARM_UP = 2
TINY_LLAMA: Section = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
}
"""The shape of TinyLlama, 1.1B parameters."""
STEP_TEXT = 260_000
"""Characters of text for --step-time: enough for different sequences in every step."""


def carry_out(loaded: Recipe, names: list[str], directory: Path) -> dict[str, Path]:
    """Prepare the data of a recipe and carry out some of its stages; what they leave."""
    corpus = prepare_data(loaded.data, directory / "data", say=say)
    outputs: dict[str, Path] = {}
    for stage in loaded.stages:
        if stage.name not in names:
            continue
        folder = directory / "stages" / stage.name
        work = StageWork(
            recipe=loaded, corpus=corpus, directory=folder, earlier=outputs, say=say, stop=StopRequest(), world=ALONE
        )
        outputs[stage.name] = stage.carry_out(work).output
    return outputs


def step_time(scale: Scale, places: Places, rounds: int) -> None:
    """Seconds of a student's step with cached and with online targets of the same teacher, one after the other."""
    from edgewright.compress.cache import CacheKey
    from edgewright.data import Batches
    from edgewright.trainer import TrainingModule, model_inputs

    with tempfile.TemporaryDirectory() as folder:
        recipe = step_recipe(scale, places, Path(folder))
        made = carry_out(recipe, ["teacher", "targets"], recipe.run_directory)
        corpus = prepare_data(recipe.data, recipe.run_directory / "data", say=say)
        batches = Batches(
            corpus.train, sequence_length=SEQUENCE, seed=0, restart_at_documents=False,
            start_id=corpus.start_id, eos_id=corpus.eos_id,
        )  # fmt: skip
        settings: dict[str, Any] = {"vocab_size": corpus.vocab_size, "max_position_embeddings": SEQUENCE}
        steps = {}
        for stage in recipe.trainings:
            student = build_preset(stage.student, **settings, bos=0, eos=0, seed=0)  # type: ignore[arg-type]
            teacher = stage.teacher
            if teacher is None:
                continue
            objective = stage.objective.build(teacher.build(made, CacheKey.of(recipe.data, corpus)))  # type: ignore
            objective.prepare(student, torch.device("cpu"))
            optimizer = stage.optimizer.build(student)
            steps[stage.name] = (TrainingModule(student.train(), objective, torch.float32), optimizer)

        positions = dict.fromkeys(steps, 0)

        def measure(name: str) -> dict[str, float]:
            module, optimizer = steps[name]
            started = time.perf_counter()
            inputs = model_inputs(batches.batch(positions[name], scale.batch), torch.device("cpu"))
            module(inputs, 1.0 / inputs.labels.numel())[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            positions[name] += scale.batch
            return {"seconds": time.perf_counter() - started}

        for _ in range(WARM_UP):
            for name in steps:
                measure(name)
        found = interleaved(list(steps), measure, rounds)
    print(f"teacher {scale.parameters(scale.teacher):,} parameters, student {scale.parameters(scale.student):,}, ")
    print(f"{scale.batch} x {SEQUENCE} tokens a step, V = {scale.vocabulary:,}, {torch.get_num_threads()} threads")
    for name, figures in found.items():
        print(f"{name:8} {median_line([1e3 * value for value in figures['seconds']], 'ms a step', 1)}")
    ratio = statistics.median(found["online"]["seconds"]) / statistics.median(found["cached"]["seconds"])
    print(f"cached is {ratio:.2f} times as fast (bar: 1.8)")


def step_recipe(scale: Scale, places: Places, folder: Path) -> Recipe:
    """A teacher with random weights, its cache, and two students."""
    from distill_runs import Job

    text = folder / "text.txt"
    text.write_text("\n".join(stdlib_text(STEP_TEXT)), encoding="utf-8")
    data = {
        "type": "files",
        "files": str(text),
        "tokenizer": {"type": "train", "vocab_size": scale.vocabulary},
        "sequence_length": SEQUENCE,
        "held_out": 0.05,
        "restart_at_documents": False,
    }
    job = Job(name="step", what="", scale=scale, seed=0, stages=lambda job, places: [])
    cached = from_cache("sampled")
    online = taught({"type": "stage", "stage": "teacher"})
    teacher = {**training(job, scale.teacher, steps=1), "name": "teacher"}
    targets = {
        "name": "targets",
        "type": "cache",
        "teacher": {"type": "stage", "stage": "teacher"},
        "targets": {"type": "sampled", "samples": SAMPLES},
    }
    students = [
        {**training(job, scale.student, steps=1, objective=objective), "name": name}
        for name, objective in (("cached", cached), ("online", online))
    ]
    written = {
        "version": 1,
        "name": "step",
        "output_dir": str(folder / "run"),
        "data": data,
        "stages": [teacher, targets, *students],
        "evaluate": None,
        "bench": None,
    }
    write_json(folder / "step.yaml", written)
    return load_recipe(folder / "step.yaml")


def stdlib_text(characters: int) -> list[str]:
    """Documents of the interpreter's standard library, so many characters of them together."""
    from edgewright.data import StdlibData, iterate_documents

    texts: list[str] = []
    for _, text in iterate_documents(StdlibData()):
        texts.append(text)
        if sum(map(len, texts)) > characters:
            break
    return texts


def cache_size(places: Places, tokens: int) -> None:
    """Bytes of a cache as `plan` tells them, from the text alone, and as they are written; and those of 1B tokens."""
    from edgewright.planner.cached import plan_cache

    directory = places.work / f"cache-{tokens}"
    directory.mkdir(parents=True, exist_ok=True)
    recipe = size_recipe(directory, tokens)
    planned = {stage.name: plan_cache(recipe, stage, 4096) for stage in recipe.stages if stage.type == "cache"}
    outputs = carry_out(recipe, list(planned), directory / "run")
    for name, plan in planned.items():
        manifest = read_manifest(outputs[name])
        ratio = manifest["bytes"] / plan.bytes
        print(
            f"{name}: {manifest['tokens']:,} tokens; planned {plan.bytes:,} bytes, written {manifest['bytes']:,}",
            end="",
        )
        print(f", {100 * (ratio - 1):+.2f} % (bar: 5 %); {'; '.join(plan.notes)}")
        billion = replace(plan, tokens=10**9).bytes
        print(
            f"  1B tokens: planned {billion / 1e9:.1f} GB, "
            f"from what was written {1e9 * manifest['bytes'] / manifest['tokens'] / 1e9:.1f} GB"
        )


def size_recipe(directory: Path, tokens: int) -> Recipe:
    """Caches of the shipped teacher, of so much of the standard library, which it was trained on."""
    text = directory / "text.jsonl"
    if not text.exists():
        lines = [json.dumps({"text": document}) + "\n" for document in stdlib_text(round(3.4 * tokens))]
        text.write_text("".join(lines), encoding="utf-8")
    teacher = {"type": "checkpoint", "model": str(TEACHER)}
    kinds: dict[str, Section] = {
        "sampled-50": {"type": "sampled", "samples": 50},
        "top-8": {"type": "top_k", "k": 8},
    }
    caches = [
        {"name": name, "type": "cache", "teacher": teacher, "targets": targets, "per_device_batch_size": 16}
        for name, targets in kinds.items()
    ]
    written = {
        "version": 1,
        "name": "size",
        "output_dir": str(directory / "run"),
        "data": {
            "type": "files",
            "files": str(text),
            "tokenizer": {"type": "pretrained", "path": str(TEACHER)},
            "sequence_length": 512,
            "held_out": 0.02,
        },
        "stages": caches,
        "evaluate": None,
        "bench": None,
    }
    write_json(directory / "size.yaml", written)
    return load_recipe(directory / "size.yaml")


def teacher_memory() -> None:
    """Bytes of a teacher of 1.1B random parameters: its tensors, and what its process grows by."""
    with tempfile.TemporaryDirectory() as folder:
        worker(__file__, "save", folder)
        found = {weights: worker(__file__, weights, folder) for weights in ("bf16", "int8", "nf4")}
    for weights, figures in found.items():
        print(f"{weights:5} tensors {figures['tensors'] / 1e6:8,.0f} MB, process {figures['process'] / 1e6:8,.0f} MB")
    for figure in ("tensors", "process"):
        print(f"nf4 / bf16, {figure}: {found['nf4'][figure] / found['bf16'][figure]:.3f} (bar: 0.35)")


def held(weights: str, folder: Path) -> dict[str, float]:
    """In a process of its own: open the teacher, let it read, and look at what it takes."""
    from edgewright.compress.teacher import OnlineTeacher
    from edgewright.objective import ModelInputs

    ids = torch.arange(256)[None]
    inputs = ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
    before = resident()
    source = OnlineTeacher(folder, weights=weights)  # type: ignore[arg-type]
    source.prepare(None, torch.device("cpu"))
    model = source.open()
    targets = source.targets(inputs, torch.float32)
    del targets
    give_back()
    return {"tensors": tensor_bytes(model), "process": resident() - before}


def tensor_bytes(model: torch.nn.Module) -> float:
    """Of the parameters, with the scales of 4-bit weights."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            state = getattr(tensor, "quant_state", None)
            nested = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
            for scale in nested:
                seen[scale.data_ptr()] = scale.numel() * scale.element_size()
    return float(sum(seen.values()))


def resident() -> float:
    """Bytes of this process in memory, with mapped files, which weights in their own type are left in."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024.0 * int(status.split("VmRSS:")[1].split()[0])


def give_back() -> None:
    """Let the C library return what was freed."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def save(folder: Path) -> dict[str, float]:
    """The teacher with random weights, in bf16, with a tokenizer that nobody reads."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
    model.save_pretrained(folder)
    shutil.copy(TEACHER / "tokenizer.json", folder)
    return {"parameters": float(sum(parameter.numel() for parameter in model.parameters()))}


if __name__ == "__main__":
    what, where = sys.argv[1:]
    print(json.dumps(save(Path(where)) if what == "save" else held(what, Path(where))))
