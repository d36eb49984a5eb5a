"""What optimizers cost: time of an update against fused AdamW on the same tensors, and bytes of their state.

    python benchmarks/optimizer_speed.py [--repeats 3] [--steps 20]

Time: the Llama of 20.5M parameters of `training_speed.py` on a CPU, a Llama of 1B on a GPU. Every optimizer updates
the same tensors with the same gradients, each in a process of its own, in turn; the training step that its share is
of has 4,096 tokens on a CPU. Those that refresh a projection now and then are timed in the steps between, and the
refresh by itself, divided by the steps between two of them ("amortised").
State: bytes per parameter of the matrices that the optimizer owns, for the shapes of a Llama of 1B, counted from the
state of one decoder block after a step (blocks are alike).
Bars: CPU: the update <= 10 % of a training step. GPU: APOLLO <= 1.6x, APOLLO-Mini <= 1.3x of fused AdamW. State:
APOLLO at a quarter of the rank <= 1.1 bytes (bf16 moments), Mini <= 0.02, 8-bit AdamW <= 2.05.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

from common import header, interleaved, median_line, worker
from training_speed import BATCH, LENGTH, WARM, model, ours

from edgewright.optim.adamw import AdamWConfig
from edgewright.optim.adamw_8bit import AdamW8bitConfig
from edgewright.optim.config import OptimizerConfigBase
from edgewright.optim.muon import MuonConfig
from edgewright.optim.projected_config import (
    ApolloConfig,
    ApolloMiniConfig,
    FiraConfig,
    GaLoreConfig,
    GradNormLoRPConfig,
    ProjectedConfig,
)
from edgewright.optim.q_galore_config import QGaLoreConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZERS: dict[str, OptimizerConfigBase] = {
    "adamw": AdamWConfig(),
    "apollo": ApolloConfig(),
    "apollo_mini": ApolloMiniConfig(),
    "galore": GaLoreConfig(),
    "fira": FiraConfig(),
    "q_galore": QGaLoreConfig(),
    "gradnorm_lorp": GradNormLoRPConfig(),
    "muon": MuonConfig(),
    "adamw_8bit": AdamW8bitConfig(),
}
GPU_BARS = {"apollo": 1.6, "apollo_mini": 1.3}
"""Most of fused AdamW's time."""
CPU_BAR = 0.10
"""Most of a training step, for APOLLO and Mini; the others are printed."""
STATES: dict[str, tuple[OptimizerConfigBase, float | None]] = {
    "adamw": (AdamWConfig(), None),
    "apollo, bf16 states": (ApolloConfig(states="bf16"), 1.1),
    "apollo, int8 states": (ApolloConfig(states="int8"), None),
    "apollo_mini, bf16 states": (ApolloMiniConfig(states="bf16"), 0.02),
    "galore, bf16 states": (GaLoreConfig(states="bf16"), None),
    "galore, int8 states": (GaLoreConfig(states="int8"), None),
    "q_galore": (QGaLoreConfig(), None),
    "adamw_8bit": (AdamW8bitConfig(), 2.05),
}
"""Settings, and the most bytes per parameter."""


