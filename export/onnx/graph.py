"""Surgery on decoder graphs in ONNX: weights become packed codes, and what a runtime cannot run is rewritten.

A graph arrives as the vendor's builder made it, in fp32. Nothing here rounds: what is packed was laid out from a
lattice (`onnx/packing.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewright.export.onnx.packing import Packed

CONTRIB = "com.microsoft"

_ROTARY_PARTS = 8
"""GroupQueryAttention rotates only by tables whose width is a multiple of this."""
_LAYER = re.compile(r"/layers\.(\d+)/")


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

    def set(self, name: str, value: np.ndarray) -> None:
        """Give an initializer another value."""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)

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


def set_packed_linear(graph: Graph, node: onnx.NodeProto, packed: Packed) -> None:
    """Turn a `MatMul` with a constant weight into a `MatMulNBits`.

    `accuracy_level` is 4 (activations in 8 bits per block): at 2 and 8 bits level 0 is ten times slower and more
    (benchmarks/onnx_block_size.py).
    """
    weight, bits = node.input[1], packed.layout.bits
    codes = graph.add(f"{weight}_Q{bits}", packed.codes)
    node.CopyFrom(
        helper.make_node(
            "MatMulNBits",
            [node.input[0], codes, *_scaling(graph, weight, packed)],
            list(node.output),
            name=f"{node.name}_Q{bits}",
            domain=CONTRIB,
            K=packed.columns,
            N=len(packed.codes),
            bits=bits,
            block_size=packed.layout.block,
            accuracy_level=4,
        )
    )


def _scaling(graph: Graph, weight: str, packed: Packed) -> list[str]:
    """The scales, and the zero points where they are not the operator's own."""
    scales = graph.add(f"{weight}_scales", packed.scales)
    return [scales] if packed.zeros is None else [scales, graph.add(f"{weight}_zeros", packed.zeros)]


def join_gate_up(graph: Graph, kind: str) -> None:
    """Make one product of the gate and up projections of each layer, and split what it gives.

    A decoder at two bits spends a good part of its time between the products: a product fewer in each layer, and the
    same input rounded once, make decoding some 5 % faster at 200M parameters.

    Args:
        graph: of the builder.
        kind: `MatMul`, or `MatMulNBits`, where only matrices of one layout are joined.
    """
    gates = {node.input[0]: node for node in graph.nodes(kind) if ".mlp.gate_proj." in node.input[1]}
    ups = {node.input[0]: node for node in graph.nodes(kind) if ".mlp.up_proj." in node.input[1]}
    pairs = [(gate, ups[source]) for source, gate in gates.items() if source in ups and _alike(gate, ups[source])]
    joined = {gate.name: _joined(graph, gate, up) for gate, up in pairs}
    gone = {up.name for _, up in pairs}
    graph.replace(lambda node: [] if node.name in gone else joined.get(node.name, [node]))


def _alike(gate: onnx.NodeProto, up: onnx.NodeProto) -> bool:
    """Whether two products differ in their weights alone."""
    return attributes(gate) == attributes(up) and len(gate.input) == len(up.input)


def _joined(graph: Graph, gate: onnx.NodeProto, up: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The product with the rows of both, gate first, and the split of its output."""

    def named(name: str) -> str:
        return name.replace("gate_proj", "gate_up_proj")

    axis = 1 if gate.op_type == "MatMul" else 0  # of the rows
    weights = [
        graph.add(named(one), np.concatenate([graph.array(one), graph.array(other)], axis=axis))
        for one, other in zip(gate.input[1:], up.input[1:], strict=True)
    ]
    output, name = named(gate.output[0]), named(gate.name)
    product = onnx.NodeProto()
    product.CopyFrom(gate)
    product.name = name
    product.input[1:] = weights
    product.output[0] = output
    for attribute in product.attribute:
        if attribute.name == "N":
            attribute.i *= 2
    both = [gate.output[0], up.output[0]]
    return [product, helper.make_node("Split", [output], both, name=f"{name}/Split", axis=-1, num_outputs=2)]


def set_packed_embedding(graph: Graph, packed: Packed) -> None:
    """Turn the token embedding's `Gather` into a `GatherBlockQuantized`.

    The table is stored in the head's layout, so that a tied head and the embedding read the same bytes.
    """
    gather, transpose = embedding_nodes(graph)
    weight = gather.input[0] if transpose is None else transpose.input[0]
    bits, block, columns = packed.layout.bits, packed.layout.block, packed.columns
    rows, blocks, width = packed.codes.shape
    table = graph.add(f"{weight}_Q{bits}", packed.codes)
    flat_shape = graph.add("embedding_shape", np.array([rows, blocks * width], np.int64))
    base = gather.name.rsplit("/", 1)[0]
    whole = blocks * block == columns
    found = gather.output[0]
    raw = found if whole else f"{base}/GatherBlockQuantized/output_0"
    new = [
        helper.make_node("Reshape", [table, flat_shape], [f"{base}/Reshape/output_0"], name=f"{base}/Reshape"),
        helper.make_node(
            "GatherBlockQuantized",
            [f"{base}/Reshape/output_0", gather.input[1], *_scaling(graph, weight, packed)],
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


def set_windows(graph: Graph, windows: list[int | None]) -> None:
    """Let each layer's attention see as many tokens as the checkpoint says, itself among them; None for all.

    The builder drops the window where all layers have one. Where some have, it makes the cache forget what is behind
    it (`sliding_window_cache`); the one here keeps everything, so that it can be rewound.
    """
    for node in graph.nodes("GroupQueryAttention"):
        layer = _LAYER.search(node.name)
        assert layer is not None
        window = windows[int(layer[1])]
        kept = [each for each in node.attribute if each.name not in ("sliding_window_cache", "local_window_size")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("local_window_size", -1 if window is None else window)])


def set_epsilon(graph: Graph, epsilon: float) -> None:
    """Let every norm add this number to the variance."""
    for node in graph.model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = epsilon


def set_embedding_scale(graph: Graph, scale: float) -> None:
    """Multiply the token embedding by exactly this number; the builder rounds it to two decimals."""
    gather, _ = embedding_nodes(graph)
    for node in graph.nodes("Mul"):
        if node.input[0] == gather.output[0]:
            node.input[1] = graph.add("embedding_scale", np.array(scale, np.float32))


def split_rotary(graph: Graph, *, head_size: int) -> bool:
    """Rotate queries and keys before `GroupQueryAttention`, where its own rotation does not take the size.

    The joined q, k, v are split, q and k go through `RotaryEmbedding`, and the graph gets the input `position_ids`
    (int64 `[batch, sequence]`).

    Returns:
        Whether the graph was changed.
    """
    rotating = [node for node in graph.nodes("GroupQueryAttention") if attributes(node)["do_rotary"]]
    if all(graph.initializers[node.input[7]].dims[1] % _ROTARY_PARTS == 0 for node in rotating):
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
