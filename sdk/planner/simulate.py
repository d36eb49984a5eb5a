"""One optimizer step of a stage, on tensors without memory: its peak by part, and its operations."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from edgewright.compress.cache_format import Layout
from edgewright.compress.targets import TargetSource
from edgewright.compress.teacher import Ensemble, OnlineTeacher
from edgewright.memory_rules import check_release
from edgewright.method import StepContext
from edgewright.objective import ModelInputs, Objective
from edgewright.planner.heap import typical_peak
from edgewright.planner.ledger import Ledger
from edgewright.student import recompute_blocks
from edgewright.trainer import TrainingModule
from edgewright.update import ReleasedUpdate, Update, WholeUpdate
from edgewright.weights import check_weights, hold_weights_as
from edgewright.world import ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.method import Method
    from edgewright.recipe import StageConfig

REPEATS = 2
"""Steps after the first that the heap is followed through: then its holes are where they stay."""
MOST_MICRO_BATCHES = 2
"""Accumulation needs gradients beside the activations from its second micro-batch on; further ones need no more."""


def _attention(query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object) -> int:
    """Two products for every query and key; shapes [batch, heads, tokens, size]."""
    batch, heads, tokens, size = query
    return 4 * batch * heads * tokens * key[2] * size


def _attention_backward(
    gradient: object, query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object
) -> int:
    """Five products: the scores again, and the gradients of scores, queries, keys and values."""
    return _attention(query, key) * 5 // 2


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operations of the attention that is simulated, which torch does not count by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimizer step of a stage takes."""

    memory: dict[str, int]
    """Bytes by part, at the moment of the peak."""
    heap: int
    """Bytes that the heap of a C library takes for it: the peak and the holes in between."""
    parameters: int
    flops: float
    """Of the whole global batch, forward and backward; a multiply-add counts as two. Products of matrices and attention
    alone, as everywhere in the field."""
    operations: int
    """Kernels that are called for it, about: each takes a while to start, whatever it computes."""
    weight_bytes: int
    """Of the student, buffers included."""
    optimizer_bytes: int
    """Of the optimizer's state, between two steps."""
    buffer_bytes: int = 0
    """Of buffers that are saved with the weights, such as codes and scales of a frozen base in 4 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A stage with all that decides its step, and models whose weights may have no memory."""

    stage: StageConfig
    student: PreTrainedModel
    teachers: tuple[PreTrainedModel, ...]
    """As their weights are held; all of them in memory."""
    sequence_length: int
    decisions: dict[str, Any]
    """As `training.decide` takes them: precision, micro-batch, weights and so on."""
    borders: bool
    """Whether documents meet inside sequences, so that attention gets a mask."""
    cached: Layout | None = None
    """Of the cache that it learns from."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.decisions["precision"]]


class _Labelled(Objective):
    """An objective that tells the ledger what its tensors are for."""

    def __init__(self, inner: Objective, ledger: Ledger) -> None:
        self.inner = inner
        self.ledger = ledger

    def view(self, inputs: ModelInputs) -> ModelInputs:
        return self.inner.view(inputs)

    def watching(self) -> AbstractContextManager[None]:
        return self.inner.watching()

    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with self.ledger.part("logits"):
            return self.inner.loss(hidden, head, inputs, scale=scale, dtype=dtype)


def simulate(case: Case) -> Step:
    """Run two steps of a stage without memory; the second one, which finds the optimizer's state there, is measured.

    Both models are copied without their weights; what the methods do to the student is done to the copy.

    Raises:
        RecipeError: what methods, optimizers and memory settings refuse.
        RuntimeError: the architecture or a method does what cannot be done without data.
    """
    ledger = Ledger()
    with without_warnings(), young_garbage(), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        with ledger.part("weights"):
            student = weightless(case.student)
            check_weights(student, case.decisions["weights"], methods=[config.type for config in case.stage.methods])
            hold_weights_as(student, case.decisions["weights"])
            methods: list[Method] = [config.build() for config in case.stage.methods]
            if case.decisions["gradient_release"]:
                check_release(methods)
            for method in methods:
                method.prepare(student)
            ledger.assign_all(student, "weights")
        with ledger.part("teacher"):
            teachers = [weightless(teacher).eval().requires_grad_(False) for teacher in case.teachers]
        objective = _objective(case, teachers, ledger)
        with ledger.part("weights"):
            objective.attach(student)
        run = _Run(case, student, methods, objective, ledger)
        run.step()
        started, before = len(ledger.events), ledger.operations
        ledger.begin_peak()
        flops = run.step()
    parameters = list(student.parameters())
    return Step(
        memory=dict(ledger.peak),
        heap=typical_peak(ledger.events, ledger.events[started:], REPEATS),
        parameters=sum(parameter.numel() for parameter in parameters),
        flops=flops,
        operations=(ledger.operations - before) * -(-run.pieces // run.simulated),
        weight_bytes=ledger.now["weights"],
        optimizer_bytes=ledger.now["optimizer"],
        buffer_bytes=sum(tensor.numel() * tensor.element_size() for tensor in _saved_buffers(student)),
    )


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    yield from (tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters)


class _Run:
    """A stage's step, as the trainer takes it."""

    def __init__(
        self, case: Case, student: PreTrainedModel, methods: list[Method], objective: Objective, ledger: Ledger
    ) -> None:
        self.case = case
        self.methods = methods
        self.ledger = ledger
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if case.decisions["gradient_checkpointing"]:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_collect)
        for parameter in trained:  # before those of gradient release, which frees it
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.assign_gradient(p))
        optimizer = case.stage.optimizer.build(student)
        labels: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: labels.append(ledger.enter("optimizer")))
        optimizer.register_step_post_hook(lambda *_: ledger.leave(labels.pop()))
        if case.decisions["gradient_release"]:
            self.update: Update = ReleasedUpdate(optimizer, student)
        else:
            self.update = WholeUpdate(optimizer, student, max_grad_norm=case.stage.training.max_grad_norm)
        if case.decisions["gradient_checkpointing"]:
            recompute_blocks(student)
        self.module = TrainingModule(student, _Labelled(objective, ledger), case.dtype)
        self.replica = ALONE.replicate(self.module, "none")
        student.train()

    @property
    def pieces(self) -> int:
        """Micro-batches of a step."""
        return -(-self.case.stage.training.global_batch // self.case.decisions["micro_batch"])

    @property
    def simulated(self) -> int:
        """Those of them that are simulated."""
        return min(MOST_MICRO_BATCHES, self.pieces)

    def step(self) -> float:
        """Take it; the operations of forward and backward for the whole global batch."""
        context, ledger = _context(), self.ledger
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION | self._products())
        for method in self.methods:
            method.before_step(context)
        self.update.begin(self.case.stage.optimizer.learning_rate)
        pieces, micro = self.pieces, self.simulated
        for _ in range(micro):
            with ledger.part("other"):
                inputs = made_inputs(self.case.decisions["micro_batch"], self.case.sequence_length, self.case.borders)
            with ledger.part("activations"), counter:
                loss, parts = self.module(inputs, 1.0)
                for method in self.methods:
                    penalty = method.penalty()
                    loss = loss if penalty is None else loss + penalty / micro
                self.update.backward(loss)
            del loss, parts, inputs
        for method in self.methods:
            method.after_backward(context)
        self.update.norm(self.replica)
        self.update.apply()
        with ledger.part("weights"):
            for method in self.methods:
                method.after_step(context)
        return counter.get_total_flops() * pieces  # the counter starts anew with every micro-batch

    def _products(self) -> dict[Any, Any]:
        """Products that torch does not count; bitsandbytes is not imported for a stage without weights in 4 bits."""
        if not any(module.__class__.__name__ == "FourBitLinear" for module in self.module.modules()):
            return {}
        from edgewright.compress.four_bits import FOUR_BIT_PRODUCTS

        return FOUR_BIT_PRODUCTS


