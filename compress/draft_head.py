"""A head that knows the tokens which its target says, and one class for all others (FR-Spec, arXiv 2502.14856).

FR-Spec and VocabTrim keep the rows of the draft's head for the tokens that come most often, counted best on the
target's own text, and map the few logits back by a table, inside their own runtimes. Every runtime that is served here
wants a logit for every token of the target's, so the head keeps its width:

    logits[v] = w_v . h      where v is kept
    logits[v] = r . h        for every other token, one row r for all of them

It stays a proper model of the whole vocabulary: r learns the probability of "something rare", shared evenly among the
tokens that are not kept, and greedy drafting practically never takes one. With temperatures, top-k and top-p it is
treated as any other model. Logits of kept tokens are the untrimmed ones when training begins, and r is the mean of the
rows that it stands for.

What is saved, and where:

    training             (V - K) H parameters of the head, their gradients and moments; the product is V wide
    transformers, GGUF,  nothing: the finished head is V x H, with equal rows, so that it opens everywhere, and the
    ONNX, GenAI,         runtime multiplies all of it. A tied head is untied by this, which *adds* V H numbers to the
    OpenVINO             file; `describe` says how many
    draft_head.json      beside the finished model: the kept ids, sorted, for runtimes that compute K logits and map
                         them back, such as FR-Spec's own

So take it where training memory or such a runtime asks for it, not for a smaller file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgewright.compress.choice import LayerChoice
from edgewright.errors import RecipeError
from edgewright.method import Method, MethodReport

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.trimmed_head import TrimmedHead
    from edgewright.export.lattice import LatticeTensor

HEAD = "draft_head.json"


class DraftHeadConfig(LayerChoice):
    """A head with rows of its own for the tokens that come most often, and one row for all others (FR-Spec,
    arXiv 2502.14856)."""

    type: Literal["draft_head"] = "draft_head"
    tokens: float = Field(default=0.25, gt=0, allow_inf_nan=False)
    """Tokens that are kept: below 1 a share of the vocabulary, else their number. They are the ones that come most
    often in the text of `generated`, else in the recipe's; the end of a document is always among them."""

    @model_validator(mode="after")
    def _the_head_alone(self) -> Self:
        if self.layers or self.exclude:
            raise ValueError("draft_head takes the output head: remove layers and exclude")
        return self

    def build(self) -> DraftHead:
        return DraftHead(self)

    def kept_of(self, rows: int) -> int:
        """How many of so many tokens are kept.

        Raises:
            RecipeError: EW-845, none or all of them.
        """
        number = int(self.tokens * rows) if self.tokens < 1 else int(self.tokens)
        if not 1 < number < rows - 1:
            raise RecipeError(
                "EW-845",
                "a trimmed head keeps some of the tokens and merges at least two",
                expected=f"tokens: 2 to {rows - 2}, or a share of {rows}",
                found=f"tokens: {self.tokens:g}, which is {number}",
                fix="tokens: 0.25",
            )
        return number

    def leaves(self, model: PreTrainedModel) -> PreTrainedModel:
        from edgewright.compress.trimmed_head import untie

        untie(model)
        return model


class DraftHead(Method):
    """Replaces the output head; a head that is tied to the embedding gets rows of its own."""

    type = "draft_head"
    saves = "of the head's gradients and moments all but the kept rows and one; nothing in the file"
    keeps_names: ClassVar[bool] = False

    def __init__(self, config: DraftHeadConfig) -> None:
        self.config = config
        self._counts: np.ndarray | None = None
        self._eos: int | None = None
        self._name = ""
        self._was_tied = False
        self._ids: list[int] = []

    def read_text(self, counts: Callable[[], np.ndarray], eos_id: int) -> None:
        self._counts, self._eos = counts(), eos_id

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from torch import nn

        from edgewright.compress.layers import CompressedLinear

        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            owner = head.method if isinstance(head, CompressedLinear) else type(head).__name__
            raise RecipeError(
                "EW-711",
                "the output head belongs to another method already",
                expected="a plain linear layer",
                found=owner,
                fix="leave the head out of the other method (head: false)",
            )
        self.config.kept_of(head.out_features)
        return {name: module for name, module in model.named_modules() if module is head}

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the head.

        Raises:
            RecipeError: EW-845, none or all of the tokens are kept; EW-711, another method has the head.
        """
        from edgewright.compress.trimmed_head import TrimmedHead, by_frequency, untie

        ((self._name, head),) = self.chosen(model).items()
        rows = head.out_features
        kept, rest = by_frequency(self._counts, self.config.kept_of(rows), rows, self._eos)
        self._was_tied = head.weight is model.get_input_embeddings().weight
        untie(model)
        model.set_submodule(self._name, TrimmedHead(head, kept, rest))

    def head(self, model: PreTrainedModel) -> TrimmedHead:
        """The trimmed head of a prepared model."""
        from edgewright.compress.trimmed_head import TrimmedHead

        found = model.get_submodule(self._name)
        assert isinstance(found, TrimmedHead)
        return found

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with a plain head of full width, the rows of the tokens that are not kept all alike."""
        from edgewright.compress.layers import merged

        finished = copy.deepcopy(model)
        self._ids = self.head(finished).kept_ids()
        finished.set_submodule(self._name, merged(self.head(finished)))
        return finished, {}

    def write_beside(self, directory: Path) -> None:
        """`draft_head.json`: {"schema_version": 1, "kept": sorted ids}."""
        from edgewright.files import write_json

        write_json(directory / HEAD, {"schema_version": 1, "kept": self._ids})

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """`kept`: tokens with rows of their own; `share_of_text`: of the text that was counted; `added`: numbers that
        the file has more, since the head was tied."""
        from edgewright.compress.layers import cost, skipped

        head = self.head(model)
        numbers = {**cost([head]), "kept": float(len(head.kept_rows)), "share_of_text": head.share_of(self._counts)}
        if self._was_tied:
            numbers["added"] = float(head.out_features * head.in_features)
        return MethodReport(changed=1, skipped=skipped(model), numbers=numbers)
