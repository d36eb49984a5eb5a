"""The pre-check of ONNX files and their external data, by the wire format: the package onnx is not asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from edgewright.errors import Unsafe
from edgewright.export.guard.files import Broken, mapped, naming, open_regular, printable
from edgewright.export.guard.onnx_tensor import MAX_NAME, Tensor, Tensors, spread
from edgewright.export.guard.protobuf import BYTES, Field, Wire, require
from edgewright.export.guard.values import check_finite

MAX_BYTES = 2**31 - 1
"""What a protocol buffer can hold; larger models have external data."""
MAX_DEPTH = 16
"""Graphs inside graphs: the bodies of If, Loop and Scan."""
MAX_METADATA_BYTES = 256 * 2**20
MAX_EXPANDED = 10_000_000
"""Nodes when every call of a local function is replaced by its body, as runtimes do."""
MAX_DENSE = 2**28
"""Elements of a sparse tensor once it is filled up."""

DOMAINS = frozenset({
    b"", b"ai.onnx", b"ai.onnx.ml", b"ai.onnx.preview", b"ai.onnx.training", b"ai.onnx.preview.training",
    b"com.microsoft", b"com.microsoft.experimental", b"com.microsoft.nchwc", b"com.ms.internal.nhwc",
    b"org.pytorch.aten", b"pkg.onnxscript.torch_lib", b"pkg.onnxscript.torch_lib.common",
})  # fmt: skip
"""Where operators may come from: all that the runtimes bring themselves. Any other needs a library of somebody's."""
CODE_OPERATORS = frozenset({b"PythonOp", b"PythonOpGrad", b"PyOp", b"TritonOp", b"EPContext", b"ExternalGradient"})
"""Operators that run Python, or machine code for an accelerator from a file."""
WEIGHT_OPERATORS = frozenset({
    b"MatMul", b"Gemm", b"MatMulNBits", b"MatMulInteger", b"GatherBlockQuantized", b"DequantizeLinear", b"Conv",
    b"LayerNormalization", b"RMSNormalization", b"SimplifiedLayerNormalization", b"SkipLayerNormalization",
    b"SkipSimplifiedLayerNormalization",
})  # fmt: skip
"""Operators whose constant inputs are weights, scales and norms, and so finite."""

_Call = tuple[bytes, bytes]
"""Domain and name of an operator or a local function."""


@dataclass(slots=True)
class _Body:
    """The nodes of a graph or function, those of its inner graphs included."""

    calls: Counter[_Call] = field(default_factory=Counter)
    places: dict[_Call, int] = field(default_factory=dict)


def check_onnx(path: Path) -> None:
    """Refuse an ONNX file that is damaged, or that reaches beyond its folder.

    Checked: size; every length of the wire format; that there is a graph with nodes and outputs; initializers and
    attributes (known type, sizes, bytes equal to shape times type, names that occur once); external data (a plain file
    name in this folder, no link, known keys, inside the file, no overlap); operators (known domains or local functions,
    none that runs code); inner graphs and local functions (depth, no recursion, no explosion); metadata; NaN in any
    constant and infinities in weights (the smallest tensors first, up to `guard/values.BUDGET` bytes). The memory that
    computing takes is not checked: a graph may ask for any amount.

    Raises:
        BadInput: EW-332 names file, place, expected and found; EW-323, a weight is not finite; EW-311, the file or a
            data file is missing.
        Unsafe: EW-331, external data lies elsewhere; EW-333, an operator needs foreign code.
    """
    size = open_regular(path)
    with naming("EW-332", "ONNX file", path):
        if not 0 < size <= MAX_BYTES:
            raise Broken("its size", f"1 to {MAX_BYTES} bytes", size)
        with mapped(path) as file:
            model = _Model(Wire(file), path)
            model.read(size)
    check_finite(spread(iter(model.constants), model.weights))


