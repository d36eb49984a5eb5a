"""Models of a size that matters, randomly initialised: speed, memory and exactness do not ask for sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000


def mid(directory: Path, *, ternary: bool, pieces: bool = False) -> Path:
    """A Llama of 200.8M parameters (hidden 1024, 12 layers, 16 heads on 4, 32,000 tokens, head and embedding apart).

    Args:
        directory: made; where it holds a model already, that is used.
        ternary: whether the linear layers, but not the head, are absmean ternary, one scale a tensor.
        pieces: whether its tokenizer is like Llama 2's, a kind that llama.cpp's converter takes without knowing the
            very vocabulary; else it is byte-level BPE.
    """
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(directory, _pieces() if pieces else _byte_level())
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


def _byte_level() -> dict[str, Any]:
    """A tokenizer.json: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n", "the quick brown fox "] * 20, trainer)
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def _pieces() -> dict[str, Any]:
    """A tokenizer.json: BPE over text whose spaces are marked, with a token for each byte beside it, and no merges."""
    words = ["<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<|end|>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(undo)
    tokenizer.add_special_tokens(["<|end|>"])
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def _save_tokenizer(directory: Path, described: dict[str, Any]) -> None:
    """Write it, filled up to the size of the vocabulary."""
    vocabulary = described["model"]["vocab"]
    for index in range(len(vocabulary), VOCABULARY):
        vocabulary[f"<unused{index}>"] = index
    (directory / "tokenizer.json").write_text(json.dumps(described))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
