"""The graph of any decoder: `torch.onnx.export` of the transformers model with its cache as inputs and outputs.

The model is traced without its weights (fake tensors: shapes only), so tracing costs the same for one million and for
one billion parameters, and nothing can fold a weight into something that no longer bears its name. The weights go from
the checkpoint into the external data, one tensor at a time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgewright.errors import BadInput, GateFailed
from edgewright.export.onnx.nodes import OPSET, lazy_weight
from edgewright.export.source import Source

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel

PACKAGES = ("onnxscript", "torch", "transformers")
"""What makes the graph."""

_PREFIX = "model."
"""What the wrapper puts before the names of the model's state."""

_INPUTS = ("input_ids", "attention_mask", "position_ids")

_REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError)
"""What transformers and the exporter raise for a model that they cannot take."""

_QUIET = ("torch", "torch.onnx", "transformers", "onnxscript", "onnx_ir")
"""The loggers that comment on an export."""


def build(source: Source) -> ir.Model:
    """The graph in memory; its weights are read when their bytes are asked for.

    Raises:
        BadInput: EW-523, transformers or the exporter cannot turn this model into a graph with a cache.
        GateFailed: EW-521, the graph lacks a weight of the checkpoint or has one too many.
    """
    with _quiet():
        model = _traced(source)
    _attach_weights(model, source)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporter, which are about its own workings."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---------------------------------------------------------------- tracing


def _traced(source: Source) -> ir.Model:
    """The optimized graph; weights are inputs, by their names in the checkpoint."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad():
            shapes = _cache_shapes(_empty_model(source, fake), fake)  # a model of its own: some keep what they compute
            model = _empty_model(source, fake)
            program = _export(model, shapes, fake)
    except _REFUSALS as error:
        raise _cannot_trace(source, error) from error
    _release_weights(program.model.graph, _checkpoint_names(model, source))
    program.optimize()
    _tidy(program.model)
    return program.model


def _empty_model(source: Source, fake: Any) -> PreTrainedModel:
    """The architecture with parameters that have shapes only; what is computed from the config alone is real."""
    import torch

    from edgewright.compress.factored_model import empty_model, put_factors
    from edgewright.export.architecture import open_config

    config = open_config(source.directory)
    config.tie_word_embeddings = source.tied
    model = empty_model(config, torch.float32)
    put_factors(model, source.architecture.factors)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with fake:
                empty = torch.empty(parameter.shape, dtype=torch.float32)
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
    model.tie_weights()
    return model.eval()


def _cache_shapes(model: PreTrainedModel, fake: Any) -> list[tuple[int, int]]:
    """Heads and head size of the keys and values of each layer, as the model itself makes them."""
    import torch
    from transformers.cache_utils import DynamicLayer

    with fake:
        cache = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    shapes = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise NotImplementedError(f"the cache of a layer is a {type(layer).__name__}, not keys and values")
        if layer.keys.shape != layer.values.shape:
            raise NotImplementedError(f"keys have the shape {layer.keys.shape}, values {layer.values.shape}")
        shapes.append((layer.keys.shape[1], layer.keys.shape[3]))
    return shapes


def _export(model: PreTrainedModel, shapes: list[tuple[int, int]], fake: Any) -> torch.onnx.ONNXProgram:
    """The graph before any optimization."""
    import torch

    batch, sequence, past = 2, 3, 5  # a length of one would be taken for a constant
    with fake:
        arguments = (
            torch.zeros(batch, sequence, dtype=torch.long),
            torch.ones(batch, past + sequence, dtype=torch.long),
            torch.zeros(batch, sequence, dtype=torch.long),
            [torch.zeros(batch, heads, past, size) for heads, size in shapes for _ in range(2)],
        )
    dim = torch.export.Dim
    of_batch, of_sequence, of_past = dim("batch"), dim("sequence"), dim("past")
    dynamic = (
        {0: of_batch, 1: of_sequence},
        {0: of_batch, 1: dim.DYNAMIC},  # past + sequence, which the exporter finds out itself
        {0: of_batch, 1: of_sequence},
        [{0: of_batch, 2: of_past}] * (2 * len(shapes)),
    )
    cache = [f"{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    names = [*_INPUTS, *(f"past_key_values.{name}" for name in cache)]
    with fake:
        exported = torch.export.export(_with_cache(model), arguments, dynamic_shapes=dynamic, strict=False)
    program = torch.onnx.export(
        exported,
        arguments,
        dynamo=True,
        dynamic_shapes=dynamic,
        input_names=names,
        output_names=["logits", *(f"present.{name}" for name in cache)],
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    return program


def _with_cache(model: PreTrainedModel) -> torch.nn.Module:
    """The model as a function of tensors alone."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[torch.Tensor],
        ) -> tuple[torch.Tensor, ...]:
            # Without the config, so that a sliding window is a matter of the mask and no cache forgets tokens.
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
            return (output.logits, *(part for layer in layers for part in (layer.keys, layer.values)))

    return WithCache()


