"""What a model directory's config.json means: all settings, and every weight of the architecture by its name.

transformers knows both. The configuration class fills in what a JSON leaves out (GPT-2, OPT and Gemma do not say that
their head is tied), and the model class, built without memory, knows the names, shapes and kinds of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.compress.factor_format import FactoredLayer, factored_layers, unmarked
from edgewright.errors import BadInput
from edgewright.export.guard import read_json
from edgewright.imports import no_collection

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NOT_WEIGHTS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|version)$")
"""Buffers of old checkpoints: masks, rotary frequencies, which every runtime computes, and OPT's version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The weights that a causal language model of one configuration consists of, under their state-dict names."""

    model_type: str
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor of the state dict, as the checkpoint stores it."""
    linear: tuple[str, ...]
    """The weights of linear layers, the output head's among them, in the order of the model."""
    transposed: frozenset[str]
    """Those that are stored `[in, out]`, as GPT-2's `Conv1D` does."""
    embedding: str
    """The token embedding."""
    head: str
    """The weight of the output head, whether it is tied or not."""
    shared: frozenset[str]
    """What the files may leave out, because the configuration ties it to another weight."""
    prefix: str
    """What the names begin with that checkpoints of the bare model leave out, with its dot."""
    factors: Mapping[str, FactoredLayer]
    """The layers that are stored as factors, by name; their parts are among `shapes` and `linear`."""
    ignored: tuple[str, ...]
    """Patterns of what may be in the files beyond the state dict."""

    def state_name(self, stored: str) -> str | None:
        """The state-dict name of a tensor in a file; None when the architecture has none for it."""
        for name in (stored, self.prefix + stored, stored.removeprefix(self.prefix)):
            if name in self.shapes:
                return name
        return None

    def ignores(self, stored: str) -> bool:
        """Whether a tensor that the state dict lacks is known to be no weight of it."""
        return NOT_WEIGHTS.search(stored) is not None or any(re.search(rule, stored) for rule in self.ignored)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json with every setting that its family has: what the file says, else the family's default.

    Settings under a family's own name (`n_embd`) are there under the usual one (`hidden_size`) as well.

    Raises:
        BadInput: EW-312, EW-327, EW-722.
    """
    return _complete(unmarked(read_json(directory / "config.json")), open_config(directory))


@no_collection()
def open_config(directory: Path) -> PretrainedConfig:
    """config.json as `AutoConfig.from_pretrained` understands it; where layers are factors, of the model that has them.

    Mistral whose layers are of several kinds (`layer_types`) is Ministral, as there.

    Raises:
        BadInput: EW-327, transformers does not know such a model, or refuses the values.
    """
    from transformers import AutoConfig

    raw = unmarked(read_json(directory / "config.json"))
    raw.pop("quantization_config", None)  # how the weights are stored; the architecture does not depend on it
    kind = raw.pop("model_type", None)
    known_as = "ministral" if kind == "mistral" and "layer_types" in raw else str(kind)
    try:
        config: PretrainedConfig = AutoConfig.for_model(known_as, **raw)
    except _refusals() as error:
        raise _not_known(directory, f"model_type {kind!r}: {str(error)[:200]}") from error
    return config


@no_collection()
def read_architecture(directory: Path) -> Architecture:
    """The weights of the architecture that a directory's config.json names.

    Raises:
        BadInput: EW-327, it is no causal language model that transformers knows; EW-722, its factors do not fit it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgewright.compress.factored_model import put_factors

    config = open_config(directory)
    factors = factored_layers(read_json(directory / "config.json"))
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except _refusals() as error:
        raise _not_known(directory, f"model_type {config.model_type!r}: {str(error)[:200]}") from error
    if config.get_text_config() is not config or model.get_output_embeddings() is None:
        raise _not_known(directory, f"model_type {config.model_type!r}, which is more than a model of text")
    put_factors(model, factors)
    return _describe(model, config, factors)


def _refusals() -> tuple[type[Exception], ...]:
    """What transformers raises for settings that it cannot take; each family checks its values its own way."""
    from huggingface_hub.errors import StrictDataclassError

    plain = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError)
    return (*plain, StrictDataclassError)


def _describe(model: PreTrainedModel, config: PretrainedConfig, factors: Mapping[str, FactoredLayer]) -> Architecture:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = {f"{name}.weight": module for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return Architecture(
        model_type=config.model_type,
        shapes={name: tuple(value.shape) for name, value in model.state_dict().items()},
        linear=tuple(name for name, layer in layers.items() if isinstance(layer, (nn.Linear, Conv1D))),
        transposed=frozenset(name for name, layer in layers.items() if isinstance(layer, Conv1D)),
        embedding=_name_of(embedding, layers.items()),
        head=_name_of(head, layers.items()),
        shared=frozenset(model.all_tied_weights_keys),
        prefix=f"{model.base_model_prefix}.",
        factors=factors,
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
    )


def _name_of(layer: object, layers: Iterable[tuple[str, object]]) -> str:
    return next(name for name, module in layers if module is layer)


def _complete(raw: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    settings = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    settings |= {usual: settings[own] for usual, own in config.attribute_map.items() if own in settings}
    given = {key: value for key, value in raw.items() if value is not None or key not in settings}
    return settings | given | {"model_type": config.model_type}


def _not_known(directory: Path, found: str) -> BadInput:
    return BadInput(
        "EW-327",
        "this is no causal language model that transformers knows",
        where=(directory / "config.json").absolute(),
        expected="the config.json of a text model: llama, mistral, qwen2, qwen3, gemma, phi, gpt2, opt, ...",
        found=found,
        fix="check model_type and the values; a model that brings its own code cannot be exported",
    )
