"""One tiny random model of every family, saved as a Hugging Face directory with a byte-level tokenizer.

What a target may get wrong without anybody noticing is made visible: norms are not 1, biases not 0, logits not flat,
heads are wider than hidden / heads where a family allows it, keys are grouped, windows are shorter than the texts of
tests, soft-caps bite. A variant is `family-what_differs`; both names are keys of `FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WINDOW = 24
"""Tokens that a layer with a sliding window sees; texts of tests should be longer."""

LENGTH = 128
"""Longest text of the models."""

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
_GEMMA = {**_LLAMA, "head_dim": 32, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "n_inner": 96}
_LOCAL = {"rope_type": "default", "rope_theta": 100.0}
_GLOBAL = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama-linear": (
        "LlamaForCausalLM",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "llama-llama3": (
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "head_dim": 32, "sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {**_LLAMA, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", _GEMMA),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 7,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _GLOBAL},
        },
    ),
    "phi": (
        "PhiForCausalLM",
        {**_LLAMA, "num_key_value_heads": 4, "rope_parameters": {**_GLOBAL, "partial_rotary_factor": 0.5}},
    ),
    "phi3": ("Phi3ForCausalLM", {**_LLAMA, "pad_token_id": 0}),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {
            **_LLAMA,
            "pad_token_id": 0,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0 + 0.05 * index for index in range(8)],
                "long_factor": [1.0 + 0.7 * index for index in range(8)],
            },
        },
    ),
    "phi3-window": ("Phi3ForCausalLM", {**_LLAMA, "pad_token_id": 0, "sliding_window": WINDOW}),
    "smollm3": ("SmolLM3ForCausalLM", {**_LLAMA, "num_hidden_layers": 4, "pad_token_id": 0}),
    "bitnet": ("BitNetForCausalLM", {**_LLAMA, "hidden_act": "silu", "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": LENGTH,
        },
    ),
}
"""The class in transformers and its settings, by the name of the family or variant."""


def save_family(family: str, directory: Path, changes: Mapping[str, Any] | None = None, *, seed: int = 5) -> Path:
    """Save a tiny model of a family.

    Args:
        family: a key of `FAMILIES`.
        directory: is made.
        changes: settings in the place of the family's; `vocab_size` pads the embedding beyond the tokenizer.
        seed: of the weights.
    """
    import torch
    import transformers

    class_name, settings = FAMILIES[family]
    directory.mkdir(parents=True, exist_ok=True)
    model_class = getattr(transformers, class_name)
    size = save_byte_tokenizer(directory, bos=True)
    tokens = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None}
    config = model_class.config_class(**{**tokens, **settings, **(changes or {})})
    torch.manual_seed(seed)
    model = model_class(config).float()
    _make_lively(model)
    model.save_pretrained(directory)
    return directory


def save_byte_tokenizer(directory: Path, *, bos: bool) -> int:
    """A byte-level BPE tokenizer of some 290 tokens; gives its size back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|begin|>"] if bos else ["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n" * 20, "the quick brown fox " * 20], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    settings |= {"bos_token": "<|begin|>"} if bos else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def _make_lively(model: Any) -> None:
    """Weights of a size that keeps activations near 1 and spreads the logits, norms in 0.8..1.2, biases not zero."""
    import torch

    offset = 1.0 if type(model).__name__.startswith("Gemma") else 0.0  # their norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.uniform_(0.8 - offset, 1.2 - offset)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.normal_(0, 0.15 if offset else 0.3)  # Gemma multiplies its embedding by 8
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
