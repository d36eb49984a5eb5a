"""The most memory that a part of a process takes, measured: what the planner's predictions are held against."""

from __future__ import annotations

import ctypes
import gc
import importlib
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from edgewright.machine import peak_memory, resident_memory

LATE_IMPORTS = ("torch._dynamo", "transformers.models.llama.modeling_llama", "safetensors.torch")
"""Modules that a first training step imports by itself; whoever measures wants their code in the baseline."""
COMPILER = "torch._inductor.compile_fx"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """A measurement that has begun: on a GPU of what torch's allocator holds, else of the process's resident memory."""

    device: str
    baseline: int

    @staticmethod
    def begin(device: str, *, compiled: bool = False) -> PeakMemory | None:
        """Take the baseline and forget earlier peaks; None where the system does not let us."""
        for module in (*LATE_IMPORTS, COMPILER) if compiled else LATE_IMPORTS:
            importlib.import_module(module)
        gc.collect()
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return PeakMemory(device=device, baseline=torch.cuda.memory_allocated())
        _give_back()
        baseline = resident_memory()
        return PeakMemory(device=device, baseline=baseline) if baseline is not None and _forget_peak() else None

    def allowing_for_compiler(self) -> PeakMemory:
        """The same, with the compiler's code in the baseline."""
        before = resident_memory()
        importlib.import_module(COMPILER)
        after = resident_memory()
        if self.device == "cuda" or before is None or after is None:
            return self
        return replace(self, baseline=self.baseline + max(0, after - before))

    def bytes(self) -> int:
        """The peak since then, above the baseline."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() - self.baseline
        return peak_memory() - self.baseline


def _give_back() -> None:
    """Let glibc return freed memory, so that it is not in the baseline and then used for nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    """Linux starts VmHWM anew for a process that writes 5 here."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
