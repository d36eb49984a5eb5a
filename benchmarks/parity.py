"""Exactness of what is exported: fp32 files against torch, ternary files against the training forward.

    python benchmarks/parity.py [--stories DIR]

fp32 ONNX and F32 GGUF (F32 cache) of the shipped teacher, and of stories260K where it is there: largest difference
of two logits (bar 1e-3), same top-1 (bar 100 %), greedy 64 tokens. Ternary files of the demo's student (`runs/demo`, or
`--student DIR`):
codes and scales bit for bit, mean KL (bar 1e-3 where the runtime computes in float32; else as measured), bits per
linear weight (bars 2.07 in TQ2_0, 2.25 in ONNX).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import ROOT, header

from edgewright import export
from edgewright.export.layout import FORMATS
from edgewright.export.source import load_source


def lossless(model: Path, work: Path) -> bool:
    """Export and compare one model in float32; true when every bar is met."""
    good = True
    for to, quant in (("gguf", "f32"), ("genai", "fp32")):
        parity = export(model, to=to, quant=quant, out=work / f"{model.name}-{to}").parity
        met = parity["max_abs_diff"] <= 1e-3 and parity["top1_agreement"] == 1.0 and parity["greedy_identity"]
        good &= met and parity["lattice_identity"]
        print(
            f"{model.name:12} {to:6} {quant:8} max |diff| {parity['max_abs_diff']:.1e}   "
            f"top-1 {parity['top1_agreement']:.1%}   greedy {'equal' if parity['greedy_identity'] else 'DIFFERS'}   "
            f"weights {'bit-exact' if parity['lattice_identity'] else 'DIFFER'}"
        )
    return good


def ternary(model: Path, work: Path) -> bool:
    """Export the ternary student; true when codes and scales are exact and the files are as narrow as promised."""
    source = load_source(model)
    good = True
    cases = (("gguf", "tq2_0", 2.07), ("gguf", "tq1_0", 1.69), ("genai", "ternary", 2.25))
    for to, quant, bar in cases:
        artifact = export(model, to=to, quant=quant, out=work / f"student-{quant}")
        parity = artifact.parity
        bits = FORMATS[quant].bits_per_weight if quant in FORMATS else genai_bits(artifact.path, source)
        good &= parity["lattice_identity"] and bits <= bar and not artifact.fallbacks
        print(
            f"student      {to:6} {quant:8} weights {'bit-exact' if parity['lattice_identity'] else 'DIFFER'}   "
            f"KL {parity['kl']:.1e}   same top-1 {parity['top1_agreement']:.1%}   "
            f"{bits:.4f} bits per linear weight (bar {bar})   {len(artifact.fallbacks)} fallbacks"
        )
    return good


def genai_bits(folder: Path, source) -> float:  # noqa: ANN001
    """Stored bits of codes and scales of the ternary matrices, over their weights; read from the graph."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer}
    nodes = [
        n
        for n in model.graph.node
        if n.op_type == "MatMulNBits" and any(a.name == "bits" and a.i == 2 for a in n.attribute)
    ]
    attributes = [{a.name: a.i for a in node.attribute} for node in nodes]
    weights = sum(a["N"] * a["K"] for a in attributes)
    assert weights == sum(tensor.codes.size for tensor in source.lattice.values())
    return 8 * sum(stored[name] for node in nodes for name in node.input[1:] if name) / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, default=ROOT.parent / "shared/data/stories260K")
    parser.add_argument("--student", type=Path, default=ROOT / "runs/demo/stages/student/model")
    arguments = parser.parse_args()
    header()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        good = lossless(ROOT / "examples/teacher", work)
        if arguments.stories.exists():
            good &= lossless(arguments.stories, work)
        if arguments.student.exists():
            good &= ternary(arguments.student, work)
        else:
            print("the ternary student is not there: make demo first")
    sys.exit(not good)


if __name__ == "__main__":
    main()
