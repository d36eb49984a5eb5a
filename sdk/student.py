"""Where a model starts: a preset from scratch, or a local Hugging Face directory. Always a PreTrainedModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.errors import BadInput, RecipeError
from edgewright.paths import RecipePath

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.objective import ModelInputs

PRESETS: dict[str, dict[str, int]] = {
    "llama-1m": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384},
    "llama-4m": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768},
    "llama-10m": {"hidden_size": 256, "num_hidden_layers": 10, "num_attention_heads": 4, "intermediate_size": 768},
    "llama-20m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1536},
    "llama-60m": {"hidden_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 1536},
    "llama-125m": {"hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "intermediate_size": 2048},
}
"""Llama family; all sizes but llama-1m's are multiples of 256, so that ternary GGUF blocks hold every row."""


class PresetStudentConfig(BaseModel):
    """A randomly initialised Llama of a named size; any size can be set by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["preset"] = "preset"
    preset: Literal["llama-1m", "llama-4m", "llama-10m", "llama-20m", "llama-60m", "llama-125m"] = "llama-4m"
    hidden_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    tie_word_embeddings: bool = True
    sub_norm: bool = False
    """Norms before o_proj and down_proj as well (SubLN, arXiv 2210.06423), which ternary training gains from: the
    architecture is then transformers' BitNet, with SiLU."""

    def sizes(self) -> dict[str, int]:
        """The preset's sizes with the recipe's own put over them."""
        own = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
        }
        sizes = PRESETS[self.preset] | {key: value for key, value in own.items() if value is not None}
        return sizes | {"num_key_value_heads": self.num_key_value_heads or sizes["num_attention_heads"]}

    def parameters(self, vocab_size: int) -> int:
        """Number of parameters with a vocabulary of that size."""
        size = self.sizes()
        hidden, intermediate = size["hidden_size"], size["intermediate_size"]
        key_value = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
        layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * intermediate + 2 * hidden
        layer += (hidden + intermediate) if self.sub_norm else 0
        embeddings = vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + size["num_hidden_layers"] * layer + hidden


class CheckpointStudentConfig(BaseModel):
    """A local Hugging Face causal-LM directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["checkpoint"] = "checkpoint"
    model: RecipePath
    """The directory: config.json, safetensors, tokenizer files."""


class StageStudentConfig(BaseModel):
    """The result of an earlier stage of the same recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["stage"] = "stage"
    stage: str
    """Name of the earlier stage."""


