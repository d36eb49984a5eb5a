"""A run that takes seconds: a tiny Llama on a few files of the standard library."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

RECIPE = """
version: 1
name: tiny
seed: 7
data:
  type: files
  files: ["corpus/*.py"]
  tokenizer: {type: train, vocab_size: 300}
  sequence_length: 64
  held_out: 0.2
stages:
  - name: base
    student:
      type: preset
      preset: llama-1m
      hidden_size: 64
      num_hidden_layers: 1
      num_attention_heads: 2
      intermediate_size: 64
    optimizer: {type: adamw, learning_rate: 5e-3}
    schedule: {type: cosine, warmup_ratio: 0.1}
    budget: {max_steps: 12}
    training:
      per_device_train_batch_size: 2
      gradient_accumulation_steps: 2
      save_steps: 4
      eval_steps: 6
      eval_sequences: 4
      logging_steps: 5
evaluate: null
bench: null
"""

TERNARY_STAGE = """
  - name: student
    student: {type: stage, stage: base}
    objective: {type: distill, teacher: {type: stage, stage: base}, kl_weight: 0.5}
    methods: [{type: ternary, granularity: row, warmup_ratio: 0.3}]
    optimizer: {type: adamw, learning_rate: 2e-3, weight_decay: 0.0}
    budget: {max_steps: 8}
    training: {per_device_train_batch_size: 4, save_steps: 3, eval_steps: 0, eval_sequences: 4}
"""


def write_recipe(folder: Path, *, ternary: bool = False) -> Path:
    """A recipe with its corpus in `folder`."""
    library = Path(sysconfig.get_path("stdlib"))
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for module in ("bisect", "heapq", "textwrap", "shlex", "fnmatch", "keyword", "stat", "sched", "queue", "gzip"):
        (corpus / f"{module}.py").write_bytes((library / f"{module}.py").read_bytes())
    text = RECIPE
    if ternary:
        text = text.replace("evaluate: null", TERNARY_STAGE.strip("\n") + "\nevaluate: null")
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def curve(directory: Path, stage: str = "base") -> list[tuple[int, str]]:
    """The loss curve as (step, exact float)."""
    lines = (directory / "stages" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [
        (entry["step"], float(entry["loss"]).hex()) for entry in entries if "loss" in entry and "event" not in entry
    ]


def weights(directory: Path, stage: str = "base") -> bytes:
    """The bytes of the final weights."""
    return (directory / "stages" / stage / "model" / "model.safetensors").read_bytes()
