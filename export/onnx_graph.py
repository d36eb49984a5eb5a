"""Surgery on decoder graphs in ONNX: weights become packed codes, and what a runtime cannot run is rewritten.

A graph arrives as the vendor's builder made it, in fp32. Its weights are named after the modules of the checkpoint;
`checkpoint_names` is that map. Nothing here rounds: layouts are packed from a lattice (`layout.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linear layers that a graph may join into one, by rows, and their parts."""

_MODULES: dict[str, str] = {"attn": "self_attn", "mlp": "mlp"}
_LINEAR = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.MatMul\.weight$")
_NORM = re.compile(r"model\.layers\.(\d+)\.(final_norm_layernorm|\w+)\.weight$")
_JOINED_FROM = 1 << 20
"""Weights from which joining two matrices pays: below it, what is saved in starting them goes into the split."""
_ROTARY_HEAD = 16
"""GroupQueryAttention rotates only heads whose size is a multiple of this."""


def checkpoint_names(initializer: str, *, head: str) -> tuple[str, ...] | None:
    """The checkpoint's names of a linear weight, in the order of its rows; None when it is no linear weight.

    Args:
        initializer: name in the fp32 graph.
        head: the checkpoint's name of the output head.
    """
    if initializer == "lm_head.MatMul.weight":
        return (head,)
    match = _LINEAR.match(initializer)
    if match is None:
        return None
    layer, module, projection = match.groups()
    return tuple(
        f"model.layers.{layer}.{_MODULES[module]}.{part}.weight" for part in FUSED.get(projection, (projection,))
    )


def norm_name(initializer: str) -> str | None:
    """The checkpoint's name of a norm weight; None when it is no norm weight."""
    match = _NORM.match(initializer)
    if match is None:
        return None
    return "model.norm.weight" if match[2] == "final_norm_layernorm" else initializer


class Graph:
    """A model in memory, with its initializers by name. Edits are in place.

    Args:
        model: with its external data loaded.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        """The value of an initializer."""
        return numpy_helper.to_array(self.initializers[name])

    def nodes(self, *types: str) -> Iterator[onnx.NodeProto]:
        """The nodes of these operator types, as a snapshot that survives edits."""
        return iter([node for node in self.model.graph.node if node.op_type in types])

    def add(self, name: str, value: np.ndarray) -> str:
        """Add an initializer (the same name twice is the same value) and give its name back."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def replace(self, edit: Callable[[onnx.NodeProto], list[onnx.NodeProto]]) -> None:
        """Put the nodes that `edit` gives in the place of each node, in order."""
        nodes = [new for node in self.model.graph.node for new in edit(node)]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def finish(self) -> onnx.ModelProto:
        """The model, with the initializers that a node still reads."""
        used = {name for node in self.model.graph.node for name in node.input}
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        return self.model


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """The attributes of a node as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def set_packed_linear(
    graph: Graph, node: onnx.NodeProto, packed: np.ndarray, scales: np.ndarray, *, columns: int, bits: int, block: int
) -> None:
    """Turn a `MatMul` with a constant weight into a `MatMulNBits`.

    `accuracy_level` is 4 (activations in 8 bits per block): at 2 and 8 bits level 0 is ten times slower and more
    (benchmarks/onnx_block_size.py).

    Args:
        graph: that holds the node.
        node: the `MatMul`.
        packed: uint8 `[rows, blocks, block * bits / 8]`.
        scales: float32 `[rows, blocks]`.
        columns: width of the unpadded weight.
        bits: 2, 4 or 8.
        block: weights per scale.
    """
    weight = node.input[1]
    inputs = [node.input[0], graph.add(f"{weight}_Q{bits}", packed), graph.add(f"{weight}_scales", scales)]
    node.CopyFrom(
        helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=f"{node.name}_Q{bits}",
            domain=CONTRIB,
            K=columns,
            N=len(packed),
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )
    )


def join_gate_up(graph: Graph) -> None:
    """Make one `MatMulNBits` of each pair of gate and up projections, and split what it gives.

    A decoder at two bits spends a good part of its time between the products: a product fewer in each layer, and the
    same input rounded once, make decoding some 5 % faster at 200M parameters.
    """
    gates = {node.input[0]: node for node in graph.nodes("MatMulNBits") if ".mlp.gate_proj." in node.input[1]}
    ups = {node.input[0]: node for node in graph.nodes("MatMulNBits") if ".mlp.up_proj." in node.input[1]}
    pairs = [(gate, ups[source]) for source, gate in gates.items() if source in ups and _same_layout(gate, ups[source])]
    joined = {gate.name: _joined(graph, gate, up) for gate, up in pairs}
    gone = {up.name for _, up in pairs}
    graph.replace(lambda node: [] if node.name in gone else joined.get(node.name, [node]))


def _same_layout(gate: onnx.NodeProto, up: onnx.NodeProto) -> bool:
    """Whether two matrices may be one, and are large enough."""
    values = attributes(gate)
    return values == attributes(up) and int(values["K"]) * int(values["N"]) >= _JOINED_FROM  # type: ignore[call-overload]


def _joined(graph: Graph, gate: onnx.NodeProto, up: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The product with the rows of both, gate first, and the split of its output."""

    def named(name: str) -> str:
        return name.replace("gate_proj", "gate_up_proj")

    weights = [
        graph.add(named(one), np.concatenate([graph.array(one), graph.array(other)]))
        for one, other in zip(gate.input[1:], up.input[1:], strict=True)
    ]
    output, name = named(gate.output[0]), named(gate.name)
    product = onnx.NodeProto()
    product.CopyFrom(gate)
    product.name = name
    product.input[1:] = weights
    product.output[0] = output
    next(attribute for attribute in product.attribute if attribute.name == "N").i *= 2
    both = [gate.output[0], up.output[0]]
    return [product, helper.make_node("Split", [output], both, name=f"{name}/Split", axis=-1, num_outputs=2)]