def billion(layers: int) -> PreTrainedModel:
    """A Llama of 1.3B with 24 layers (GaLore's shapes: hidden 2048, intermediate 5461), with so many of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=5461, num_hidden_layers=layers, num_attention_heads=32
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config)


def synchronized() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, steps: int) -> None:
    """The worker: milliseconds of an update; the first, and every one that refreshes a projection, apart."""
    import torch

    network = billion(24) if torch.cuda.is_available() else model()
    optimizer = OPTIMIZERS[name].build(network)
    gradients = [torch.randn_like(p) * 1e-3 for p in network.parameters()]
    times = []
    for _ in range(steps + 1):
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        started = synchronized()
        optimizer.step()
        times.append(synchronized() - started)
    print(json.dumps({"ms": 1e3 * statistics.median(times[1:]), "first_ms": 1e3 * times[0]}))


def measure_training() -> None:
    """The worker for a whole training step with AdamW."""
    seconds = ours(8, [])[WARM:]
    print(json.dumps({"ms": 1e3 * statistics.median(seconds)}))


def measure_state(key: str) -> None:
    """The worker: bytes of state per parameter of one decoder block's matrices, those of one shape being alike."""
    import torch

    config = STATES[key][0]
    block = billion(1)
    alike: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2 and "layers." in name:
            alike.setdefault(parameter.shape, []).append(parameter)
    matrices = [parameters[0] for parameters in alike.values()]
    owned = {id(parameter) for parameter in matrices}
    for parameter in block.parameters():
        parameter.requires_grad_(id(parameter) in owned)
    optimizer = config.build(block)
    for parameter in matrices:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    states = optimizer.state_dict()["state"]
    order = [number for group in optimizer.state_dict()["param_groups"] for number in group["params"]]
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = total = 0
    for number, parameter in zip(order, owners, strict=True):
        times = len(alike[parameter.shape])
        held += times * sum(count(value) for value in states[number].values())
        total += times * parameter.numel()
    print(json.dumps({"bytes_per_parameter": held / total}))


def count(value: object) -> int:
    """Bytes of the tensors in a value of a state, whatever holds them; bitsandbytes nests them in dictionaries."""
    import torch

    if isinstance(value, dict):
        return sum(count(inner) for inner in value.values())
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def report(times: dict[str, dict[str, list[float]]], training: dict[str, float]) -> bool:
    import torch

    on_gpu, missed = torch.cuda.is_available(), False
    rest = training["ms"] - statistics.median(times["adamw"]["ms"])
    for name, figures in times.items():
        ratio = statistics.median(m / a for m, a in zip(figures["ms"], times["adamw"]["ms"], strict=True))
        config = OPTIMIZERS[name]
        every = config.update_proj_gap if isinstance(config, ProjectedConfig) else None
        refresh = statistics.median(figures["first_ms"]) - statistics.median(figures["ms"])
        amortised = f", refresh {refresh:,.0f} ms, amortised {refresh / every:,.1f} ms a step" if every else ""
        line = f"{name:14} {median_line(figures['ms'], 'ms an update', 1)}   {ratio:.2f}x fused AdamW{amortised}"
        if on_gpu:
            missed |= ratio > GPU_BARS.get(name, float("inf"))
            print(line + (f" (bar {GPU_BARS[name]})" if name in GPU_BARS else ""))
            continue
        mine = statistics.median(figures["ms"])
        share = mine / (rest + mine)
        missed |= name in GPU_BARS and share > CPU_BAR
        print(f"{line}; {share:.1%} of a training step" + (" (bar 10 %)" if name in GPU_BARS else ""))
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        kind, _, name = arguments.worker.partition(":")
        {
            "time": lambda: measure(name, arguments.steps),
            "state": lambda: measure_state(name),
            "training": measure_training,
        }[kind]()
        return
    header()
    missed = False
    print("bytes of state per parameter, the matrices of a decoder block of Llama 1B:")
    for name, (_, bar) in STATES.items():
        found = worker(__file__, "--worker", f"state:{name}")["bytes_per_parameter"]
        missed |= bar is not None and found > bar
        print(f"{name:26} {found:.4f}" + (f" (bar {bar})" if bar else ""))
    training = worker(__file__, "--worker", "training:")
    times = interleaved(
        list(OPTIMIZERS),
        lambda name: worker(__file__, "--worker", f"time:{name}", "--steps", str(arguments.steps)),
        arguments.repeats,
    )
    print(f"a training step of {BATCH * LENGTH:,} tokens with AdamW: {training['ms']:,.0f} ms")
    sys.exit(report(times, training) or missed)


if __name__ == "__main__":
    main()