def _tidy(model: ir.Model) -> None:
    """Without stack traces, which hold paths of this machine; the length of the attention mask gets a name."""
    import onnx_ir as ir

    graph = model.graph
    model.producer_name, model.producer_version = "edgewright", None
    for holder in [model, graph, *graph, *graph.inputs, *(value for node in graph for value in node.outputs)]:
        holder.metadata_props.clear()
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    assert mask.shape is not None
    mask.shape = ir.Shape([mask.shape[0], "past + sequence"])


# ---------------------------------------------------------------- weights


def _checkpoint_names(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """For each tensor of the model's state, by its name in the exported graph, its name in the checkpoint.

    Tied tensors are one object, of whose names the checkpoint has one.
    """
    state = model.state_dict(keep_vars=True)
    stored = {id(state[name]): name for name in sorted(state, reverse=True) if name in source.files}
    return {_PREFIX + name: stored.get(id(value), name) for name, value in state.items()}


def _release_weights(graph: ir.Graph, names: dict[str, str]) -> None:
    """Make inputs of the weights, so that no optimization looks at their values, which are fake, or joins two."""
    for value in [value for value in graph.initializers.values() if value.name in names]:
        graph.initializers.pop(str(value.name))
        value.const_value = None
        value.name = names[str(value.name)]
        graph.inputs.append(value)


def _attach_weights(model: ir.Model, source: Source) -> None:
    """Make initializers of the weights again, with values that are read when the file is written."""
    for value in [value for value in model.graph.inputs if value.name in source.files]:
        name = str(value.name)
        transposed = _turn_round(value)
        shape = source.shape(name)
        if tuple(value.shape or ()) != shape:
            raise _broken(name, f"the shape {shape}, where the architecture has {value.shape}")
        value.const_value = lazy_weight(source, name, turned=transposed)
        value.shape = value.const_value.shape
        model.graph.inputs.remove(value)
        model.graph.initializers[name] = value
    for value in model.graph.inputs:
        if value.name not in _INPUTS and not str(value.name).startswith("past_key_values."):
            raise _broken(str(value.name), "no such tensor")


def _turn_round(weight: ir.Value) -> bool:
    """Take a transposition out of the graph that can be done once, in the file; whether there was one.

    A weight with a second reader, such as a tied embedding, stays as it is.
    """
    uses = list(weight.uses())
    if len(uses) != 1:
        return False
    node, index = uses[0]
    if node.op_type == "Gemm" and index == 1 and "transB" in node.attributes and node.attributes["transB"].as_int():
        node.attributes.pop("transB")
        return True
    result = node.outputs[0]
    if node.op_type != "Transpose" or list(node.attributes.get_ints("perm", ())) != [1, 0]:
        return False
    if not all(user.op_type == "MatMul" and place == 1 for user, place in result.uses()):
        return False
    result.replace_all_uses_with(weight)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _cannot_trace(source: Source, error: Exception) -> BadInput:
    lines = str(error).strip().splitlines() or ["no message"]
    return BadInput(
        "EW-523",
        "this model cannot be turned into a graph with a key-value cache",
        where=source.directory.absolute(),
        expected="a decoder that transformers knows, with keys and values for each layer as its cache",
        found=f"{type(error).__name__}: {lines[0][:300]}",
        fix="export to hf, or to gguf where its architecture is known",
    )


def _broken(name: str, found: str) -> GateFailed:
    return GateFailed(
        "EW-521",
        f"the graph and the checkpoint differ in the weight {name!r}",
        expected="every weight of the architecture, in its shape",
        found=found,
        fix="save the whole model again with save_pretrained; adapters must be merged first",
    )
