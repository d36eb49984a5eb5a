"""What the OpenVINO writer does to a graph: weights become compressed constants, the cache becomes a state.

A compressed weight is `Constant -> Convert -> (Subtract(zero)) -> Multiply(scale) -> (Reshape)`, all in float32: the
pattern that the CPU plugin keeps compressed and multiplies from codes. The last node bears the checkpoint's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout.openvino import OpenVinoWeight
from edgewright.export.openvino.package import load


def compressed(layout: OpenVinoWeight, lattice: LatticeTensor, name: str) -> Any:
    """The node that gives a lattice's values, float32 `[rows, columns]`, named after the checkpoint's weight."""
    ov = load()
    ops = ov.opset13
    rows, columns = lattice.codes.shape
    data, scales, zeros = layout.pack(lattice)
    grouped = [rows, columns] if layout.group is None else [rows, columns // layout.group, layout.group]
    kind = getattr(ov.Type, layout.element)  # not Type("u2"), which is u16
    node = ops.convert(ov.op.Constant(ov.Tensor(data, ov.Shape(grouped), kind), False), "f32")
    if zeros is not None:
        node = ops.subtract(node, ops.convert(ops.constant(_beside(zeros, grouped)), "f32"))
    scale = ops.constant(_beside(scales, grouped))
    node = ops.multiply(node, scale if scales.dtype == np.float32 else ops.convert(scale, "f32"))
    if layout.group is not None:
        node = ops.reshape(node, ops.constant(np.array([rows, columns], np.int64)), False)
    node.set_friendly_name(name)
    return node


def _beside(values: np.ndarray, grouped: list[int]) -> np.ndarray:
    """Values of groups `[rows, groups]` or `[1, 1]`, in a shape that broadcasts to that of the codes."""
    shape = [1] * len(grouped) if values.size == 1 else [*grouped[:-1], 1]
    return np.ascontiguousarray(values).reshape(shape)


def dense(values: np.ndarray, name: str) -> Any:
    """The node that gives a float32 weight that is stored in its own type, float32 or float16."""
    ops = load().opset13
    node = ops.constant(np.ascontiguousarray(values))
    if values.dtype != np.float32:
        node = ops.convert(node, "f32")
    node.set_friendly_name(name)
    return node


# ---------------------------------------------------------------- weights in the graph


def release(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Make inputs of the constants with these names, so that no transformation can look at them; those found."""
    ops = load().opset13
    wanted, found = set(names), {}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if name in wanted and node.get_type_name() == "Constant":
            found[name] = ops.parameter(node.get_output_shape(0), np.float32, name=name)
            node.output(0).replace(found[name].output(0))
    model.add_parameters(list(found.values()))
    return found


def simplify(model: Any) -> None:
    """Bring the graph into the form that OpenVINO's own converter gives it.

    The pipeline's paged attention, and with it its drafts, knows no other form.
    """
    load("openvino._offline_transformations").apply_moc_transformations(model, False)


def readers(weight: Any) -> Iterator[tuple[str, Any]]:
    """Who reads a weight: `(how, node)`, past a transposition.

    `how`: "table" for the rows of a lookup, "linear" for the `[out, in]` or `[in, out]` of a product, "other".
    """
    for place in weight.output(0).get_target_inputs():
        node, index = place.get_node(), place.get_index()
        kind = node.get_type_name()
        if kind == "Gather" and index == 0:
            yield "table", node
        elif kind == "MatMul" and index == 1:
            yield "linear", node
        elif kind == "Transpose" and index == 0:
            yield from readers(node)
        else:
            yield "other", node


def set_table(gather: Any, weight: Any) -> None:
    """Look up the rows of another weight."""
    gather.input(0).replace_source_output(weight.output(0))


def set_linear(matmul: Any, weight: Any) -> None:
    """Multiply by another weight, which lies `[out, in]`."""
    ops = load().opset13
    transposed = matmul.get_attributes()["transpose_a"]
    product = ops.matmul(matmul.input_value(0), weight, transposed, True)
    product.set_friendly_name(matmul.get_friendly_name())
    names = matmul.output(0).get_names()
    matmul.output(0).replace(product.output(0))
    product.output(0).get_tensor().set_names(names)


# ---------------------------------------------------------------- the cache


def make_stateful(model: Any) -> None:
    """Turn `past_key_values.* -> present.*` into variables of the model, in the form that LLMPipeline expects.

    The new input `beam_idx` int32 `[batch]` says which row of the batch each row goes on from. A variable that was
    never written is `[batch, heads, 0, size]`.
    """
    ov = load()
    ops = ov.opset13
    parameters = {node.output(0).get_any_name(): node for node in model.get_parameters()}
    beams = ops.parameter(ov.PartialShape([-1]), np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beams])
    pairs = {}
    for name, past in parameters.items():
        if name.startswith("past_key_values."):
            places = past.output(0).get_target_inputs()
            chosen = ops.gather(past, beams, ops.constant(np.int64(0)))
            for place in places:
                place.replace_source_output(chosen.output(0))
            pairs[name] = name.replace("past_key_values.", "present.")
    model.validate_nodes_and_infer_types()
    load("openvino._offline_transformations").apply_make_stateful_transformation(model, pairs)
    batch = ops.gather(
        ops.shape_of(parameters["input_ids"], "i64"), ops.constant(np.array([0], np.int64)), ops.constant(np.int64(0))
    )
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.output(0).get_partial_shape()
            fixed = np.array([shape[1].get_length(), 0, shape[3].get_length()], np.int64)
            empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, ops.constant(fixed)], 0))
            node.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def keep_from_paging(model: Any) -> None:
    """Make a stateful graph one that the pipeline's paged attention does not take, but runs as it is.

    Logits get the rows of `beam_idx`, as they have anyway; paged attention knows no such input.
    """
    ov = load()
    ops = ov.opset13
    beams = next(node for node in model.get_parameters() if "beam_idx" in node.output(0).get_names())
    (result,) = [node for node in model.get_results() if "logits" in node.output(0).get_names()]
    logits = result.input_value(0)
    vocabulary = logits.get_partial_shape()[2].get_length()
    rest = ops.constant(np.array([-1, vocabulary], np.int64))
    shaped = ops.reshape(logits, ops.concat([ops.shape_of(beams, "i64"), rest], 0), False)
    names = logits.get_names()
    logits.get_tensor().set_names(set())
    shaped.output(0).get_tensor().set_names(names)
    result.input(0).replace_source_output(shaped.output(0))
    model.validate_nodes_and_infer_types()
