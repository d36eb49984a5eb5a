"""The graph of a decoder of a known family, written down from its description: in no time, and without torch.

It follows the conventions of `traced_graph.py`: every tensor of the checkpoint is an initializer with its own name,
once; the weight of a linear layer is the second input of a `MatMul` and lies `[in, out]`; a tied head is the
embedding's, behind a `Transpose`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgewright.compress.factor_format import FactoredLayer
from edgewright.export.onnx.attention import Attention
from edgewright.export.onnx.decoder import Decoder
from edgewright.export.onnx.nodes import Nodes
from edgewright.export.onnx.packing import broken_graph
from edgewright.export.source import Source

if TYPE_CHECKING:
    import onnx_ir as ir


def write_graph(decoder: Decoder, source: Source, dialect: Callable[[Nodes, Decoder], Attention]) -> ir.Model:
    """The graph in memory; its weights are read when their bytes are asked for.

    Args:
        decoder: what the checkpoint is, as `describe` says.
        source: the checkpoint.
        dialect: the class that writes attention down.

    Raises:
        GateFailed: EW-521, a weight of the checkpoint has no place in the graph, or not in its shape.
    """
    nodes = Nodes(source)
    attention = dialect(nodes, decoder)
    model = _Writing(decoder, source, nodes, attention).run()
    for name in source.names:
        if name not in model.graph.initializers:
            raise broken_graph(name, "no such weight")
    return model


class _Writing:
    """One graph on its way."""

    def __init__(self, decoder: Decoder, source: Source, nodes: Nodes, attention: Attention) -> None:
        self._decoder, self._source, self._nodes, self._attention = decoder, source, nodes, attention

    def run(self) -> ir.Model:
        nodes, decoder, family = self._nodes, self._decoder, self._decoder.family
        stream = self._embedded()
        for number in range(len(decoder.layers)):
            stream = self._layer(number, stream)
        last = self._norm(stream, family.final_norm)
        head = self._source.head
        if self._source.tied:
            turned = nodes.op("Transpose", nodes.weight(head), attributes={"perm": [1, 0]})
            module = self._source.architecture.head.removesuffix(".weight")
            logits = self._biased(nodes.op("MatMul", last, turned), module, decoder.vocabulary)
        else:
            logits = self._linear(last, head.removesuffix(".weight"))
        if decoder.logit_softcap:
            cap = nodes.scalar(decoder.logit_softcap)
            logits = nodes.op("Mul", nodes.op("Tanh", nodes.op("Div", logits, cap)), cap)
        nodes.output(logits, "logits", "FLOAT", ("batch", "sequence", decoder.vocabulary))
        return nodes.finish()

    def _embedded(self) -> ir.Value:
        nodes, dims = self._nodes, self._dims(self._decoder.hidden_size)
        found = nodes.op(
            "Gather", nodes.weight(self._source.embedding), self._attention.input_ids, attributes={"axis": 0}, dims=dims
        )
        if not self._decoder.family.scales_embedding:
            return found
        return nodes.op("Mul", found, nodes.scalar(self._decoder.hidden_size**0.5), dims=dims)

    def _layer(self, number: int, stream: ir.Value) -> ir.Value:
        family, prefix = self._decoder.family, f"model.layers.{number}."
        before, behind = family.around_attention
        read = self._norm(stream, prefix + before)
        attended = self._self_attention(number, prefix, read)
        if family.around_mlp is None:
            return self._sum(stream, self._sum(attended, self._mlp(prefix, read)))
        stream = self._sum(stream, self._norm(attended, prefix + behind) if behind else attended)
        before, behind = family.around_mlp
        made = self._mlp(prefix, self._norm(stream, prefix + before))
        return self._sum(stream, self._norm(made, prefix + behind) if behind else made)

    def _self_attention(self, number: int, prefix: str, read: ir.Value) -> ir.Value:
        decoder, family = self._decoder, self._decoder.family
        heads = (decoder.heads, decoder.key_heads, decoder.key_heads)
        query, key, value = self._linears(
            read, [prefix + name for name in family.attention_in], [count * decoder.head_size for count in heads]
        )
        query = self._head_norm(query, f"{prefix}self_attn.q_norm", decoder.heads)
        key = self._head_norm(key, f"{prefix}self_attn.k_norm", decoder.key_heads)
        return self._linear(self._attention.attend(number, query, key, value), prefix + family.attention_out)

    def _mlp(self, prefix: str, read: ir.Value) -> ir.Value:
        family = self._decoder.family
        if not family.gated:
            made = self._activated(self._linear(read, prefix + family.mlp_in[0]))
            return self._linear(made, prefix + family.mlp_out)
        modules = [prefix + name for name in family.mlp_in]
        width = sum(map(self._rows, modules)) // 2
        gate, up = self._linears(read, modules, [width, width])
        return self._linear(self._nodes.op("Mul", self._activated(gate), up), prefix + family.mlp_out)

    def _activated(self, value: ir.Value) -> ir.Value:
        return _ACTIVATIONS[self._decoder.activation](self._nodes, value)

    def _linears(self, value: ir.Value, modules: Sequence[str], sizes: Sequence[int]) -> Sequence[ir.Value]:
        """The outputs of linear layers of these sizes; or the parts of the output of the one that joins them."""
        rows = [self._rows(module) for module in modules]
        if sum(rows) != sum(sizes):
            raise broken_graph(f"{modules[0]}.weight", f"{sum(rows)} rows, where heads and widths make {sum(sizes)}")
        if len(modules) == len(sizes):
            return [self._linear(value, module) for module in modules]
        (module,) = modules
        joined, split = self._linear(value, module), self._nodes.integers(*sizes)
        return self._nodes.ops("Split", joined, split, attributes={"axis": -1}, count=len(sizes))

    def _linear(self, value: ir.Value, module: str) -> ir.Value:
        layer = self._source.architecture.factors.get(module)
        product = self._product(value, module) if layer is None else self._factored(value, module, layer)
        return self._biased(product, module, self._rows(module))

    def _biased(self, value: ir.Value, module: str, size: int) -> ir.Value:
        nodes, bias = self._nodes, f"{module}.bias"
        return nodes.op("Add", value, nodes.weight(bias), dims=self._dims(size)) if nodes.has(bias) else value

    def _product(self, value: ir.Value, module: str) -> ir.Value:
        weight = f"{module}.weight"
        dims = self._dims(self._source.shape(weight)[0])
        return self._nodes.op("MatMul", value, self._nodes.weight(weight, turned=True), dims=dims)

    def _factored(self, value: ir.Value, module: str, layer: FactoredLayer) -> ir.Value:
        """mix * B act(A x) + (1 - mix) * S x[columns]: what `compress.factors.FactoredLinear` computes."""
        nodes, down = self._nodes, f"{module}.down"
        inner = _BETWEEN[layer.activation](nodes, self._product(value, down))
        made = self._product(inner, f"{module}.up")
        if layer.columns is None:
            return made
        places = layer.places(self._source.shape(f"{down}.weight")[1])
        index = nodes.constant(places, f"{module}.places")
        picked = nodes.op("Gather", value, index, attributes={"axis": -1}, dims=self._dims(len(places)))
        beside = nodes.op("Mul", self._product(picked, f"{module}.columns"), nodes.scalar(1 - layer.mix))
        return nodes.op(
            "Add", nodes.op("Mul", made, nodes.scalar(layer.mix)), beside, dims=self._dims(self._rows(module))
        )

    def _rows(self, module: str) -> int:
        """Outputs of a linear layer."""
        last = f"{module}.up" if module in self._source.architecture.factors else module
        return self._source.shape(f"{last}.weight")[0]

    def _head_norm(self, value: ir.Value, module: str, heads: int) -> ir.Value:
        """The norm of each head of queries or keys, where the checkpoint has one."""
        nodes, size = self._nodes, self._decoder.head_size
        if not nodes.has(f"{module}.weight"):
            return value
        apart = nodes.op("Reshape", value, nodes.integers(0, 0, heads, size), dims=("batch", "sequence", heads, size))
        return nodes.op("Reshape", self._norm(apart, module), nodes.integers(0, 0, heads * size))

    def _norm(self, value: ir.Value, module: str) -> ir.Value:
        nodes, family, bias = self._nodes, self._decoder.family, f"{module}.bias"
        weight = nodes.weight(f"{module}.weight")
        assert value.shape is not None
        if weight.shape != value.shape[-1:]:
            raise broken_graph(f"{module}.weight", f"the shape {weight.shape}, where {value.shape} are normalized")
        if family.one_more:
            weight = nodes.op("Add", weight, nodes.scalar(1))
        biases = [nodes.weight(bias)] if nodes.has(bias) else []
        attributes = {"axis": -1, "epsilon": self._decoder.epsilon, "stash_type": 1}
        normal = nodes.op(family.norm, value, weight, *biases, attributes=attributes)
        normal.shape, normal.type = value.shape, value.type
        return normal

    def _sum(self, one: ir.Value, other: ir.Value) -> ir.Value:
        return self._nodes.op("Add", one, other, dims=self._dims(self._decoder.hidden_size))

    @staticmethod
    def _dims(size: int) -> tuple[str, str, int]:
        return ("batch", "sequence", size)


def _silu(nodes: Nodes, value: ir.Value) -> ir.Value:
    return nodes.op("Mul", value, nodes.op("Sigmoid", value))


def _gelu(nodes: Nodes, value: ir.Value) -> ir.Value:
    return nodes.op("Gelu", value)


def _gelu_tanh(nodes: Nodes, value: ir.Value) -> ir.Value:
    return nodes.op("Gelu", value, attributes={"approximate": "tanh"})


def _relu(nodes: Nodes, value: ir.Value) -> ir.Value:
    return nodes.op("Relu", value)


_ACTIVATIONS: dict[str, Callable[[Nodes, ir.Value], ir.Value]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}
"""By the name in transformers; the keys are `decoder.ACTIVATIONS`."""

_BETWEEN: dict[str, Callable[[Nodes, ir.Value], ir.Value]] = {"none": lambda nodes, value: value, "silu": _silu}
"""What lies between two factors, by its name in `compress.factors.ACTIVATIONS`."""
