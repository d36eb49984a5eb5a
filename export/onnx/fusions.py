"""What ONNX Runtime computes faster in one node than the exporter's graph does in several.

Its own optimizer does not know these at opset 23. Each is checked in the runtime's profile: the cache is not copied by
`Expand`, residual sums are part of the norms, and with GPT-2's products nothing is reshaped any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"

WITH_RESIDUAL = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
"""Norms, and the operators that take the residual sum along."""


def unflatten(model: ir.Model) -> None:
    """Take the reshaping away that a `Gemm` needs and a product of whole batches does not, before weights are packed.

    It would stand between a residual sum and its norm.
    """
    import onnx_ir as ir

    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        before, uses = _maker(gemm.inputs[0], "Reshape"), list(gemm.outputs[0].uses())
        if before is None or len(uses) != 1 or uses[0][0].op_type != "Reshape" or _has_factors(gemm):
            continue
        after, wide = uses[0][0], before.inputs[0]
        if wide is None or _rank(wide) != 3 or _rank(after.outputs[0]) != 3 or len(gemm.inputs) != 3:
            continue
        product = ir.node("MatMul", [wide, gemm.inputs[1]], name=f"{gemm.name}_product")
        replace(after, [product, ir.node("Add", [product.outputs[0], gemm.inputs[2]], name=f"{gemm.name}_bias")])


def fuse(model: ir.Model) -> None:
    """Attention with shared heads, and norms that take their residual sum along; in place."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

    for node in list(model.graph):
        if node.op_type == "Attention":
            _share_heads(node)
        elif node.op_type in WITH_RESIDUAL:
            _join_residual(node)
    model.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)


def replace(node: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one gives what it gave."""
    from onnx_ir.convenience import replace_nodes_and_values

    assert node.graph is not None
    old, result = node.outputs[0], new[-1].outputs[0]
    result.shape, result.type = old.shape, old.type
    replace_nodes_and_values(node.graph, node, [node], new, [old], [result])


def bias_behind(product: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The bias that is added to a product and to nothing else, and the addition; else None and the product."""
    uses = list(product.outputs[0].uses())
    if len(uses) == 1 and uses[0][0].op_type == "Add":
        add = uses[0][0]
        other = next(value for value in add.inputs if value is not product.outputs[0])
        if other is not None and other.is_initializer() and len(other.shape or ()) == 1:
            return other, add
    return None, product


def _share_heads(attention: ir.Node) -> None:
    """Let `Attention` share keys and values between groups of query heads itself.

    transformers repeats them, which copies the whole cache for every token; the operator needs no copy.
    """
    shared = [_before_repetition(attention.inputs[index]) for index in (1, 2)]
    if all(value is not None for value in shared):
        for index, value in enumerate(shared, start=1):
            attention.replace_input_with(index, value)


def _before_repetition(value: ir.Value | None) -> ir.Value | None:
    """What `Unsqueeze`, `Expand` and `Reshape` made more heads of; None where they did not."""
    for kind in ("Reshape", "Expand", "Unsqueeze"):
        node = _maker(value, kind)
        if node is None:
            return None
        value = node.inputs[0]
    return value


def _join_residual(norm: ir.Node) -> None:
    """One node for a residual sum and the norm behind it, which gives both."""
    import onnx_ir as ir

    add = _maker(norm.inputs[0], "Add")
    if add is None or norm.attributes["axis"].as_int() != -1 or _rank(add.outputs[0]) != 3:
        return
    one, two = add.inputs
    if one is None or two is None or one.shape != two.shape:
        return  # a bias, which is no residual
    joined = ir.node(
        WITH_RESIDUAL[norm.op_type],
        [one, two, *norm.inputs[1:]],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain=CONTRIB,
        num_outputs=4,
        name=f"{norm.name}_with_residual",
    )
    graph = norm.graph
    assert graph is not None
    graph.insert_before(norm, joined)
    for old, new in ((norm.outputs[0], joined.outputs[0]), (add.outputs[0], joined.outputs[3])):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
    for unused in joined.outputs[1:3]:
        unused.name = ""


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes a value, if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _has_factors(gemm: ir.Node) -> bool:
    """Whether it is more than `A @ B + C`."""
    factors = [gemm.attributes[name].as_float() for name in ("alpha", "beta") if name in gemm.attributes]
    turns = [gemm.attributes[name].as_int() for name in ("transA", "transB") if name in gemm.attributes]
    return any(factor != 1 for factor in factors) or any(turns)
