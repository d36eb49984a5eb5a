"""Models of a size that matters, randomly initialised: speed, memory and exactness do not ask for sense."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000


def mid(directory: Path, *, ternary: bool) -> Path:
    """A Llama of 200.8M parameters (hidden 1024, 12 layers, 16 heads on 4, 32,000 tokens, head and embedding apart).

    Args:
        directory: made; where it holds a model already, that is used.
        ternary: whether the linear layers, but not the head, are absmean ternary, one scale a tensor.
    """
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    for name, weight in model.state_dict().items():
        if name.endswith("norm.weight"):
            weight.uniform_(0.8, 1.2)
        elif ternary and "_proj" in name:
            scale = weight.abs().mean().to(torch.bfloat16).to(torch.float16).float()
            weight.copy_((weight / scale).round().clip(-1, 1) * scale)
    model.save_pretrained(directory)
    return directory


def _save_tokenizer(directory: Path) -> None:
    """Byte-level BPE, filled up to the size of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n", "the quick brown fox "] * 20, trainer)
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for index in range(len(vocabulary), VOCABULARY):
        vocabulary[f"<unused{index}>"] = index
    (directory / "tokenizer.json").write_text(json.dumps(described))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
