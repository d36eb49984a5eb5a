"""Alignment: the last stage of a draft, on text that its target wrote, with the loss that its runtime rewards.

A draft that drafts its best token (llama.cpp; vLLM unless told otherwise; every runtime where the target decodes
greedily) is accepted with the probability p(argmax q): it learns the very tokens of the target's text, by
cross-entropy (FastDraft, arXiv 2411.11055: sequence-level distillation). A draft that is sampled from (ONNX Runtime
GenAI, transformers and OpenVINO GenAI with `do_sample`) is accepted with sum(min(p, q)) = 1 - TV(p, q), so there it
learns the target's distributions, by forward KL that gives way to total variation (`lk_hybrid`, arXiv 2602.23881).

p is the target's distribution of the next token, q the draft's. The rules were read in the runtimes' sources. OpenVINO
GenAI's is another one where it samples (`Sampler::validate_candidate` at 02400d9): it compares the draft's probability
of its token with the target's of a token that it has just drawn, so text is not drawn from p exactly, and what is
accepted there is not that expectation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.compress.distill import DistillConfig
from edgewright.compress.loss_config import LkHybridConfig
from edgewright.compress.teacher_config import ModelTeacherConfig
from edgewright.objective import NextTokenConfig
from edgewright.yaml_positions import Problem

if TYPE_CHECKING:
    from edgewright.recipe import Recipe, StageConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """How a runtime drafts where the target is sampled from."""

    sampled: bool
    """Whether draft tokens are drawn from the draft's distribution; else they are its best ones."""
    why: str


RUNTIMES: Mapping[str, Rule] = {
    "genai": Rule(True, "ONNX Runtime GenAI samples its drafts and accepts them with min(1, p/q)"),
    "transformers": Rule(True, "transformers samples its drafts and accepts them with min(1, p/q)"),
    "openvino": Rule(True, "OpenVINO GenAI samples its drafts, and accepts them by a ratio that is not the exact one"),
    "llamacpp": Rule(False, "llama.cpp drafts the draft's best token and accepts what it samples itself"),
    "vllm": Rule(False, "vLLM drafts the draft's best token unless draft_sample_method says otherwise"),
}


class AlignConfig(BaseModel):
    """A draft learns its target's own text, by the loss that its runtime rewards (FastDraft, arXiv 2411.11055)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["align"] = "align"
    teacher: ModelTeacherConfig
    """The target, which wrote the text of `generated`."""
    runtime: Literal["genai", "llamacpp", "openvino", "transformers", "vllm"]
    """What will serve target and draft."""
    do_sample: bool = True
    """Whether the target will be sampled from; greedy decoding asks for its best token alone, in every runtime."""
    held_out: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """Earlier stages of type generate whose text is not trained on: the draft's acceptance is measured there, for each
    apart and together, and lies beside the finished model as `draft.json`."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The stages of `held_out`."""
        return (self.held_out,) if isinstance(self.held_out, str) else self.held_out

    @property
    def sampled(self) -> bool:
        """Whether the draft's distribution counts, and not its best token alone."""
        return self.do_sample and RUNTIMES[self.runtime].sampled

    def lesson(self) -> NextTokenConfig | DistillConfig:
        """The objective that it stands for."""
        if not self.sampled:
            return NextTokenConfig()
        return DistillConfig(teacher=self.teacher, losses=(LkHybridConfig(),))

    def note(self) -> str:
        """What was chosen and why, in a line."""
        rule = RUNTIMES[self.runtime]
        why = rule.why if self.do_sample or not rule.sampled else "without sampling only the target's best token counts"
        loss = (
            "lk_hybrid (forward KL that gives way to total variation)" if self.sampled else "hard-label cross-entropy"
        )
        counts = "sum(min(p, q))" if self.sampled else "p(argmax q)"
        return f"aligned for {self.runtime} by {loss}: {why}, so acceptance is {counts}"


def check_alignments(recipe: Recipe) -> Iterator[Problem]:
    """Alignments without text of a target (EW-843), or measured on text that is no such text or is trained on."""
    written = {stage.name: index for index, stage in enumerate(recipe.stages) if stage.type == "generate"}
    for index, stage in enumerate(recipe.stages):
        if stage.type != "train" or not isinstance(stage.objective, AlignConfig):
            continue
        path = ("stages", index, "objective")
        earlier = [name for name, place in written.items() if place < index]
        text = None if stage.generated is None else stage.generated.stage
        if text not in earlier:
            yield Problem(
                code="EW-843",
                what=f"stage {stage.name} aligns a draft with no text that its target wrote",
                path=path,
                expected="generated: {stage: NAME, share: 1.0} with an earlier stage of type generate",
                found="no `generated`" if text is None else f"{text}, which is no such stage",
                fix="let the target write first: {name: answers, type: generate, teacher: ..., prompts: ...}",
            )
        for name in stage.objective.texts:
            if name not in earlier or name == text:
                yield _not_held_out(stage, name, path, [each for each in earlier if each != text])
        for corpus in dict.fromkeys((text, *stage.objective.texts)):
            if corpus is None or corpus not in earlier:
                continue
            writers = recipe.stages[written[corpus]].teachers
            if [_model(each) for each in writers] != [_model(stage.objective.teacher)]:
                yield _of_another(stage, corpus, path)


def _model(teacher: ModelTeacherConfig) -> str:
    """Which model it is, whatever its weights are held in."""
    return teacher.stage if teacher.type == "stage" else str(teacher.model)


def _of_another(stage: StageConfig, name: str, path: tuple[str | int, ...]) -> Problem:
    return Problem(
        code="EW-843",
        what=f"the text of {name} is not the target's of stage {stage.name}",
        path=(*path, "teacher"),
        expected=f"the model that writes in stage {name}",
        found="another model",
        fix="give both the same teacher: a draft is accepted by the model whose text it has learned",
    )


def _not_held_out(stage: StageConfig, name: str, path: tuple[str | int, ...], fitting: list[str]) -> Problem:
    trained = stage.generated is not None and name == stage.generated.stage
    return Problem(
        code="EW-843",
        what=f"acceptance cannot be measured on {name!r}",
        path=(*path, "held_out"),
        expected="an earlier stage of type generate that is not trained on"
        + (f": {', '.join(fitting)}" if fitting else ""),
        found=f"{name}: " + ("the text that the draft learns" if trained else "no such stage"),
        fix="let the target write other prompts in a stage of its own",
    )
