"""Peak extra memory and speed of the chunked loss against the naive one.

    python benchmarks/loss_memory.py [--repeats 3]

8,192 tokens x 32,000 vocabulary, hidden 512, float32, forward and backward; every measurement in a process of its own,
in turn. Extra memory = growth of the peak resident size over the loss, less the head's own gradient. Bars: <= 15 % of
the float32 logits' size, >= 0.9x the naive loss's speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from common import header, interleaved, median_line, worker

TOKENS, VOCABULARY, HIDDEN = 8192, 32000, 512
LOGITS = TOKENS * VOCABULARY * 4


def measure(name: str) -> None:
    """The worker: extra peak bytes of the first call, seconds of the second."""
    import torch
    from torch.nn import functional as F

    from edgewright.chunked import Head, chunked_loss, cross_entropy_rule
    from edgewright.machine import peak_memory, resident_memory

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).mul_(0.02).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,))
    (torch.randn(256, 256) @ torch.randn(256, 256)).sum()  # the math library's own buffers

    def naive() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels)

    def chunked() -> torch.Tensor:
        rule = cross_entropy_rule(labels, 1 / TOKENS)
        return chunked_loss(hidden, Head(weight, None), rule, parts=1, dtype=torch.float32)[0]

    loss = {"naive": naive, "chunked": chunked}[name]
    before = resident_memory()
    assert before is not None
    loss().backward()
    extra = peak_memory() - before - weight.numel() * 4
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    loss().backward()
    print(json.dumps({"extra": extra, "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker)
        return
    header()
    results = interleaved(["chunked", "naive"], lambda name: worker(__file__, "--worker", name), arguments.repeats)
    for name, figures in results.items():
        mib = [value / 2**20 for value in figures["extra"]]
        print(f"{name:8} extra {median_line(mib, 'MiB')}   {median_line(figures['seconds'], 's', 2)}")
    share = statistics.median(results["chunked"]["extra"]) / LOGITS
    pairs = zip(results["naive"]["seconds"], results["chunked"]["seconds"], strict=True)
    speed = statistics.median(a / b for a, b in pairs)
    print(f"extra memory: {share:.1%} of the logits' {LOGITS / 2**20:,.0f} MiB (bar 15 %)")
    print(f"speed: {speed:.2f}x the naive loss (bar 0.9)")
    sys.exit(share > 0.15 or speed < 0.9)


if __name__ == "__main__":
    main()
