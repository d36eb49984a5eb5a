"""Running out of memory: what counts as that, what is told, and the smaller micro-batch that may fit.

Only an allocation that fails can be caught. Where the system hands out more memory than it has (Linux as a rule does),
it ends the process instead; `budget.memory` keeps away from that.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edgewright.errors import OutOfResources

PHRASES = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "ALLOC_FAILED")
"""How torch's allocator of host memory, and cuBLAS and its kin, say that there is none left: in a RuntimeError."""


def shortage(error: RuntimeError | MemoryError) -> str | None:
    """In one line what could not be had; None for an error of another kind."""
    found = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in str(error) for phrase in PHRASES)
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__) if found else None


def halved(size: int) -> int:
    """The next micro-batch to try."""
    return -(-size // 2)


def give_back(*, compiled: bool) -> None:
    """Hand freed memory back to the device, and forget what was compiled for another size."""
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_allocator(memory: int | None) -> None:
    """Let torch's allocator on the GPU take no more than a budget, so that what was planned too low is noticed.

    On a CPU there is nothing to limit it by, and the plan alone keeps to the budget.

    Args:
        memory: bytes, with what the CUDA context takes; None: all that the GPU has.
    """
    from edgewright.planner.devices import CUDA_CONTEXT

    if not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    share = 1.0 if memory is None else min(1.0, max(0, memory - CUDA_CONTEXT) / total)
    torch.cuda.set_per_process_memory_fraction(share)


@contextmanager
def memory_errors(stage: str) -> Iterator[None]:
    """Around all of a stage: memory that runs out elsewhere than in a micro-batch is an error that says so, too.

    Raises:
        OutOfResources: EW-751.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        what = shortage(error)
        if what is None:
            raise
    raise OutOfResources(
        "EW-751",
        f"memory ran out in stage {stage}, where a smaller micro-batch does not help",
        expected="room for the model, the optimizer's state, and the teacher where there is one",
        found=what,
        fix="an optimizer with a smaller state, training.offload_optimizer on a GPU, training.weights: bf16, or a "
        "smaller model or teacher; edgewright plan says what each of them saves",
    )


def no_memory_left(what: str, decisions: dict[str, Any], why_no_smaller: str | None = None) -> OutOfResources:
    """EW-751.

    Args:
        what: from `shortage`.
        decisions: those of the run; what they have not used up is the advice.
        why_no_smaller: why the micro-batch is not halved, where it could be.
    """
    fixes = [
        advice
        for name, advice in (
            ("gradient_checkpointing", "training.gradient_checkpointing: true"),
            ("gradient_release", "training.gradient_release: true"),
            ("offload_optimizer", "training.offload_optimizer: true"),
        )
        if not decisions[name] and not (name == "offload_optimizer" and decisions["device"] == "cpu")
    ]
    if decisions["weights"] == "fp32":
        fixes.append("training.weights: bf16")
    fixes += ["an optimizer with a smaller state (edgewright ls optimizers)", "a shorter sequence_length"]
    if why_no_smaller is not None:
        fixes.insert(0, why_no_smaller)
    return OutOfResources(
        "EW-751",
        f"memory ran out with a micro-batch of {decisions['micro_batch']}",
        expected="a training step that fits",
        found=what,
        fix="; or ".join(fixes) + "; edgewright plan says what each of them saves",
    )
