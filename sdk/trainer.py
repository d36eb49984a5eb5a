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
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from edgewright import checkpoint
from edgewright.allocator import keep_freed_memory
from edgewright.errors import BadInput, Diverged
from edgewright.method import Method, StepContext, by_key
from edgewright.micro_batch import give_back, halved, no_memory_left, shortage
from edgewright.objective import ModelInputs, Objective
from edgewright.optim.state import named_state
from edgewright.schedule import rewarm_factor
from edgewright.student import decoder_blocks, hidden_states, output_head, recompute_blocks
from edgewright.training import StopRequest, TrainingConfig
from edgewright.update import ReleasedUpdate, Update, WholeUpdate
from edgewright.weights import load_parts
from edgewright.world import ALONE, Replica, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.data import Batch, Batches
    from edgewright.metrics import Metrics
    from edgewright.planner.peak import PeakMemory
    from edgewright.schedule import ScheduleConfig

T = TypeVar("T")
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
        objective = objective or self.objective
        seen = objective.view(inputs)
        narrow = torch.autocast(inputs.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with objective.watching(), narrow:
            hidden = hidden_states(self.model, seen)
            head = output_head(self.model)
        return objective.loss(hidden, head, inputs, scale=scale, dtype=self.dtype)


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
    peak: PeakMemory | None = None
    """Measures the stage's memory, where the system lets it."""


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
        self.update = build_update(job, state.decisions)
        if state.decisions["gradient_checkpointing"]:
            recompute_blocks(job.model)
        if state.decisions["compile"]:
            compile_model(job.model, by_block=state.decisions["gradient_release"])
        self._last_save = time.monotonic()
        self._clean = True

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.job.settings.global_batch

    def restore(self, loaded: checkpoint.Loaded, weights: dict[str, Tensor]) -> None:
        """Put a checkpoint's optimizer, methods and random state back; `weights` are the model's tensors."""
        checkpoint.put_weights(self.job.model, weights, self.job.replica.place)
        load_parts(self.job.model, loaded.parts)
        self.update.restore(loaded.optimizer, self.job.replica)
        for key, method in by_key(self.job.methods).items():
            method.load_state_dict(loaded.methods[key])
        set_random_state(loaded.rng)
        self.state = loaded.state

    def train(self) -> checkpoint.TrainState:
        """Run to the last step.

        Raises:
            Interrupted: a signal came; a full checkpoint was written.
            Diverged: EW-701, non-finite values after `MAX_ROLLBACKS` roll-backs.
            OutOfResources: EW-401, the disk is full; EW-751, memory ran out; the last good checkpoint stays.
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

    def rehearse(self) -> float:
        """One step without evaluation or checkpoint; its seconds, for the planner."""
        self.job.model.train()
        before = self.state.seconds
        self._one_step()
        return self.state.seconds - before

    def _one_step(self) -> None:
        state = self.state
        while state.position in state.skipped:
            state.position += self.global_batch
        started, context = time.perf_counter(), self._context(state.step)
        for method in self.job.methods:
            method.before_step(context)
        rate = self.job.learning_rate * self.learning_rate_factor()
        self.update.begin(rate)
        self.job.objective.begin_step(state.step, self.job.total_steps)
        counted, total = self._fitting(self._gradients)
        for method in self.job.methods:
            method.after_backward(self._context(state.step + 1))
        loss_value, norm_value = float(total.sum()), self.update.norm(self.job.replica)
        (bad,) = self.world.any(not (math.isfinite(loss_value) and math.isfinite(norm_value)))
        if bad:
            self._blame_teacher()
            self._roll_back(loss_value, norm_value)
            return
        self.update.apply()
        for method in self.job.methods:
            method.after_step(self._context(state.step + 1))
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
        self.job.objective.after_step(parts_by_name, state.objective)

    def _gradients(self, size: int) -> tuple[int, Tensor]:
        """The gradients of the next global batch, in micro-batches of `size`.

        Returns:
            (counted tokens, parts of the loss [P]), both of all processes.
        """
        rng, processes = random_state(self.device), self.world.size
        first, end = self.state.position + self.world.rank * size, self.state.position + self.global_batch
        micro = [self.job.batches.batch(p, min(size, end - p)) for p in range(first, end, size * processes)]
        counted = int(self.world.sum(torch.tensor(sum(batch.valid_tokens for batch in micro))))
        total = torch.zeros(len(self.job.objective.parts), device=self.device)
        with self.world.own_randomness(self.state.position):
            for batch in micro:
                with self.job.replica.accumulating(last=batch is micro[-1]):
                    loss, parts = self.job.replica(model_inputs(batch, self.device), 1.0 / max(1, counted))
                    loss = self._with_penalties(loss, len(micro) * processes)
                    self.update.backward(loss * processes)  # the processes' gradients are averaged
                total += parts.detach()
                if processes == 1 and self.stop.requested and batch is not micro[-1]:
                    self.update.abandon()
                    set_random_state(rng)
                    self._interrupt()
        return counted, self.world.sum(total)

    def _fitting(self, work: Callable[[int], T]) -> T:
        """Do something with the run's micro-batch; where memory runs out, again with half of it, from the same state.

        Raises:
            OutOfResources: EW-751, even one sequence is too much, or another size is not allowed.
        """
        rng, decisions = random_state(self.device), self.state.decisions
        while True:
            try:
                return work(decisions["micro_batch"])
            except (MemoryError, RuntimeError) as error:
                what = shortage(error)
                if what is None:
                    raise
            # only here, where the error's traceback and with it all activations are gone
            self.update.abandon()
            give_back(compiled=decisions["compile"])
            set_random_state(rng)
            size = decisions["micro_batch"]
            smaller, refusal = halved(size), self._why_not_smaller()
            if smaller == size or refusal is not None:
                raise no_memory_left(what, decisions, refusal if smaller < size else None)
            decisions["micro_batch"] = smaller
            self.metrics.event("out_of_memory", step=self.state.step, micro_batch=size, now=smaller, what=what)
            self._clean = False
            self.save()  # or a run that is killed now would try the larger one again

    def _why_not_smaller(self) -> str | None:
        """What to do so that the micro-batch could be made smaller; None where it can be."""
        if self.world.size > 1:
            return "a smaller per_device_train_batch_size with more gradient_accumulation_steps"
        if self.state.decisions["gradient_release"]:
            return "a smaller per_device_train_batch_size, since gradient_release takes one micro-batch to a step"
        return None if self.job.settings.auto_find_batch_size else "training.auto_find_batch_size: true"

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
        loss = self._fitting(lambda size: self._held_out_loss(self.job.replica.module, size))
        self.job.model.train()
        if loss is not None:
            self.metrics.evaluation(self.state, loss=loss, bits_per_byte=self._bits_per_byte(loss))
        return loss

    def _measure_teacher(self) -> None:
        """What the student is to reach, on the very text that `evaluate` uses; kept as an event of the run."""
        teacher = self.job.objective.teacher()
        loss = None
        if teacher is not None:
            module = TrainingModule(teacher, self.job.objective, self.dtype)
            loss = self._fitting(lambda size: self._held_out_loss(module, size))
        if loss is not None:
            self.metrics.event("teacher", teacher_loss=loss, teacher_bits_per_byte=self._bits_per_byte(loss))

    def _bits_per_byte(self, loss: float) -> float:
        return loss / math.log(2) / self.job.bytes_per_token

    @torch.no_grad()
    def _held_out_loss(self, module: TrainingModule, size: int) -> float | None:
        """Nats per token on the first held-out sequences, shared out among the processes; None without any."""
        from edgewright.objective import NextToken

        if self.job.held_out is None:
            return None
        module.model.eval()
        objective = NextToken()
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
        if self.job.peak is not None:
            self.state.peak_memory = max(self.state.peak_memory, self.job.peak.bytes())
        directory = self.job.directory / "checkpoints"
        path = checkpoint.save(
            directory,
            model=model,
            optimizer=optimizer,
            methods={key: method.state_dict() for key, method in by_key(self.job.methods).items()},
            state=self.state,
            rng=random_state(self.device),
            extra_files=self.job.extra_files,
        )
        checkpoint.prune(directory, self.job.settings.keep_checkpoints)
        self.metrics.saved(self.state, path)

    def _interrupt(self) -> NoReturn:
        self.save()
        self.stop.raise_interrupted(self.state.step)

    def _blame_teacher(self) -> None:
        """Refuse a teacher of which not all is finite on this global batch: going back would not help.

        Every process looks at all of it, so that all find the same.
        """
        first, end = self.state.position, self.state.position + self.global_batch
        size = self.state.decisions["micro_batch"]
        for position in range(first, end, size):
            batch = self.job.batches.batch(position, min(size, end - position))
            place = self.job.objective.not_finite(model_inputs(batch, self.device), self.dtype)
            if place is not None:
                raise targets_not_finite(self.job.batches, batch.indices[place[0]], place[1])

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
        self.update.abandon()
        self.restore(checkpoint.load(good), checkpoint.read_weights(good / "model"))
        self.state.rollbacks, self.state.skipped = rollbacks, skipped
        self.metrics.rewind(self.state.step)
        self.metrics.event("rollback", step=step, to_step=self.state.step, skipped_position=bad)
        self._clean = True

    def _context(self, next_step: int) -> StepContext:
        """`next_step` is the first step that a re-warm-up asked for now can change."""

        def rewarm(steps: int) -> None:
            self.state.rewarm = (next_step, steps)

        return StepContext(
            step=self.state.step,
            total_steps=self.job.total_steps,
            reset_state=self.update.reset,
            reset_all_state=self.update.reset_all,
            rewarm=rewarm,
        )

    def _with_penalties(self, loss: Tensor, micro_batches: int) -> Tensor:
        for method in self.job.methods:
            penalty = method.penalty()
            if penalty is not None:
                loss = loss + penalty / micro_batches
        return loss


def build_update(job: Job, decisions: dict[str, Any]) -> Update:
    """How a job's gradients become steps."""
    if decisions["gradient_release"]:
        return ReleasedUpdate(job.optimizer, job.model, offload=decisions["offload_optimizer"])
    return WholeUpdate(
        job.optimizer, job.model, offload=decisions["offload_optimizer"], max_grad_norm=job.settings.max_grad_norm
    )


def compile_model(model: PreTrainedModel, *, by_block: bool) -> None:
    """Compile the forward as one graph, or block by block: a graph's backward gives all of its gradients at once."""
    for part in decoder_blocks(model) if by_block else [model.base_model]:
        part.compile(dynamic=False)


def targets_not_finite(batches: Batches, sequence: int, position: int) -> BadInput:
    """EW-783, with the document."""
    document, token = batches.document_at(sequence, position)
    return BadInput(
        "EW-783",
        "what the teacher says of a token is not finite",
        where=f"document {document:,} of the training text, its token {token:,} (sequence {sequence:,}, {position})",
        expected="logits that are finite numbers",
        found="NaN or infinite values",
        fix="run the teacher in a wider type, or take out that document; a teacher that is NaN everywhere is damaged",
    )


def model_inputs(batch: Batch, device: torch.device) -> ModelInputs:
    """A batch as tensors on the device; the block-diagonal mask only where documents meet inside a row."""

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    sequences = tuple(batch.indices)
    if not batch.has_borders:
        return ModelInputs(
            input_ids=tensor(batch.input_ids),
            labels=tensor(batch.labels),
            position_ids=None,
            attention_mask=None,
            sequences=sequences,
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
        sequences=sequences,
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
