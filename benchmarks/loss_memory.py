"""Peak extra memory and speed of the chunked losses against whole logits.

    python benchmarks/loss_memory.py [--case next_token distill_32k distill_128k] [--repeats 3] [--memory-only]

Forward and backward in float32; every measurement in a process of its own, in turn. Extra memory = growth of the peak
resident size over the loss, less the head's own gradient.

- next_token: 8,192 tokens x 32,000, hidden 512, against torch's cross-entropy of whole logits.
  Bars: <= 15 % of the float32 logits' size, >= 0.9x its speed.
- distill_32k, distill_128k: forward KL with temperature at 4,096 tokens x 32,000 and x 128,000, student's hidden size
  512, teacher's 1,024, against what TRL's GKD trainer computes: whole logits of both heads, log-softmax of both, and
  kl_div of every element. Bars: <= 15 % and <= 8 % of its extra memory, >= 0.9x its speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from common import header, interleaved, median_line, worker

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Case:
    """Sizes, and the bars."""

    tokens: int
    vocabulary: int
    hidden: int
    teacher_hidden: int | None
    share: float
    """Of the memory that it is compared with."""
    speed: float = 0.9

    @property
    def logits(self) -> int:
        """Bytes."""
        return self.tokens * self.vocabulary * 4


CASES = {
    "next_token": Case(8192, 32_000, 512, None, 0.15),
    "distill_32k": Case(4096, 32_000, 512, 1024, 0.15),
    "distill_128k": Case(4096, 128_000, 512, 1024, 0.08),
}


def measure(name: str, way: str, *, memory_only: bool) -> None:
    """The worker: extra peak bytes of the first call, seconds of the second."""
    import torch

    from edgewright.allocator import keep_freed_memory
    from edgewright.machine import peak_memory, resident_memory

    keep_freed_memory()
    torch.manual_seed(0)
    case = CASES[name]
    hidden = torch.randn(case.tokens, case.hidden, requires_grad=True)
    weight = torch.randn(case.vocabulary, case.hidden).mul_(0.02).requires_grad_()
    (torch.randn(256, 256) @ torch.randn(256, 256)).sum()  # the math library's own buffers
    losses = _next_token(case, hidden, weight) if case.teacher_hidden is None else _distill(case, hidden, weight)
    loss = losses[way]
    before = resident_memory()
    assert before is not None
    loss().backward()
    figures = {"extra": peak_memory() - before - weight.numel() * 4}
    if not memory_only:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss().backward()
        figures["seconds"] = time.perf_counter() - start
    print(json.dumps(figures))


def _next_token(case: Case, hidden, weight) -> dict[str, Callable]:  # noqa: ANN001 - torch is imported by workers alone
    import torch
    from torch.nn import functional as F

    from edgewright.chunked import Head, chunked_loss, cross_entropy_rule

    labels = torch.randint(case.vocabulary, (case.tokens,))

    def whole() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels)

    def chunked() -> torch.Tensor:
        rule = cross_entropy_rule(labels, 1 / case.tokens)
        return chunked_loss(hidden, Head(weight, None), rule, parts=1, dtype=torch.float32)[0]

    return {"whole": whole, "chunked": chunked}


def _distill(case: Case, hidden, weight) -> dict[str, Callable]:  # noqa: ANN001
    import torch
    from torch.nn import functional as F

    from edgewright.chunked import Head, chunked_loss
    from edgewright.compress.loss_config import ForwardKLConfig
    from edgewright.compress.loss_rule import distillation_rule
    from edgewright.compress.targets import HeadLogits

    assert case.teacher_hidden is not None
    teacher_hidden = torch.randn(case.tokens, case.teacher_hidden)
    teacher_weight = torch.randn(case.vocabulary, case.teacher_hidden).mul_(0.02)
    labels = torch.randint(case.vocabulary, (case.tokens,))

    def whole() -> torch.Tensor:
        student = F.linear(hidden, weight)[None]
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_weight)[None]
        ours = F.log_softmax(student / TEMPERATURE, dim=-1)
        theirs = F.log_softmax(teacher / TEMPERATURE, dim=-1)
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True)
        return divergence.sum() / case.tokens

    def chunked() -> torch.Tensor:
        losses = [ForwardKLConfig(temperature=TEMPERATURE).build()]
        targets = HeadLogits(teacher_hidden, Head(teacher_weight, None), torch.float32)
        rule = distillation_rule(losses, [1.0], labels, targets, scale=1 / case.tokens)
        return chunked_loss(hidden, Head(weight, None), rule, parts=1, dtype=torch.float32)[0]

    return {"whole": whole, "chunked": chunked}


def compare(name: str, repeats: int, *, memory_only: bool) -> bool:
    """Measure a case, print it, and say whether it holds its bars."""
    case, extra = CASES[name], ["--memory-only"] if memory_only else []
    results = interleaved(
        ["chunked", "whole"], lambda way: worker(__file__, "--worker", name, "--way", way, *extra), repeats
    )
    print(f"{name}: {case.tokens:,} tokens x {case.vocabulary:,}, one tensor of logits {case.logits / 2**20:,.0f} MiB")
    for way, figures in results.items():
        mib = [value / 2**20 for value in figures["extra"]]
        seconds = "" if memory_only else "   " + median_line(figures["seconds"], "s", 2)
        print(f"  {way:8} extra {median_line(mib, 'MiB')}{seconds}")
    ours = statistics.median(results["chunked"]["extra"])
    theirs = case.logits if case.teacher_hidden is None else statistics.median(results["whole"]["extra"])
    what = "the logits' size" if case.teacher_hidden is None else "whole logits' extra memory"
    print(f"  extra memory: {ours / theirs:.1%} of {what} (bar {case.share:.0%})")
    good = ours / theirs <= case.share
    if not memory_only:
        pairs = zip(results["whole"]["seconds"], results["chunked"]["seconds"], strict=True)
        speed = statistics.median(a / b for a, b in pairs)
        print(f"  speed: {speed:.2f}x whole logits (bar {case.speed})")
        good = good and speed >= case.speed
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-only", action="store_true", help="where a time could not be trusted")
    parser.add_argument("--worker", choices=list(CASES))
    parser.add_argument("--way", choices=["whole", "chunked"])
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.way, memory_only=arguments.memory_only)
        return
    header()
    good = [compare(name, arguments.repeats, memory_only=arguments.memory_only) for name in arguments.case]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
