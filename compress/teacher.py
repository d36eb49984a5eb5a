"""Teachers: where targets come from (`targets.TargetSource`). Here frozen models that run beside the student.

A model alone, in float32, bfloat16, 8 or 4 bits; several whose logits are averaged. What a teacher said can also lie on
disk: `compress/cache.py`. Neither keeps a cache of keys and values, has gradients, or makes logits but chunk by chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from edgewright.compress.targets import HeadLogits, Logits, Targets, TargetSource
from edgewright.imports import importing_bitsandbytes

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.compress.teacher_config import TeacherWeights
    from edgewright.objective import ModelInputs

PACKED_BITS = {"int8": 8, "nf4": 4}
"""Widths that bitsandbytes holds linear layers in."""


def casts_are_known(record: logging.LogRecord) -> bool:
    """A filter: bitsandbytes says at every product in int8 that it casts its inputs, which is how that works."""
    return "inputs will be cast from" not in str(record.msg)


class OnlineTeacher(TargetSource):
    """A local model that runs on every micro-batch, in evaluation mode and without gradient.

    Args:
        directory: of the model; it is loaded by `prepare`.
        weights: what its weights are held in.
        model: a model taken as it is instead.
    """

    gives = Logits
    inside = True

    def __init__(
        self,
        directory: Path | None = None,
        *,
        weights: TeacherWeights = "fp32",
        model: PreTrainedModel | None = None,
    ) -> None:
        assert (directory is None) != (model is None), "a directory or a model"
        self.directory = directory
        self.weights = weights
        self._model = model
        self._device = torch.device("cpu")

    def prepare(self, student: PreTrainedModel | None, device: torch.device) -> None:
        """Load the teacher, frozen.

        Raises:
            RecipeError: EW-712, the teacher's logits are not those of its head alone. (That both speak of the same
                tokens is checked by `check` and before training, by `vocabulary.check_same_tokens`.)
        """
        self._device = device
        if self.directory is None:
            return
        self.open()

    def open(self) -> PreTrainedModel:
        """The model, loaded if it is not there."""
        if self._model is None:
            assert self.directory is not None
            self._model = open_frozen(self.directory, self.weights, self._device)
        return self._model

    def release(self) -> None:
        """Let go of the model; the next `open` loads it again."""
        if self.directory is not None:
            self._model = None

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> HeadLogits:
        from edgewright.student import hidden_states, output_head

        model = self.open()
        with torch.no_grad():
            hidden = hidden_states(model, inputs)
        return HeadLogits(hidden, output_head(model, dtype), dtype)

    def architecture(self) -> PretrainedConfig:
        from edgewright.preview import stored_architecture

        if self._model is not None:
            return self._model.config
        assert self.directory is not None
        return stored_architecture(self.directory).config

    def model(self) -> PreTrainedModel | None:
        return self._model


class Ensemble(TargetSource):
    """Several models, whose logits are averaged before the softmax: the normalised geometric mean of what they say.

    Pre-training under infinite compute (arXiv 2509.14786). A further token that only some members have is dropped.

    Args:
        members: at least one.
        resident: all of them in memory, or one at a time, loaded again for every micro-batch.
    """

    gives = Logits

    def __init__(self, members: Sequence[OnlineTeacher], *, resident: Literal["all", "one"] = "all") -> None:
        self.members = members
        self.resident = resident

    def prepare(self, student: PreTrainedModel | None, device: torch.device) -> None:
        """Load the members, or look at one after the other; raises as `OnlineTeacher.prepare`."""
        for member in self.members:
            member.prepare(student, device)
            self._let_go(member)

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> MeanLogits:
        parts = []
        for member in self.members:
            parts.append(member.targets(inputs, dtype))
            self._let_go(member)
        return MeanLogits(tuple(parts))

    def _let_go(self, member: OnlineTeacher) -> None:
        if self.resident == "one":
            member.release()


@dataclass(frozen=True, slots=True)
class MeanLogits:
    """The mean of several teachers' logits, made when a chunk is asked for."""

    parts: tuple[Targets, ...]

    def rows(self, window: slice) -> Logits:
        """float32 [C, V], V the smallest of their vocabularies."""
        total: Tensor | None = None
        for part in self.parts:
            targets = part.rows(window)
            assert isinstance(targets, Logits), "members give logits"
            if total is None:
                total = targets.values
                continue
            width = min(total.shape[-1], targets.values.shape[-1])
            total = total[:, :width].add_(targets.values[:, :width])
        assert total is not None
        return Logits(total.div_(len(self.parts)))


def open_frozen(directory: Path, weights: TeacherWeights, device: torch.device) -> PreTrainedModel:
    """A local model in evaluation mode, without gradients, its weights held as asked for.

    int8 and nf4 are bitsandbytes' `Linear8bitLt` and `Linear4bit` for every linear layer but the output head, which
    stays bf16 with embeddings and norms. The layers are turned one after the other, so that the device never has the
    wide model; host memory has it in bf16 while it is read.

    Raises:
        EdgewrightError: what the guard and `load_model` refuse: pickles, code, damaged or non-finite weights.
        RecipeError: EW-712, its logits are not those of its head alone.
    """
    from edgewright.preview import check_head_of_family, stored_architecture
    from edgewright.student import check_head, load_model

    check_head_of_family(stored_architecture(directory), f"teacher {directory}")
    model: Any = load_model(directory, torch.float32 if weights == "fp32" else torch.bfloat16)
    model.eval().requires_grad_(False)
    if weights == "fp32":  # narrower logits differ by their rounding alone
        check_head(model, f"teacher {directory}")
    if weights in PACKED_BITS:
        pack_linears(model, weights, device)
        leave_files(model)
    model.to(device)
    opened: PreTrainedModel = model
    return opened


def leave_files(model: nn.Module) -> None:
    """Copy what is still in mapped files, as embeddings are: one of them would keep all of a file in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def packable(model: nn.Module, head: nn.Module | None) -> list[tuple[str, nn.Linear]]:
    """The linear layers that are held in few bits: all but the output head."""
    return [
        (name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module is not head
    ]


def pack_linears(model: PreTrainedModel, weights: TeacherWeights, device: torch.device) -> None:
    """Turn a model's linear layers into bitsandbytes' own, on the device, one after the other.

    In 4 bits 64 weights share a scale of one byte, and 256 of those a float32 (QLoRA's double quantization). On CPUs
    with AVX512-BF16 bitsandbytes has a kernel that reads the codes as they are, for which it would rewrite the scales
    in two bytes with the first forward, rounded to bfloat16, and refuse layers whose outputs are no multiple of 32. A
    teacher in 4 bits is there to be small, and to say the same on every machine: it goes without.
    """
    with importing_bitsandbytes():
        import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(casts_are_known)
    for name, linear in packable(model, model.get_output_embeddings()):
        shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        dtype = linear.weight.dtype
        packed: nn.Module
        if weights == "nf4":
            packed = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=dtype, quant_type="nf4", device="meta")
            packed.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True
            )
            packed.support_avx512bf16_for_cpu = False
        else:
            packed = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False, device="meta")
            packed.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        model.set_submodule(name, packed.to(device).eval())