class _Model:
    """One walk over a model; what has to be known at its end."""

    def __init__(self, wire: Wire, path: Path) -> None:
        self.constants: list[Tensor] = []
        self.weights: set[bytes] = set()
        self._wire, self._path, self._tensors = wire, path, Tensors(wire, path)
        self._functions: dict[_Call, _Body] = {}
        self._metadata = 0

    def read(self, size: int) -> None:
        """Walk the whole model."""
        main = _Body()
        seen: Counter[int] = Counter()
        for each in self._wire.fields(0, size, "the model"):
            seen[each.number] += 1
            if each.number == 7:
                self._graph(each, main, 0)
            elif each.number == 25:
                self._function(each)
            elif each.number in (6, 14):
                self._count_metadata(each)
            elif each.number == 8:
                require(each, BYTES, "an operator set")
        if seen[7] != 1 or not seen[1] or not seen[8]:
            found = f"{seen[1]}, {seen[8]} and {seen[7]}"
            raise Broken("it is no whole model", "a version of the format, operator sets and one graph", found)
        self._check_calls(main)
        self._tensors.finish()

    def _graph(self, message: Field, body: _Body, depth: int) -> None:
        what = f"the graph at byte {message.value}"
        require(message, BYTES, what)
        if depth > MAX_DEPTH:
            raise Broken(what, f"at most {MAX_DEPTH} graphs inside each other", "more")
        names: set[bytes] = set()
        nodes = outputs = 0
        for each in self._wire.fields(message.value, message.end, what):
            if each.number == 1:
                nodes += 1
                self._node(each, body, depth)
            elif each.number == 5:
                self._initializer(each, names)
            elif each.number == 15:
                self._sparse(each)
            elif each.number == 12:
                outputs += 1
            elif each.number in (10, 16):
                self._count_metadata(each)
        if depth == 0 and not (nodes and outputs):
            raise Broken(what, "nodes and outputs", f"{nodes} nodes, {outputs} outputs")

    def _initializer(self, message: Field, names: set[bytes]) -> None:
        require(message, BYTES, "an initializer")
        tensor = self._tensors.read(message.value, message.end)
        if tensor.name in names or not tensor.name:
            raise Broken(f"the initializer at byte {message.value}", "a name of its own", printable(tensor.name))
        names.add(tensor.name)
        self.constants.append(tensor)

    def _node(self, message: Field, body: _Body, depth: int) -> None:
        what = f"the node at byte {message.value}"
        require(message, BYTES, what)
        inputs, operator, domain = [], b"", b""
        for each in self._wire.fields(message.value, message.end, what):
            if each.number == 1:
                inputs.append(each)
            elif each.number == 4:
                operator = self._wire.bytes(each, what, MAX_NAME)
            elif each.number == 7:
                domain = self._wire.bytes(each, what, MAX_NAME)
            elif each.number == 5:
                self._attribute(each, body, depth)
            elif each.number in (6, 9):
                self._count_metadata(each)
        if operator in CODE_OPERATORS:
            raise self._foreign(f"{what} is a {printable(operator)}, which runs code", (domain, operator))
        if operator in WEIGHT_OPERATORS:
            self.weights.update(self._wire.bytes(each, what, MAX_NAME) for each in inputs)
        call = (b"" if domain == b"ai.onnx" else domain, operator)
        body.calls[call] += 1
        body.places.setdefault(call, message.value)

    def _attribute(self, message: Field, body: _Body, depth: int) -> None:
        what = f"the attribute at byte {message.value}"
        require(message, BYTES, what)
        for each in self._wire.fields(message.value, message.end, what):
            if each.number in (5, 10):
                require(each, BYTES, what)
                self.constants.append(self._tensors.read(each.value, each.end))
            elif each.number in (6, 11):
                self._graph(each, body, depth + 1)
            elif each.number in (22, 23):
                self._sparse(each)

    def _sparse(self, message: Field) -> None:
        what = f"the sparse tensor at byte {message.value}"
        require(message, BYTES, what)
        dense = 1
        for each in self._wire.fields(message.value, message.end, what):
            if each.number in (1, 2):
                require(each, BYTES, what)
                self._tensors.read(each.value, each.end)
            elif each.number == 3:
                for size in self._wire.varints(each, what, 32):
                    dense *= size
        if dense > MAX_DENSE:
            raise Broken(f"the shape of {what}", f"at most {MAX_DENSE} elements", dense)

    def _function(self, message: Field) -> None:
        what = f"the function at byte {message.value}"
        require(message, BYTES, what)
        name = domain = b""
        body = _Body()
        for each in self._wire.fields(message.value, message.end, what):
            if each.number == 1:
                name = self._wire.bytes(each, what, MAX_NAME)
            elif each.number == 10:
                domain = self._wire.bytes(each, what, MAX_NAME)
            elif each.number == 7:
                self._node(each, body, 0)
            elif each.number == 11:
                self._attribute(each, body, 0)
            elif each.number in (8, 14):
                self._count_metadata(each)
        call = (b"" if domain == b"ai.onnx" else domain, name)
        # Overloads of one name: their bodies are taken together, so that none escapes the count.
        known = self._functions.setdefault(call, body)
        if known is not body:
            known.calls.update(body.calls)
            known.places.update(body.places)

    def _check_calls(self, main: _Body) -> None:
        """Every operator is known or a local function, and local functions neither recurse nor explode."""
        for body in (main, *self._functions.values()):
            for call, place in body.places.items():
                if call[0] not in DOMAINS and call not in self._functions:
                    raise self._foreign(f"the node at byte {place} needs a library with custom operators", call)
        calls = {call: body.calls.keys() & self._functions.keys() for call, body in self._functions.items()}
        expanded: dict[_Call, int] = {}
        try:
            for call in TopologicalSorter(calls).static_order():
                expanded[call] = _expanded(self._functions[call], expanded)
        except CycleError as error:
            cycle = printable(error.args[1][0][1])
            raise Broken("its functions", "functions that do not call themselves", cycle) from None
        if _expanded(main, expanded) > MAX_EXPANDED:
            raise Broken("its nodes once its functions are inlined", f"at most {MAX_EXPANDED}", "more")

    def _count_metadata(self, message: Field) -> None:
        self._metadata += message.end - message.value
        if message.kind == BYTES and self._metadata > MAX_METADATA_BYTES:
            raise Broken("its metadata and documentation", f"at most {MAX_METADATA_BYTES} bytes", "more")

    def _foreign(self, what: str, call: _Call) -> Unsafe:
        return Unsafe(
            "EW-333",
            f"{what}: that would run somebody's code",
            where=self._path.absolute(),
            expected="operators of ONNX and ONNX Runtime, or functions that the model defines",
            found=f"{printable(call[0])} {printable(call[1])}",
            fix="export the model again without custom operators",
        )


def _expanded(body: _Body, expanded: dict[_Call, int]) -> int:
    """Nodes of a body once its calls are inlined, counted up to one more than the limit."""
    return min(sum(count * (1 + expanded.get(call, 0)) for call, count in body.calls.items()), MAX_EXPANDED + 1)
