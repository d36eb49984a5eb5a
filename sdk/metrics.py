"""Progress: `metrics.jsonl` is the truth; a live panel on a terminal, plain lines without one."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgewright.checkpoint import TrainState
from edgewright.machine import memory_in_use


class Metrics:
    """Append-only JSON lines, cut back to the checkpoint's step on resume so that the curve has no doubles.

    Args:
        path: metrics.jsonl.
        name: the stage's, for the lines people read.
        logging_steps: print every so many steps.
        save_steps: a checkpoint every so many steps, for the time that is left until the next.
        say: where plain lines go.
        silent: whether another process measures and writes.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        logging_steps: int,
        save_steps: int,
        say: Callable[[str], None],
        silent: bool = False,
    ) -> None:
        self.path = path
        self.name = name
        self.logging_steps = logging_steps
        self.save_steps = save_steps
        self.say = say
        self.silent = silent
        self.total_steps = 0
        self._panel: Any = None
        self._recent: list[tuple[int, float]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drop measurements after `step` (and a half-written last line); events stay."""
        if self.silent or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if "event" in entry or entry["step"] <= step:
                kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def step(
        self,
        state: TrainState,
        *,
        loss: float,
        parts: dict[str, float],
        lr: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """One optimizer step; loss in nats per token."""
        self._recent = [*self._recent[-19:], (tokens, seconds)]
        rate = sum(t for t, _ in self._recent) / max(1e-9, sum(s for _, s in self._recent))
        memory = memory_in_use()
        entry: dict[str, object] = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            **(parts if len(parts) > 1 else {}),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": tokens / seconds,
            "memory": memory,
            "time": round(time.time(), 3),
        }
        self._append(entry)
        left = (self.total_steps - state.step) * self._step_seconds()
        until_save = (self.save_steps - state.step % self.save_steps) * self._step_seconds()
        line = (
            f"{self.name}: step {state.step}/{self.total_steps}  loss {loss:.4f}  lr {lr:.2e}  "
            f"{rate:,.0f} tokens/s  {memory / 2**20:,.0f} MiB  {_duration(left)} left, "
            f"{_duration(min(left, until_save))} to the next checkpoint"
        )
        if self._panel is not None:
            self._panel.update(self.name, state.step, self.total_steps, line)
        elif state.step % self.logging_steps == 0 or state.step == self.total_steps:
            self.say(line)

    def _step_seconds(self) -> float:
        """Mean over the last steps."""
        return sum(seconds for _, seconds in self._recent) / max(1, len(self._recent))

    def evaluation(self, state: TrainState, *, loss: float, bits_per_byte: float) -> None:
        """Held-out loss in nats per token, and in bits per byte."""
        self._append({"step": state.step, "eval_loss": loss, "eval_bits_per_byte": bits_per_byte})
        self.say(f"{self.name}: step {state.step}  held-out loss {loss:.4f}  {bits_per_byte:.4f} bits per byte")

    def event(self, event: str, **fields: object) -> None:
        """Something that happened: a roll-back, a resume, a signal."""
        self._append({"event": event, **fields, "time": round(time.time(), 3)})
        shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in fields.items()}
        self.say(f"{self.name}: {event} " + " ".join(f"{key}={value}" for key, value in shown.items()))

    def saved(self, state: TrainState, path: Path) -> None:
        """A checkpoint was written."""
        self.say(f"{self.name}: checkpoint at step {state.step}: {path.name}")

    @contextmanager
    def panel(self, total_steps: int) -> Iterator[None]:
        """A live panel while the block runs, if standard error is a terminal."""
        self.total_steps = total_steps
        if self.silent or not sys.stderr.isatty():
            yield
            return
        from edgewright.panel import Panel

        with Panel() as self._panel:
            try:
                yield
            finally:
                self._panel = None

    def _append(self, entry: dict[str, object]) -> None:
        if self.silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
