"""How a stage trains: the recipe's `training:` and `budget:`, and what is decided at run time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.sizes import MemorySize


class BudgetConfig(BaseModel):
    """How long a stage trains: exactly one of max_steps and max_tokens; and the memory that it may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Training tokens, rounded up to whole steps."""
    memory: MemorySize | None = None
    """Such as 8GB: the cheapest of the settings left open that fits is taken, and printed. null: no limit."""

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetConfig:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of max_steps and max_tokens; an override of null takes the other away")
        return self

    def steps(self, tokens_per_step: int) -> int:
        """Optimizer steps of the stage."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return -(-self.max_tokens // tokens_per_step)


Sharding = Literal["none", "full"]


class TrainingConfig(BaseModel):
    """The loop's settings, named as in Hugging Face's TrainingArguments where those have them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    per_device_train_batch_size: int = Field(default=8, gt=0)
    """Sequences per micro-batch, which is what a device takes at once."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Micro-batches per optimizer step, those of all processes together, so that a run takes the same steps on any
    number of them; the mean is over all their tokens."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient's global norm to this; null: no clipping."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type. auto: bf16 where the hardware multiplies it natively."""
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    """What the trained weights are stored in. bf16 and int8 (linear layers of attention and mlp, in groups) are written
    with stochastic rounding, and have no float32 copy."""
    gradient_checkpointing: bool | None = None
    """Keep only the inputs of each decoder block, and compute the rest again in the backward pass: the same gradients,
    a third more work. null: off, unless budget.memory needs it."""
    gradient_release: bool | None = None
    """Step each parameter inside the backward pass, so that the gradients never all exist. Needs one micro-batch per
    step and max_grad_norm: null. null: off, unless budget.memory needs it."""
    offload_optimizer: bool | None = None
    """Keep the optimizer's state in host memory, and bring it to the GPU parameter by parameter. null: off, unless
    budget.memory needs it."""
    auto_find_batch_size: bool = True
    """Where memory runs out halve the micro-batch, and run the same global batch again."""
    sharding: Sharding = "none"
    """Under torchrun: none copies the weights to every process (DDP), full cuts weights, gradients and optimizer state
    up among them (FSDP2). One process alone has all of them either way."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on when the run is long enough to earn its start-up cost back."""
    logging_steps: int = Field(default=10, gt=0)
    """Print a line every so many steps (metrics.jsonl gets every step)."""
    eval_steps: int = Field(default=200, ge=0)
    """Held-out loss every so many steps and at the end; 0: only at the end."""
    eval_sequences: int = Field(default=64, gt=0)
    """Held-out sequences for that loss."""
    save_steps: int = Field(default=500, gt=0)
    """A checkpoint every so many steps."""
    save_minutes: float = Field(default=5.0, gt=0)
    """And whenever the last one is older than this."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints kept."""

    @model_validator(mode="after")
    def _releasable(self) -> TrainingConfig:
        if self.gradient_release and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "gradient_release needs gradient_accumulation_steps: 1, since a gradient that is stepped and freed "
                "cannot be added to"
            )
        if self.gradient_release and self.max_grad_norm is not None:
            raise ValueError(
                "gradient_release needs max_grad_norm: null, since the global norm is known only when all gradients "
                "have existed"
            )
        return self

    @property
    def global_batch(self) -> int:
        """Sequences of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def tokens_per_step(self, sequence_length: int) -> int:
        """Tokens of a global batch."""
        return self.global_batch * sequence_length


COMPILE_COST_SECONDS = 40.0
"""Cold start of torch.compile on two cores (measured: 21-30 s for each of two graphs' worth of kernels)."""
COMPILE_GAIN = 0.14
"""Share of the step time that it saves on a CPU (measured: 1.15x to 1.18x)."""
CPU_FLOPS_PER_CORE = {"float32": 60e9, "bfloat16": 200e9}
"""Rates of real training steps, only used to guess whether compiling pays. A guess by formula and not by a clock, so
that the same recipe takes the same decision in every run on a machine."""


def decide(settings: TrainingConfig, *, parameters: int, tokens: int, processes: int = 1) -> dict[str, Any]:
    """Device, compute type, compilation and threads, by rules that depend on the machine and the recipe alone.

    Args:
        processes: how many train together. Modules that are cut up among them are not compiled.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    precision = {"bf16": "bfloat16", "fp32": "float32", "auto": _fast_precision(device)}[settings.precision]
    seconds = 6.0 * parameters * tokens / (CPU_FLOPS_PER_CORE[precision] * threads * processes)
    sharding = settings.sharding if processes > 1 else "none"
    pays = device == "cpu" and sharding == "none" and seconds * COMPILE_GAIN > COMPILE_COST_SECONDS
    compile_model = {"on": True, "off": False, "auto": pays and _compiler_works()}[settings.compile]
    return {
        "device": device,
        "precision": precision,
        "compile": compile_model,
        "threads": threads,
        "processes": processes,
        "sharding": sharding,
        "torch": torch.__version__,
        **memory_decisions(settings),
    }


def memory_decisions(settings: TrainingConfig) -> dict[str, Any]:
    """The memory settings as the recipe has them, before anything changes what it left open."""
    return {
        "micro_batch": settings.per_device_train_batch_size,
        "weights": settings.weights,
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "gradient_release": bool(settings.gradient_release),
        "offload_optimizer": bool(settings.offload_optimizer),
    }


def free_decisions(settings: TrainingConfig) -> dict[str, Any]:
    """Those that change no result, where the recipe fixes them: another choice may be made when a run goes on."""
    fixed = {
        "gradient_checkpointing": settings.gradient_checkpointing,
        "offload_optimizer": settings.offload_optimizer,
    }
    return {name: value for name, value in fixed.items() if value is not None}


def _fast_precision(device: str) -> str:
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def _compiler_works() -> bool:
    """Whether inductor finds a C++ compiler on this machine."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return False
    return True


class Interrupted(BaseException):
    """A signal stopped the run; everything done so far can be gone on from. Like KeyboardInterrupt, no Exception."""

    def __init__(self, number: int, step: int | None) -> None:
        self.signal = number
        self.exit_code = 128 + number
        self.step = step
        name = signal.Signals(number).name
        where = "" if step is None else f" at step {step}; a full checkpoint was written"
        super().__init__(f"stopped by {name}{where}")


class StopRequest:
    """Whether SIGINT or SIGTERM asked the run to stop. A second signal ends the process at once.

    Inside `deferred()` a signal only sets `requested`, and the loop stops between micro-batches; elsewhere it raises
    `Interrupted` on the spot, which every atomic write survives.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False

    @property
    def requested(self) -> bool:
        return self.number is not None

    def join(self) -> None:
        """Another process of the run was asked to stop, and so all do."""
        self.number = self.number or signal.SIGTERM

    def raise_interrupted(self, step: int | None) -> NoReturn:
        """Leave the loop."""
        assert self.number is not None
        raise Interrupted(self.number, step)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The block polls `requested` by itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle both signals inside the block (only possible in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.number = number
        if not self._deferred:
            self.raise_interrupted(None)