def _collect(_: Tensor) -> None:
    gc.collect()


@contextmanager
def young_garbage() -> Iterator[None]:
    """Inside the block a search for garbage looks at what is made there alone, and so is quick.

    A block that is computed again is stopped by an exception, whose traceback keeps its tensors in cycles. A training
    makes so many objects that they are soon found; a simulation has to be told to look.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Layers that watch their weights' addresses are told that there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def weightless(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose tensors have shapes alone, on the simulated device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _objective(case: Case, teachers: list[PreTrainedModel], ledger: Ledger) -> Objective:
    config = case.stage.lesson
    if config.type == "next_token" or config.type == "sandwich":
        return config.build()
    before: list[str] = []
    for teacher in teachers:
        teacher.base_model.register_forward_pre_hook(lambda *_: before.append(ledger.enter("teacher")))
        teacher.base_model.register_forward_hook(lambda *_: ledger.leave(before.pop()))
    return config.build(_source(case, teachers))


def _source(case: Case, teachers: list[PreTrainedModel]) -> TargetSource:
    """Where the targets come from."""
    if case.cached is not None:
        from edgewright.planner.teachers import CachedShapes

        return CachedShapes(case.cached)
    online = [OnlineTeacher(model=teacher) for teacher in teachers]
    return online[0] if len(online) == 1 else Ensemble(online)


def made_inputs(rows: int, length: int, borders: bool) -> ModelInputs:
    """A micro-batch, as `trainer.model_inputs` makes it; borders: whether documents meet inside sequences."""
    ids, labels = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
    if not borders:
        return ModelInputs(input_ids=ids, labels=labels, position_ids=None, attention_mask=None)
    documents = torch.zeros(rows, length, dtype=torch.int32)
    causal = torch.ones(length, length, dtype=torch.bool).tril_()
    mask = (documents[:, None, :, None] == documents[:, None, None, :]) & causal
    positions = torch.zeros(rows, length, dtype=torch.long)
    return ModelInputs(input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask)


def _context() -> StepContext:
    return StepContext(
        step=1,
        total_steps=10**9,
        reset_state=lambda parameter, mask: None,
        reset_all_state=lambda: None,
        rewarm=lambda steps: None,
    )
