"""The loop, and nothing else.

One optimizer step: fetch the micro-batches of a global batch, forward and backward each with the loss scaled by the
global number of counted tokens, clip, look for non-finite values *before* the update, update. Every choice made at
run time is in `TrainState`, so a killed run goes on with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from edgewright import checkpoint
from edgewright.allocator import keep_freed_memory
from edgewright.errors import Diverged
from edgewright.method import Method, StepContext
from edgewright.objective import ModelInputs, Objective
from edgewright.optim.state import named_state, reset_state, restore_state
from edgewright.schedule import rewarm_factor
from edgewright.student import hidden_states, output_head
from edgewright.training import StopRequest, TrainingConfig
from edgewright.weights import load_parts
from edgewright.world import ALONE, Replica, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.data import Batch, Batches
    from edgewright.metrics import Metrics
    from edgewright.schedule import ScheduleConfig

MAX_ROLLBACKS = 3


class TrainingModule(nn.Module):
    """Student and objective as one module, so that whatever wraps the forward (compilation, sharding) holds both."""

    def __init__(self, model: PreTrainedModel, objective: Objective, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.dtype = dtype

    def forward(self, inputs: ModelInputs, scale: float, objective: Objective | None = None) -> tuple[Tensor, Tensor]:
        """(loss [], parts [P]) of a micro-batch, by the stage's objective unless another is given."""
        with torch.autocast(inputs.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = hidden_states(self.model, inputs)
            head = output_head(self.model)
        return (objective or self.objective).loss(hidden, head, inputs, scale=scale, dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a stage trains: the parts that the recipe named, built."""

    model: PreTrainedModel
    replica: Replica
    """Model and objective, where they train."""
    objective: Objective
    methods: list[Method]
    optimizer: torch.optim.Optimizer
    learning_rate: float
    schedule: ScheduleConfig
    batches: Batches
    held_out: Batches | None
    bytes_per_token: float
    """Held-out UTF-8 bytes per token: turns nats per token into bits per byte."""
    total_steps: int
    settings: TrainingConfig
    directory: Path
    extra_files: Callable[[Path], None]


class Trainer:
    """Trains a `Job` from wherever its directory's newest good checkpoint is.

    Args:
        job: what to train.
        state: a fresh state with its decisions taken, or the one of the checkpoint to go on from.
        metrics: where progress goes.
        stop: set by a signal; honoured within one micro-batch, by several processes together at the end of the step.
        world: the processes that train together.
    """

    def __init__(
        self, job: Job, state: checkpoint.TrainState, metrics: Metrics, stop: StopRequest, world: World = ALONE
    ) -> None:
        self.job = job
        self.world = world
        self.state = state
        self.metrics = metrics
        self.stop = stop
        keep_freed_memory()
        self.device = torch.device(state.decisions["device"])
        self.dtype = getattr(torch, state.decisions["precision"])
        job.objective.prepare(job.model, self.device)
        if state.decisions["compile"]:
            job.model.base_model.compile(dynamic=False)
        self._last_save = time.monotonic()
        self._clean = True

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.job.settings.per_device_train_batch_size * self.job.settings.gradient_accumulation_steps

    def restore(self, loaded: checkpoint.Loaded, weights: dict[str, Tensor]) -> None:
        """Put a checkpoint's optimizer, methods and random state back; `weights` are the model's tensors."""
        checkpoint.put_weights(self.job.model, weights, self.job.replica.place)
        load_parts(self.job.model, loaded.parts)
        restore_state(self.job.optimizer, self.job.model, loaded.optimizer, self.job.replica.place)
        for method in self.job.methods:
            method.load_state_dict(loaded.methods[method.type])
        set_random_state(loaded.rng)
        self.state = loaded.state

    def train(self) -> checkpoint.TrainState:
        """Run to the last step.

        Raises:
            Interrupted: a signal came; a full checkpoint was written.
            Diverged: EW-701, non-finite values after `MAX_ROLLBACKS` roll-backs.
            OutOfResources: EW-401, the disk is full; the last good checkpoint stays.
        """
        if self.state.step == 0:
            self._measure_teacher()
            self.save()
        self.job.model.train()
        with self.metrics.panel(self.job.total_steps), self.stop.deferred():
            while self.state.step < self.job.total_steps:
                self._one_step()
                self._after_step()
        self.save()
        return self.state

    def _one_step(self) -> None:
        state, size = self.state, self.job.settings.per_device_train_batch_size
        while state.position in state.skipped:
            state.position += self.global_batch
        started, rng = time.perf_counter(), random_state(self.device)
        context = self._context(state.step)
        for method in self.job.methods:
            method.before_step(context)
        first, end, processes = (
            state.position + self.world.rank * size,
            state.position + self.global_batch,
            self.world.size,
        )
        micro = [self.job.batches.batch(p, size) for p in range(first, end, size * processes)]
        counted = int(self.world.sum(torch.tensor(sum(batch.valid_tokens for batch in micro))))
        total = torch.zeros(len(self.job.objective.parts), device=self.device)
        with self.world.own_randomness():
            for batch in micro:
                with self.job.replica.accumulating(last=batch is micro[-1]):
                    loss, parts = self.job.replica(model_inputs(batch, self.device), 1.0 / max(1, counted))
                    loss = self._with_penalties(loss, len(micro) * processes)
                    (loss * processes).backward()  # the processes' gradients are averaged
                total += parts.detach()
                if processes == 1 and self.stop.requested and batch is not micro[-1]:
                    self.job.optimizer.zero_grad(set_to_none=True)
                    set_random_state(rng)
                    self._interrupt()
        total = self.world.sum(total)
        for method in self.job.methods:
            method.after_backward(context)
        parameters = [p for p in self.job.model.parameters() if p.grad is not None]
        limit = self.job.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit, foreach=True)
        loss_value, norm_value = float(total.sum()), float(self.job.replica.whole(norm))
        (bad,) = self.world.any(not (math.isfinite(loss_value) and math.isfinite(norm_value)))
        if bad:
            self._roll_back(loss_value, norm_value)
            return
        rate = self.job.learning_rate * self.learning_rate_factor()
        for group in self.job.optimizer.param_groups:
            group["lr"] = rate
        self.job.optimizer.step()
        for method in self.job.methods:
            method.after_step(self._context(state.step + 1))
        self.job.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        state.step += 1
        state.tokens += counted
        state.position += self.global_batch
        state.seconds += seconds
        self._clean = False
        parts_by_name = dict(zip(self.job.objective.parts, total.tolist(), strict=True))
        self.metrics.step(
            state, loss=loss_value, parts=parts_by_name, lr=rate, grad_norm=norm_value, tokens=counted, seconds=seconds
        )

    def _after_step(self) -> None:
        settings, step = self.job.settings, self.state.step
        if self._clean:
            return
        if settings.eval_steps and step % settings.eval_steps == 0 or step == self.job.total_steps:
            self.evaluate()
        due = self.world.is_main and time.monotonic() - self._last_save > 60 * settings.save_minutes
        stop, due = self.world.any(self.stop.requested, due)
        if stop:
            self.stop.join()
            self._interrupt()
        if step % settings.save_steps == 0 or due:
            self.save()

    def learning_rate_factor(self) -> float:
        """The schedule's factor, or the climb back to it while a re-warm-up runs."""
        if self.state.rewarm is None:
            return self.job.schedule.factor(self.state.step, self.job.total_steps)
        return rewarm_factor(self.job.schedule, self.state.step, self.job.total_steps, *self.state.rewarm)

    def evaluate(self) -> float | None:
        """Mean cross-entropy on the first held-out sequences; logged as nats per token and bits per byte."""
        loss = self._held_out_loss(self.job.replica.module)
        self.job.model.train()
        if loss is not None:
            self.metrics.evaluation(self.state, loss=loss, bits_per_byte=self._bits_per_byte(loss))
        return loss

    def _measure_teacher(self) -> None:
        """What the student is to reach, on the very text that `evaluate` uses; kept as an event of the run."""
        teacher = self.job.objective.teacher()
        loss = None
        if teacher is not None:
            loss = self._held_out_loss(TrainingModule(teacher, self.job.objective, self.dtype))
        if loss is not None:
            self.metrics.event("teacher", teacher_loss=loss, teacher_bits_per_byte=self._bits_per_byte(loss))

    def _bits_per_byte(self, loss: float) -> float:
        return loss / math.log(2) / self.job.bytes_per_token

    @torch.no_grad()
    def _held_out_loss(self, module: TrainingModule) -> float | None:
        """Nats per token on the first held-out sequences, shared out among the processes; None without any."""
        from edgewright.objective import NextToken

        if self.job.held_out is None:
            return None
        module.model.eval()
        objective, size = NextToken(), self.job.settings.per_device_train_batch_size
        sequences = min(self.job.settings.eval_sequences, len(self.job.held_out))
        starts = range(0, sequences, size)
        sums = torch.zeros(2, dtype=torch.float64)
        for number in range(self.world.rank, len(starts) + self.world.rank, self.world.size):
            start = starts[number % len(starts)]  # all run equally often: cut-up weights are put together by all
            batch = self.job.held_out.batch(start, min(size, sequences - start))
            nats = float(module(model_inputs(batch, self.device), 1.0, objective)[0])
            if number < len(starts):
                sums += torch.tensor([nats, batch.valid_tokens], dtype=torch.float64)
        nats, counted = self.world.sum(sums).tolist()
        return nats / max(1.0, counted)

    def save(self) -> None:
        """Write a checkpoint of this very step, unless it is there already; the main process does."""
        final = checkpoint.directory_of(self.job.directory / "checkpoints", self.state.step)
        if self.world.shared(self._clean and final.exists()):
            return
        model = self.job.replica.whole_model()
        optimizer = self.job.replica.gathered(named_state(self.job.optimizer, self.job.model))
        self.world.main_only(lambda: self._write(model, optimizer))
        self._last_save = time.monotonic()
        self._clean = True

    def _write(self, model: PreTrainedModel | None, optimizer: dict[str, Tensor]) -> None:
        assert model is not None, "the main process has the whole model"
        directory = self.job.directory / "checkpoints"
        path = checkpoint.save(
            directory,
            model=model,
            optimizer=optimizer,
            methods={method.type: method.state_dict() for method in self.job.methods},
            state=self.state,
            rng=random_state(self.device),
            extra_files=self.job.extra_files,
        )
        checkpoint.prune(directory, self.job.settings.keep_checkpoints)
        self.metrics.saved(self.state, path)

    def _interrupt(self) -> NoReturn:
        self.save()
        self.stop.raise_interrupted(self.state.step)

    def _roll_back(self, loss: float, norm: float) -> None:
        """Back to the last good checkpoint, with this global batch on the list of those never trained on."""
        bad, step = self.state.position, self.state.step
        indices = self.job.batches.batch(bad, self.global_batch).indices
        rollbacks, skipped = self.state.rollbacks + 1, [*self.state.skipped, bad]
        self.metrics.event(
            "non_finite", step=step, loss=repr(loss), grad_norm=repr(norm), sequences=indices, rollbacks=rollbacks
        )
        if rollbacks >= MAX_ROLLBACKS:
            raise Diverged(
                "EW-701",
                f"training diverged: non-finite values at step {step}, for the {rollbacks}rd time",
                where=self.job.directory,
                expected="finite loss and gradients",
                found=f"loss {loss}, gradient norm {norm}",
                fix="lower learning_rate, raise warmup_ratio or lower max_grad_norm, then run with --fresh",
            )
        good = checkpoint.newest(self.job.directory / "checkpoints", self.metrics.say)
        assert good is not None, "a checkpoint is written before the first step"
        self.job.optimizer.zero_grad(set_to_none=True)
        self.restore(checkpoint.load(good), checkpoint.read_weights(good / "model"))
        self.state.rollbacks, self.state.skipped = rollbacks, skipped
        self.metrics.rewind(self.state.step)
        self.metrics.event("rollback", step=step, to_step=self.state.step, skipped_position=bad)
        self._clean = True

    def _context(self, next_step: int) -> StepContext:
        """`next_step` is the first step that a re-warm-up asked for now can change."""

        def rewarm(steps: int) -> None:
            self.state.rewarm = (next_step, steps)

        def reset(parameter: nn.Parameter, mask: Tensor | None) -> None:
            reset_state(self.job.optimizer, parameter, mask)

        return StepContext(
            step=self.state.step,
            total_steps=self.job.total_steps,
            reset_state=reset,
            reset_all_state=self.job.optimizer.state.clear,
            rewarm=rewarm,
        )

    def _with_penalties(self, loss: Tensor, micro_batches: int) -> Tensor:
        for method in self.job.methods:
            penalty = method.penalty()
            if penalty is not None:
                loss = loss + penalty / micro_batches
        return loss


def model_inputs(batch: Batch, device: torch.device) -> ModelInputs:
    """A batch as tensors on the device; the block-diagonal mask only where documents meet inside a row."""

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    if not batch.has_borders:
        return ModelInputs(
            input_ids=tensor(batch.input_ids), labels=tensor(batch.labels), position_ids=None, attention_mask=None
        )
    documents = tensor(batch.document_ids)
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return ModelInputs(
        input_ids=tensor(batch.input_ids),
        labels=tensor(batch.labels),
        position_ids=tensor(batch.position_ids),
        attention_mask=same & causal,
    )


def random_state(device: torch.device) -> dict[str, list[int]]:
    """The states of torch's generators that a step may draw from, as bytes."""
    state = {"cpu": torch.get_rng_state().tolist()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).tolist()
    return state


def set_random_state(state: dict[str, list[int]]) -> None:
    """Put `random_state` back."""
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    if "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
