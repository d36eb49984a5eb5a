"""What methods cost and save in training: time of a step and memory, against dense training of the same model.

    python benchmarks/method_speed.py [--repeats 3] [--steps 12] [--only METHOD ...]

The Llama of 20.5M parameters of `training_speed.py`, its batch and precision. Every measurement is a process of its
own, in turn; compilation and the first steps are not counted. Memory: the bytes of weights, gradients and Adam's state
after a step, against the formula, 16 bytes for every number that the method says it trains; what it keeps in buffers
beside them is printed by itself.
Bars: low rank at a quarter of the full rank <= 0.75x the time of a dense step, ternary <= 1.15x; memory within 5 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common import header, interleaved, median_line, worker
from training_speed import BATCH, LENGTH, WARM, model, ours

from edgewright.compress.lost import LostConfig
from edgewright.compress.lowrank import LowRankConfig
from edgewright.compress.ternary import TernaryConfig
from edgewright.method import Method

if TYPE_CHECKING:
    import torch

METHODS: dict[str, LowRankConfig | LostConfig | TernaryConfig | None] = {
    "dense": None,
    "lowrank": LowRankConfig(rank_fraction=0.25),
    "lost": LostConfig(rank_fraction=0.25),
    "ternary": TernaryConfig(),
}
TIME_BARS = {"lowrank": 0.75, "ternary": 1.15}
"""Most of a step over a dense one."""
MEMORY_BAR = 0.05
BYTES_PER_NUMBER = 16
"""A weight, its gradient and two moments, in float32."""


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def methods_of(name: str) -> list[Method]:
    config = METHODS[name]
    return [] if config is None else [config.build()]


def memory(name: str) -> dict[str, float]:
    """Bytes of one real step, and what the formula says."""
    import torch

    from edgewright.objective import ModelInputs, NextToken
    from edgewright.optim.adamw import AdamWConfig
    from edgewright.trainer import TrainingModule

    network, methods = model(), methods_of(name)
    trained = sum(parameter.numel() for parameter in network.parameters())
    for method in methods:
        method.prepare(network)
        numbers = method.describe(network).numbers
        trained += int(numbers["parameters"] - numbers["weights"])
    optimizer = AdamWConfig(learning_rate=1e-3).build(network)
    ids = torch.randint(1, network.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
    TrainingModule(network, NextToken(), torch.bfloat16)(inputs, 1 / LENGTH)[0].backward()
    optimizer.step()
    parameters = list(network.parameters())
    return {
        "weights": size(parameters),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "adam": size(tensor for state in optimizer.state.values() for tensor in state.values()),
        "buffers": size(network.buffers()),
        "formula": BYTES_PER_NUMBER * trained,
    }


def measure(name: str, steps: int) -> None:
    """The worker: print milliseconds of a step, and bytes."""
    held = memory(name)
    seconds = ours(steps, methods_of(name))[WARM:]
    print(json.dumps({"ms": 1e3 * statistics.median(seconds), **held}))


def report(results: dict[str, dict[str, list[float]]]) -> bool:
    """Print a line per method; whether a bar was missed."""
    missed = False
    for name, figures in results.items():
        pairs = zip(figures["ms"], results["dense"]["ms"], strict=True)
        ratio = statistics.median(mine / dense for mine, dense in pairs)
        held = {kind: figures[kind][0] / 1e6 for kind in ("weights", "gradients", "adam", "buffers", "formula")}
        total = held["weights"] + held["gradients"] + held["adam"]
        off = total / held["formula"] - 1
        missed |= ratio > TIME_BARS.get(name, float("inf")) or abs(off) > MEMORY_BAR
        bar = f" (bar {TIME_BARS[name]})" if name in TIME_BARS else ""
        print(f"{name:8} {median_line(figures['ms'], 'ms a step')}   {ratio:.2f}x dense{bar}")
        print(
            f"{'':8} weights {held['weights']:.1f} + gradients {held['gradients']:.1f} + Adam {held['adam']:.1f} = "
            f"{total:.1f} MB, formula {held['formula']:.1f} MB ({off:+.1%}, bar 5 %); buffers {held['buffers']:.1f} MB"
        )
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=[name for name in METHODS if name != "dense"], metavar="METHOD")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.steps)
        return
    header()
    print(f"batch {BATCH} x {LENGTH}")
    results = interleaved(
        ["dense", *arguments.only] if arguments.only else list(METHODS),
        lambda name: worker(__file__, "--worker", name, "--steps", str(arguments.steps)),
        arguments.repeats,
    )
    sys.exit(report(results))


if __name__ == "__main__":
    main()
