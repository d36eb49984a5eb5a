"""Models whose linear layers are factors for good: saved to, and opened from, a directory that says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.compress.factor_format import FactoredLayer, factored_layers, marked
from edgewright.compress.factors import FactoredLinear, Factors
from edgewright.errors import BadInput
from edgewright.export.guard import read_json
from edgewright.files import write_json
from edgewright.imports import no_collection

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def mark(model: PreTrainedModel, directory: Path) -> None:
    """Say in a directory that `save_pretrained` wrote which layers of the model are factors, if there are any."""
    layers = {name: _described(layer) for name, layer in model.named_modules() if isinstance(layer, FactoredLinear)}
    if layers:
        path = directory / "config.json"
        write_json(path, marked(read_json(path), layers))


def put_factors(model: nn.Module, layers: Mapping[str, FactoredLayer]) -> None:
    """Put empty factored layers where a model has plain linear ones; on the device of those.

    Raises:
        BadInput: EW-722, there is no such linear layer, or none that could have such factors.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, described in layers.items():
        if name not in linears:
            raise _unfit(name, "no linear layer of that name")
        linear = linears[name]
        if described.rank > min(linear.weight.shape):
            raise _unfit(name, f"rank {described.rank} of a matrix {list(linear.weight.shape)}")
        model.set_submodule(name, _empty(name, linear, described))


def load_factored(directory: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Open a directory that `mark` marked; the guard has passed it.

    Args:
        dtype: of the weights.
        attention: transformers' `attn_implementation`.

    Raises:
        BadInput: EW-722, the section does not fit the model; EW-324, weights are missing or too many.
    """
    from transformers import GenerationConfig

    from edgewright.export.architecture import open_config

    model = empty_model(open_config(directory), dtype, attention)
    put_factors(model, factored_layers(read_json(directory / "config.json")))
    weights = _read(directory, dtype)
    _check_complete(model, weights, directory)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


def _read(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from edgewright.export.lattice import SIDECAR

    files = sorted(path for path in directory.glob("*.safetensors") if path.name != SIDECAR)
    return {name: tensor.to(dtype) for path in files for name, tensor in load_file(path).items()}


@no_collection()
def empty_model(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The plain model of a configuration; its parameters have shapes and no memory, its buffers their values.

    Args:
        config: what to build.
        dtype: of the parameters.
        attention: transformers' `attn_implementation`; None leaves the choice to it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def _described(layer: FactoredLinear) -> FactoredLayer:
    bits = np.zeros(layer.in_features, bool)
    bits[layer.index.cpu().numpy()] = True
    return FactoredLayer(
        method=layer.method,
        rank=layer.rank,
        activation="silu" if layer.activation == "silu" else "none",
        columns=None if layer.columns is None else np.packbits(bits).tobytes().hex(),
        mix=layer.mix,
    )


def _empty(name: str, linear: nn.Linear, described: FactoredLayer) -> FactoredLinear:
    """A layer whose weights are to be filled in."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=linear.weight.dtype, device=linear.weight.device)

    try:
        index = torch.from_numpy(described.places(linear.in_features))
    except ValueError as error:
        raise _unfit(name, str(error)) from None
    layer = FactoredLinear(
        Factors(up=matrix(linear.out_features, described.rank), down=matrix(described.rank, linear.in_features)),
        bias=linear.bias,
        activation=described.activation,
        columns=matrix(linear.out_features, len(index)) if len(index) else None,
        index=index,
        mix=described.mix,
        method=described.method,
    )
    layer.stored = True
    return layer


def _check_complete(model: PreTrainedModel, weights: Mapping[str, Tensor], directory: Path) -> None:
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    optional = set(model.all_tied_weights_keys)
    wrong = sorted(name for name, shape in wanted.items() if name in weights and weights[name].shape != shape)
    wrong += sorted(wanted.keys() - weights.keys() - optional) + sorted(weights.keys() - wanted.keys())
    if wrong:
        raise BadInput(
            "EW-324",
            "the model's files lack weights of its architecture",
            where=directory.absolute(),
            expected="the weights of the model and of the factors that config.json names, and no others",
            found=f"{len(wrong)} missing, of another shape or too many, the first {wrong[0]}",
            fix="copy the model directory again",
        )


def _unfit(layer: str, found: str) -> BadInput:
    return BadInput(
        "EW-722",
        f"config.json names factors that this model cannot have: {layer}",
        expected="layers, ranks and columns of the very model that was trained",
        found=found,
        fix="copy the model directory again, or let the run write it again",
    )
