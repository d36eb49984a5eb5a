"""A run directory as `edgewright run` leaves it, with plausible numbers and no model in it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

RECIPE = """\
version: 1
name: demo
seed: 1
data:
  type: stdlib
  tokenizer: {type: pretrained, path: teacher}
  sequence_length: 256
  held_out: 0.02
stages:
  - name: student
    student: {type: checkpoint, model: teacher}
    objective: {type: distill, teacher: {type: checkpoint, model: teacher}, temperature: 1.0, kl_weight: 0.5}
    methods: [{type: ternary, granularity: row}]
    optimizer: {type: adamw, learning_rate: 1e-3}
    budget: {max_steps: 300}
exports:
  - {name: student-tq2_0, model: student, to: gguf, quant: tq2_0, embedding_quant: q8_0}
bench: {prompt: 128, generate: 64, repeats: 5}
"""

# fmt: off
# model-name, to, quant, bytes, bits/byte, KL, max |diff|, top1, greedy,
# ttft, prompt/s, tokens/s, sd, MB
ARTIFACTS = (
    ("teacher-f32", "gguf", "f32", 17_412_096, 1.3812, 3e-11, 2.1e-5, 1.0, True,
     31.2, 4102, 412, 6, 148),
    ("teacher-f16", "gguf", "f16", 8_761_344, 1.3813, 2.4e-7, 4.1e-3, 0.9998, True,
     33.0, 3878, 451, 5, 131),
    ("teacher-q8_0", "gguf", "q8_0", 4_702_208, 1.3829, 6.1e-4, 0.21, 0.991, False,
     24.0, 5333, 693, 9, 127),
    ("teacher-ort-fp32", "genai", "fp32", 17_700_112, 1.3812, 4e-11, 2.6e-5, 1.0, True,
     22.9, 5589, 380, 11, 233),
    ("teacher-ort-int4", "genai", "int4", 4_330_981, 1.4720, 0.071, 3.9, 0.902, False,
     25.2, 5079, 455, 8, 219),
    ("student-tq2_0", "gguf", "tq2_0", 3_211_264, 1.4431, 2.1e-3, 0.63, 0.981, False,
     28.4, 4507, 866, 12, 124),
    ("student-tq1_0", "gguf", "tq1_0", 3_042_112, 1.4431, 2.1e-3, 0.63, 0.981, False,
     35.5, 3605, 745, 10, 124),
    ("student-ort-ternary", "genai", "ternary", 8_104_332, 1.4418, 5e-11, 3.0e-5, 1.0, True,
     40.1, 3192, 402, 7, 221),
)
# fmt: on

SAMPLES = {
    "teacher-f32": "read_file(path):\n    \"\"\"Return the contents.\"\"\"\n    with open(path, 'rb') as f:\n"
    "        return f.read()\n\n\nclass Reader:\n    def __init__(self, file):\n        self.file = file",
    "student-tq2_0": "main():\n    import sys\n    if len(sys.argv) < 2:\n        print(\"usage: <file>\")\n"
    "        sys.exit(1)\n    for name in sys.argv[1:]:\n        print(f'{name} & <b>done</b>')",
}  # fmt: skip


def results() -> dict[str, Any]:
    """The object of `results.json`."""
    return {
        "schema_version": 1,
        "name": "demo",
        "machine": {
            "cpu": "AMD EPYC (x86_64)", "cores": 2, "threads": 2, "memory": 25276510208,
            "os": "Debian GNU/Linux 12 (bookworm), Linux 6.18", "python": "3.11.7", "device": "cpu",
            "packages": {"edgewright": "0.1.0", "torch": "2.13.0", "onnxruntime-genai": "0.18.0"},
        },
        "artifacts": [artifact(*row) for row in ARTIFACTS],
        "checkpoints": [
            {"name": "teacher", "path": "teacher", "bits_per_byte": 1.3812, "ci95": [1.3712, 1.3912],
             "bytes": 8_709_120, "parameters": 4_330_000},
            {"name": "student", "path": "stages/student/model", "bits_per_byte": 1.4418, "ci95": [1.431, 1.4526],
             "bytes": 8_709_120, "parameters": 4_330_000},
        ],
        "samples": [{"artifact": name, "prompt": "def ", "text": text} for name, text in SAMPLES.items()],
        "warnings": ["student-tq2_0: llama.cpp quantizes activations to 8 bits at run time, so its KL is not zero."],
        "data": {"files": 812, "documents": 790, "duplicates": 19, "invalid": 0, "skipped": 3, "bytes": 15_802_112,
                 "tokens": 4_201_133, "bytes_per_token": 3.761},
        "stages": [{"name": "student", "metrics": "stages/student/metrics.jsonl", "steps": 300, "tokens": 614_400,
                    "seconds": 171.3}],
    }  # fmt: skip


def artifact(*row: Any) -> dict[str, Any]:
    """One entry of `artifacts` from a line of the table above."""
    name, to, quant, size, bpb, kl, diff, top1, greedy, ttft, prompt, rate, sd, memory = row
    model = name.partition("-")[0]
    file = f"exports/{name}" + ("" if to == "genai" else f"/{name}.gguf")
    return {
        "name": name, "path": file, "model": model, "to": to, "quant": quant, "bytes": size, "bits_per_byte": bpb,
        "bits_per_byte_ci": [bpb - 0.0104, bpb + 0.0104], "kl": kl, "max_abs_diff": diff, "top1_agreement": top1,
        "kl_weights": kl / 4, "kl_runtime": kl / 2, "perplexity_ratio": 1 + kl,
        "greedy_identity": greedy, "lattice_identity": True, "ttft_ms": ttft, "prompt_tokens_per_s": prompt,
        "prompt_tokens_per_s_sd": 40.0, "tokens_per_s": rate, "tokens_per_s_sd": sd, "peak_memory": memory * 1_000_000,
        "gate": "passed",
    }  # fmt: skip


def metrics(steps: int) -> str:
    """The lines of `metrics.jsonl` of a distillation that starts near its teacher."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1.52 + 1.9 * math.exp(-step / 25) + 0.25 * math.exp(-step / 130) + noise.gauss(0, 0.045)
        line = {"step": step, "tokens": 2048 * step, "loss": loss, "lr": 1e-3, "grad_norm": 0.8}
        rate = 3600 + noise.gauss(0, 60)
        lines.append({**line, "tokens_per_s": rate, "memory": 1_320_000_000, "time": 1.7e9 + step})
        if step % 50 == 0:
            quality = 1.4418 + 0.32 * math.exp(-step / 85)
            lines.append({"step": step, "eval_loss": quality * 2.6, "eval_bits_per_byte": quality})
    lines.insert(120, {"event": "resumed", "step": 100})
    return "".join(json.dumps(line) + "\n" for line in lines)


def make_run(directory: Path, *, finished: bool = True, steps: int = 300) -> Path:
    """Write a run directory; an unfinished one has no results, and its last metrics line is cut off."""
    stage = directory / "stages" / "student"
    stage.mkdir(parents=True)
    (directory / "recipe.resolved.yaml").write_text(RECIPE)
    environment = {"schema_version": 1, "python": "3.11.7", "platform": "Linux", "packages": {"torch": "2.13.0"}}
    (directory / "env.json").write_text(json.dumps(environment))
    text = metrics(steps)
    (stage / "metrics.jsonl").write_text(text if finished else text + '{"step": 99, "lo')
    if finished:
        (stage / "done.json").write_text("{}")
        (directory / "results.json").write_text(json.dumps(results()))
    return directory
