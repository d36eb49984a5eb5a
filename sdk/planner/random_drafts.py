"""Drafts that are measured before there is one: the target's architecture in a few small sizes, with random weights.

What a model takes does not depend on what its weights are, so these are as slow as trained ones will be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDTHS = (4, 2)
"""Parts of the target's hidden size."""
DEPTHS = {4: (1, 4), 2: (1, 2)}
"""Blocks at each of them. Depths differ at one width and widths at one depth, so that a fit can tell them apart."""
COLUMNS = {"tq1_0": 256, "tq2_0": 256, "q6_k": 256, "q5_k": 256, "q4_k": 256, "q3_k": 256, "q2_k": 256, "q2_0": 64}
"""Columns of a width's blocks, where that is more than 32: a draft of fewer would be stored wider."""
SPREAD = 0.02
"""Standard deviation of random weights."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a draft."""

    num_hidden_layers: int
    hidden_size: int
    block: int
    """What the width of its MLP is a multiple of."""


def shapes(target: PretrainedConfig, quant: str) -> list[Shape]:
    """A few small shapes of a target, the smallest first.

    Raises:
        BadInput: EW-866, no size is known of this family, or none is smaller.
    """
    from edgewright.compress.draft_shape import DraftShape

    try:
        whole = DraftShape.of(target)
    except (AttributeError, TypeError) as error:
        raise _no_shape(target, str(error)) from error
    block = block_of(quant)
    step = whole.step(block)
    most = whole.num_hidden_layers
    found = {
        Shape(min(depth, most), max(step, round(whole.hidden_size / part / step) * step), block)
        for part in WIDTHS
        for depth in DEPTHS[part]
    }
    smaller = [each for each in found if (each.hidden_size, each.num_hidden_layers) < (whole.hidden_size, most)]
    smaller = [each for each in smaller if each.hidden_size <= whole.hidden_size]
    if not smaller:
        raise _no_shape(target, whole.text)
    return sorted(smaller, key=lambda each: (each.hidden_size, each.num_hidden_layers))


def block_of(quant: str) -> int:
    """Columns of a width's blocks."""
    return COLUMNS.get(quant.removesuffix("_m"), 32)


def draft_config(target: PretrainedConfig, shape: Shape) -> PretrainedConfig:
    """The configuration of a draft of that shape, all else as in the target."""
    from edgewright.compress.draft_shape import DraftShape

    whole = DraftShape.of(target)
    small = whole.shrunk(hidden_size=shape.hidden_size, num_hidden_layers=shape.num_hidden_layers, block=shape.block)
    return small.config(target, None)


def write_random(config: PretrainedConfig, directory: Path, *, ternary: bool, seed: int = 0) -> None:
    """A Hugging Face directory with random weights, without a tokenizer.

    Args:
        ternary: the matrices of linear layers get three values each, as ternary training leaves them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgewright.student import without_progress_bars

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    heads = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 2:
                continue
            if ternary and id(parameter) not in heads:
                parameter.copy_(torch.randint(-1, 2, parameter.shape).float() * 2.0**-6)
            else:
                parameter.normal_(std=SPREAD)
    with without_progress_bars():
        model.save_pretrained(directory)


def config_of_gguf(path: Path) -> PretrainedConfig:
    """A Llama of the sizes that a GGUF file names, to be shrunk to drafts for it.

    Raises:
        BadInput: EW-866, it does not name them; and what the guard refuses.
    """
    from transformers import LlamaConfig

    from edgewright.export.gguf.file import open_gguf

    file = open_gguf(path)
    settings = file.settings
    arch = settings.get("general.architecture")

    def size(name: str, default: int | None = None) -> int:
        found = settings.get(f"{arch}.{name}", default)
        if not isinstance(found, int):
            raise BadInput(
                "EW-866",
                "no drafts can be shaped after this file",
                where=path,
                expected=f"the setting {arch}.{name}, a number",
                found=found,
                fix="give the model's directory instead, or a draft with --draft",
            )
        return found

    heads = size("attention.head_count")
    hidden = size("embedding_length")
    return LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        num_hidden_layers=size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=size("attention.head_count_kv", heads),
        head_dim=size("attention.key_length", hidden // heads),
        intermediate_size=size("feed_forward_length"),
        max_position_embeddings=size("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=0,
        eos_token_id=0,
    )


def write_filler_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of so many tokens, for models that are measured and never read a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"a", "b"})
    names = ["<|end|>", "a", "b", "ab", *letters][:vocab_size]  # one merge: llama.cpp opens no file without any
    names += [f"filler{index}" for index in range(vocab_size - len(names))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:1])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _no_shape(target: PretrainedConfig, found: str) -> BadInput:
    return BadInput(
        "EW-866",
        "no smaller draft can be shaped after this target",
        expected="an architecture with one hidden size, heads and layers, larger than one block of the file format",
        found=f"{target.model_type}: {found}",
        fix="give a draft of your own with --draft",
    )
