"""What `MatMulNBits` costs by bits, block and accuracy level: why `to_genai` packs the way it does.

    python benchmarks/onnx_block_size.py [--columns 1024] [--rows 2816] [--repeats 30]

One matrix product per configuration on one thread, interleaved; the time is the CPU time of the process (which a busy
machine disturbs less than the clock), its median over the repeats. The error is relative to the dequantized weights in
float32: it is what rounding the activations costs, the codes themselves are exact.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout import MatMulNBits

CONFIGURATIONS = [(bits, block, level) for bits in (2, 4, 8) for block in (16, 32, 64, 128, 256) for level in (4, 0)]


def session_of(nodes: list, initializers: list, columns: int, rows: int) -> onnxruntime.InferenceSession:
    """A graph `x [m, columns] -> y [m, rows]` on one thread."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "product", [x], [y], initializers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def packed_session(lattice: LatticeTensor, bits: int, block: int, level: int) -> onnxruntime.InferenceSession:
    """The lattice as one `MatMulNBits`."""
    rows, columns = lattice.codes.shape
    packed, scales = MatMulNBits(bits=bits, block=block).pack(lattice)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    tensors = [numpy_helper.from_array(packed, "codes"), numpy_helper.from_array(scales, "scales")]
    return session_of([node], tensors, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2816)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    lattice = LatticeTensor(
        codes=rng.integers(-1, 2, (arguments.rows, arguments.columns)).astype(np.int8),
        scales=rng.uniform(0.5, 1, (arguments.rows, 1)).astype(np.float32),
        group=None,
        bits=2,
        levels="ternary",
    )
    weight = numpy_helper.from_array(np.ascontiguousarray(lattice.dequantize().T), "weight")
    plain = helper.make_node("MatMul", ["x", "weight"], ["y"])
    sessions = {None: session_of([plain], [weight], arguments.columns, arguments.rows)}
    sessions |= {setting: packed_session(lattice, *setting) for setting in CONFIGURATIONS}
    inputs = {m: {"x": rng.standard_normal((m, arguments.columns)).astype(np.float32)} for m in (1, 16)}
    times: dict[tuple, list[float]] = {(setting, m): [] for setting in sessions for m in inputs}
    for _ in range(arguments.repeats):
        for (setting, m), taken in times.items():
            start = time.process_time()
            sessions[setting].run(None, inputs[m])
            taken.append((time.process_time() - start) * 1e6)
    median = {key: statistics.median(taken[1:] or taken) for key, taken in times.items()}
    versions = f"onnxruntime {onnxruntime.__version__}, {platform.machine()}"
    print(f"[m, {arguments.columns}] x [{arguments.columns}, {arguments.rows}], 1 thread, {versions}\n")
    print("| bits | block | accuracy level | us at m=1 | x fp32 | x fp32 at m=16 | bits a weight | error |")
    print("|---|---|---|---|---|---|---|---|")
    exact = sessions[None].run(None, inputs[1])[0]
    for setting in CONFIGURATIONS:
        bits, block, level = setting
        error = np.abs(sessions[setting].run(None, inputs[1])[0] - exact).max() / np.abs(exact).max()
        single, batch = (median[None, m] / median[setting, m] for m in (1, 16))
        cells = [
            *setting,
            f"{median[setting, 1]:.0f}",
            f"{single:.2f}",
            f"{batch:.2f}",
            bits + 32 / block,
            f"{error:.0e}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
