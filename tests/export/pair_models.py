"""Targets and drafts for the tests of pairs: tiny Llamas with one tokenizer, the draft its target's first layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def save_target(directory: Path, **changes: Any) -> Path:
    """Three layers, of which the last two say little: the first alone often chooses the same token."""
    directory.mkdir(parents=True)
    vocabulary = save_byte_tokenizer(directory, bos=False)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(4)
            if ("o_proj" in name or "down_proj" in name) and "layers.0." not in name:
                weight.mul_(0.1)
            if "embed_tokens" in name:
                weight.mul_(10)
    model.save_pretrained(directory)
    return directory


def save_draft(
    target: Path, directory: Path, *, change: Callable[[LlamaForCausalLM], None] | None = None, **changes: Any
) -> Path:
    """The first layer of a target, with its tokenizer; `changes` are settings of config.json afterwards."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(target / name, directory / name)
    set_json(directory / "config.json", **changes)
    return directory


def set_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def permute_vocabulary(directory: Path) -> tuple[int, str, str]:
    """Exchange the texts of tokens 40 and 41 in a tokenizer; the first of both ids, its old and its new text."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    first, second = (next(text for text, token in vocabulary.items() if token == number) for number in (40, 41))
    vocabulary[first], vocabulary[second] = 41, 40
    path.write_text(json.dumps(content))
    return 40, first, second