def preset_config(
    config: PresetStudentConfig, *, vocab_size: int, max_position_embeddings: int, bos: int, eos: int
) -> PretrainedConfig:
    """The architecture of a preset: a Llama, or with `sub_norm` a BitNet that differs by two further norms only.

    It has no `quantization_config`, so that transformers leaves its weights alone.
    """
    from transformers import BitNetConfig, LlamaConfig

    settings: dict[str, Any] = {
        **config.sizes(),
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    return BitNetConfig(**settings, hidden_act="silu") if config.sub_norm else LlamaConfig(**settings)


def build_preset(
    config: PresetStudentConfig, *, vocab_size: int, max_position_embeddings: int, bos: int, eos: int, seed: int
) -> PreTrainedModel:
    """A new model with Hugging Face's own initialisation (normal, 0.02), reproducible from `seed`."""
    import torch
    from transformers import BitNetForCausalLM, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: Any = preset_config(
        config, vocab_size=vocab_size, max_position_embeddings=max_position_embeddings, bos=bos, eos=eos
    )
    return BitNetForCausalLM(settings) if config.sub_norm else LlamaForCausalLM(settings)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hugging Face's bars for files that load in a blink are off inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


WITHOUT_SDPA = frozenset({"gemma2"})
"""Families whose attention caps its scores, which torch's fused attention does not."""


def load_model(directory: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Open a local causal-LM directory in `dtype` (float32 unless given), after the guard has passed it.

    A model with factored layers opens as one that has them (`compress.factored_model`).

    Raises:
        BadInput: EW-3xx, the directory is incomplete or damaged; EW-324, weights are missing; EW-722, factors that do
            not fit the model.
        Unsafe: EW-3xx, it holds code or pickles.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgewright.compress.factor_format import unmarked
    from edgewright.compress.factor_mark import is_marked
    from edgewright.compress.factored_model import load_factored
    from edgewright.export.guard import check_model_directory, read_json

    check_model_directory(directory)
    config = read_json(directory / "config.json")
    attention = "eager" if unmarked(config).get("model_type") in WITHOUT_SDPA else "sdpa"
    if is_marked(config):
        return load_factored(directory, dtype or torch.float32, attention)
    with without_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or torch.float32,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:  # transformers would fill them with random numbers
        raise BadInput(
            "EW-324",
            "the model's files lack weights of its architecture",
            where=directory.absolute(),
            expected="every weight of the architecture that config.json names",
            found=f"{len(missing)} missing or of another shape, the first {missing[0]}",
            fix="save the whole model again with save_pretrained",
        )
    opened: PreTrainedModel = model
    return opened


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's repeated blocks, by the mark that transformers puts on them for activation checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_blocks(model: PreTrainedModel) -> None:
    """Keep for the backward pass only what goes into each block, which is then computed again (arXiv 1604.06174).

    Raises:
        RecipeError: EW-750, the architecture does not know its blocks.
    """
    if not decoder_blocks(model):
        raise RecipeError(
            "EW-750",
            "training.gradient_checkpointing cannot be used with this model",
            expected="an architecture that marks its blocks",
            found=model.config.model_type,
            fix="gradient_checkpointing: false",
        )
    renamed = "activation_checkpointing_enable"  # by transformers 5.x, which warns of the old name
    enable = getattr(model, renamed if hasattr(model, renamed) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


SCALES_LOGITS = frozenset({"cohere", "cohere2"})
"""Families that multiply their logits by `logit_scale`; elsewhere a setting of that name means other things."""


def hidden_states(model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
    """The last hidden states after the final norm, [N, H]."""
    output = model.base_model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)


def output_head(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Head:
    """The output head with its effective weight, in `dtype` if given.

    Raises:
        RecipeError: EW-707, a method replaced the head by a layer whose effective weight is not known.
    """
    from torch import nn

    from edgewright.chunked import Head
    from edgewright.compress.layers import CompressedLinear

    layer = model.get_output_embeddings()
    if isinstance(layer, CompressedLinear):
        weight = layer.effective_weight()
    elif type(layer) is nn.Linear:
        weight = layer.weight
    else:
        raise RecipeError(
            "EW-707",
            "this output head cannot be trained in chunks",
            expected="a linear layer, plain or one that a method represents",
            found=type(layer).__name__,
            fix="exclude the head from the method that replaced it",
        )
    bias = layer.bias
    scale, cap = logit_shape(model)
    return Head(
        weight if dtype is None else weight.to(dtype),
        bias if bias is None or dtype is None else bias.to(dtype),
        scale=scale,
        cap=cap,
    )


def logit_shape(model: PreTrainedModel) -> tuple[float, float | None]:
    """What the architecture does with the head's output: a factor, and a cap (`Head.scale`, `Head.cap`)."""
    settings = model.config.get_text_config().to_dict()
    scale = settings.get("logit_scale") if settings["model_type"] in SCALES_LOGITS else None
    divisor = settings.get("logits_scaling")
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor), settings.get(
        "final_logit_softcapping"
    )


def check_head(model: PreTrainedModel, where: str) -> None:
    """Refuse a model whose logits are not those of its hidden states and its head, on a few tokens.

    Training, evaluation and distillation compute logits in chunks with `output_head`; a family that does something of
    its own after the head would be trained for another function than the one it has.

    Args:
        where: the model's part in the run, for the message.

    Raises:
        RecipeError: EW-712; EW-707 as `output_head`.
    """
    import torch

    from edgewright.objective import ModelInputs

    ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    inputs = ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = output_head(model)(hidden_states(model, inputs))
    check_same_logits(model, own, ours, where)


def check_same_logits(model: PreTrainedModel, own: Tensor, ours: Tensor, where: str) -> None:
    """EW-712, where a model's own logits differ from those that `output_head` makes of the same hidden states."""
    difference, size = (own - ours).abs().max().item(), own.abs().max().item()
    if not difference <= 1e-3 * max(1.0, size):
        raise RecipeError(
            "EW-712",
            f"{model.config.model_type} does something with its logits that training does not know",
            where=where,
            expected="logits = scale * (W h + b), perhaps capped by a tanh",
            found=f"logits that differ by {difference:.3g}, where the largest is {size:.3g}",
            fix="take a model of another family, such as Llama, Qwen, Gemma or Mistral",
        )