def set_packed_embedding(
    graph: Graph, packed: np.ndarray, scales: np.ndarray, *, columns: int, bits: int, block: int
) -> None:
    """Turn the token embedding's `Gather` into a `GatherBlockQuantized`.

    The table is stored in the head's layout, so that a tied head and the embedding read the same bytes.

    Args:
        graph: with one embedding.
        packed: uint8 `[vocabulary, blocks, block * bits / 8]`.
        scales: float32 `[vocabulary, blocks]`.
        columns: the hidden size.
        bits: 4 or 8.
        block: weights per scale.
    """
    gather, transpose = embedding_nodes(graph)
    weight = gather.input[0] if transpose is None else transpose.input[0]
    rows, blocks, width = packed.shape
    table = graph.add(f"{weight}_Q{bits}", packed)
    flat_shape = graph.add("embedding_shape", np.array([rows, blocks * width], np.int64))
    base = gather.name.rsplit("/", 1)[0]
    whole = blocks * block == columns
    found = gather.output[0]
    raw = found if whole else f"{base}/GatherBlockQuantized/output_0"
    new = [
        helper.make_node("Reshape", [table, flat_shape], [f"{base}/Reshape/output_0"], name=f"{base}/Reshape"),
        helper.make_node(
            "GatherBlockQuantized",
            [f"{base}/Reshape/output_0", gather.input[1], graph.add(f"{weight}_scales", scales)],
            [raw],
            name=f"{base}/GatherBlockQuantized",
            domain=CONTRIB,
            bits=bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]
    if not whole:
        ends = [
            graph.add(f"embedding_slice_{word}", np.array([value], np.int64))
            for word, value in (("start", 0), ("end", columns), ("axis", -1))
        ]
        new.append(helper.make_node("Slice", [raw, *ends], [found], name=f"{base}/Slice"))
    gone = [gather.name] if transpose is None else [gather.name, transpose.name]

    def edit(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.name == gather.name:
            return new
        return [] if node.name in gone else [node]

    graph.replace(edit)


def embedding_nodes(graph: Graph) -> tuple[onnx.NodeProto, onnx.NodeProto | None]:
    """The `Gather` of the token embedding, and the `Transpose` of the tied head's weight in front of it, if any."""
    gather = next(node for node in graph.nodes("Gather") if node.input[1] == "input_ids")
    transposes = [node for node in graph.nodes("Transpose") if node.output[0] == gather.input[0]]
    return gather, transposes[0] if transposes else None


def use_standard_norm(graph: Graph) -> None:
    """Rename `SimplifiedLayerNormalization`, which only ONNX Runtime knows, to opset 23's `RMSNormalization`.

    Same formula, `x / sqrt(mean(x**2) + epsilon) * weight`, and the checker accepts it.
    """
    for node in graph.nodes("SimplifiedLayerNormalization"):
        node.op_type = "RMSNormalization"
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, 23)


def split_rotary(graph: Graph, *, head_size: int) -> bool:
    """Rotate queries and keys before `GroupQueryAttention`, where its own rotation does not take the head size.

    The joined q, k, v are split, q and k go through `RotaryEmbedding`, and the graph gets the input `position_ids`
    (int64 `[batch, sequence]`).

    Returns:
        Whether the graph was changed.
    """
    if head_size % _ROTARY_HEAD == 0 or not any(
        attributes(node)["do_rotary"] for node in graph.nodes("GroupQueryAttention")
    ):
        return False

    def edit(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type != "GroupQueryAttention":
            return [node]
        return _rotated(graph, node, head_size)

    graph.replace(edit)
    shape = ["batch_size", "sequence_length"]
    graph.model.graph.input.append(helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, shape))
    return True


def _rotated(graph: Graph, node: onnx.NodeProto, head_size: int) -> list[onnx.NodeProto]:
    """The nodes that do what this attention node did, with the rotation outside."""
    values = attributes(node)
    base = node.name.rsplit("/", 1)[0]
    heads = {"q": values["num_heads"], "k": values["kv_num_heads"], "v": values["kv_num_heads"]}
    sizes = np.array([int(count) * head_size for count in heads.values()], np.int64)  # type: ignore[call-overload]
    cosine, sine = node.input[7], node.input[8]
    rotated = 2 * graph.initializers[cosine].dims[1]
    new = []
    if not node.input[1]:
        split = [f"{base}/{part}_split" for part in heads]
        sizes_name = graph.add("qkv_split_sizes", sizes)
        new.append(helper.make_node("Split", [node.input[0], sizes_name], split, name=f"{base}/Split", axis=-1))
        node.input[0], node.input[1], node.input[2] = split
    for slot, part in enumerate("qk"):
        output = f"{base}/{part}_rotary/output_0"
        new.append(
            helper.make_node(
                "RotaryEmbedding",
                [node.input[slot], "position_ids", cosine, sine],
                [output],
                name=f"{base}/{part}_rotary/RotaryEmbedding",
                domain=CONTRIB,
                interleaved=values["rotary_interleaved"],
                num_heads=heads[part],
                rotary_embedding_dim=rotated,
            )
        )
        node.input[slot] = output
    node.input[7] = node.input[8] = ""
    for attribute in node.attribute:
        if attribute.name == "do_rotary":
            attribute.i = 0
    return [*new, node]
