"""The vocabulary surgeon: an existing small model gets its target's table of tokens, row by row, by their texts.

Runtimes want a draft whose rows are the target's, padding included. Where two models have the same tokens under other
numbers, or padded otherwise, rows of embedding and head are moved: the row of a token goes to the number that the
target gives it, rows that only pad come from the draft's own padding or are the mean of all rows. What the draft
computes of a text stays what it was, token for token. Where texts of tokens really differ it is refused with the first
one, or, with `missing: mean`, such rows start as the mean of all rows and are left to training.

The report counts what the draft can say from the start: shared tokens, and their share of the text that its stage is
trained on (`generated`, the target's own). That share is a bound on its acceptance before it is trained: whatever the
target says besides is a token that the draft knows nothing of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgewright.derived import Calibration, Derived, DerivedStudentConfig
from edgewright.errors import RecipeError
from edgewright.student import CheckpointStudentConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.recipe import Recipe, StageConfig

MEAN = -1
"""In the place of a row: the mean of all rows."""


class DraftVocabularyConfig(DerivedStudentConfig):
    """An existing small model with the rows of its tokens where its target has them."""

    type: Literal["draft_vocabulary"] = "draft_vocabulary"
    target: CheckpointStudentConfig
    """The model whose tokens and padding it gets; the data's tokenizer is that model's."""
    missing: Literal["refuse", "mean"] = "refuse"
    """What becomes of tokens of the target that the small model does not have."""

    @property
    def made(self) -> str:
        return "given its target's tokens"

    @property
    def speaks(self) -> CheckpointStudentConfig:
        return self.target

    def check(self, source: PreTrainedModel) -> PretrainedConfig:
        return self.architecture(source.config)

    def architecture(self, source: PretrainedConfig) -> PretrainedConfig:
        """The small model's, with the target's number of rows and its special tokens."""
        from edgewright.export.architecture import open_config

        return with_table_of(source, open_config(self.target.model).get_text_config())

    def derive(self, source: PreTrainedModel, calibration: Calibration, seed: int) -> Derived:
        """Move the rows.

        Raises:
            RecipeError: EW-844, a token of the target's is missing.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from edgewright.student import WITHOUT_SDPA

        config = self.architecture(source.config)
        order = align(
            texts_of(calibration.source), texts_of(self.target.model), source.config.vocab_size, config.vocab_size
        )
        if order.missing and self.missing == "refuse":
            raise order.refused(calibration.source, self.target.model)
        state = moved(source, torch.from_numpy(order.rows))
        attention = "eager" if config.model_type in WITHOUT_SDPA else "sdpa"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        model.load_state_dict(state, strict=True)
        counts = calibration.counts()
        record = order.record(counts)
        return Derived(model=model, record=record, summary=order.summary(record))

    def notes(self, recipe: Recipe, stage: StageConfig, parameters: int) -> Iterator[str]:
        """What the two have in common, where the small model is a directory; raises as `derive`."""
        from edgewright.export.architecture import open_config

        if self.source.type == "checkpoint":
            rows = [open_config(path).get_text_config().vocab_size for path in (self.source.model, self.target.model)]
            order = align(texts_of(self.source.model), texts_of(self.target.model), rows[0], rows[1])
            if order.missing and self.missing == "refuse":
                raise order.refused(self.source.model, self.target.model)
            yield order.summary(order.record(None))


@dataclass(frozen=True, slots=True)
class Order:
    """Where the rows of a table come from."""

    rows: np.ndarray
    """int64 [V_target]: the row of the old table for each row of the new one, `MEAN` where there is none."""
    names: dict[int, str]
    """The target's tokens by number."""
    missing: tuple[int, ...]
    """Tokens of the target's that the old table does not have."""
    unmoved: int
    """Tokens that keep their number."""

    def record(self, counts: np.ndarray | None) -> dict[str, Any]:
        """The overlap, for `start.json`.

        Args:
            counts: [V] how often the target says each token.
        """
        shared = np.array(sorted(set(self.names) - set(self.missing)), np.int64)
        said = None
        if counts is not None and counts.sum():
            said = float(counts[shared[shared < len(counts)]].sum() / counts.sum())
        return {
            "tokens": len(self.names),
            "shared": len(shared),
            "unmoved": self.unmoved,
            "padding": len(self.rows) - len(self.names),
            "first_missing": self.names[self.missing[0]] if self.missing else None,
            "share_of_text": said,
        }

    def summary(self, record: dict[str, Any]) -> str:
        """The same in a line."""
        said = record["share_of_text"]
        bound = "" if said is None else f"; it can say {said:.2%} of the target's text before training"
        first = record["first_missing"]
        lacks = "" if first is None else f"; the first missing is {first!r}"
        return (
            f"{record['shared']:,} of the target's {record['tokens']:,} tokens are there, {record['unmoved']:,} in "
            f"their place, {record['padding']:,} rows pad{bound}{lacks}"
        )

    def refused(self, source: Path, target: Path) -> RecipeError:
        """EW-844."""
        first = self.missing[0]
        return RecipeError(
            "EW-844",
            f"the small model lacks tokens of the target's: the first is token {first}",
            where=source.absolute(),
            expected=f"{self.names[first]!r} as in {target}",
            found=f"no such token, and {len(self.missing) - 1:,} more of {len(self.names):,} are missing",
            fix="train a new draft, student: {type: draft}, or set missing: mean and train those tokens",
        )


def align(ours: dict[int, str], theirs: dict[int, str], rows: int, target_rows: int) -> Order:
    """Where each row of the target's table is in ours, by the texts of tokens.

    Args:
        ours, theirs: tokens by number.
        rows, target_rows: of the two tables, padding included.
    """
    number = {text: token for token, text in ours.items()}
    spare = iter(sorted(set(range(rows)) - ours.keys()))
    found = np.full(target_rows, MEAN, np.int64)
    missing = []
    for token in range(target_rows):
        text = theirs.get(token)
        if text is None:
            found[token] = next(spare, MEAN)
        elif text in number and number[text] < rows:
            found[token] = number[text]
        else:
            missing.append(token)
    names = {token: text for token, text in theirs.items() if token < target_rows}  # a tokenizer may have more
    unmoved = sum(found[token] == token for token in names)
    return Order(rows=found, names=names, missing=tuple(missing), unmoved=int(unmoved))


def texts_of(directory: Path) -> dict[int, str]:
    """A tokenizer's tokens by number."""
    from edgewright.data.tokenizer import load_encoder

    vocabulary = load_encoder(directory).tokenizer.get_vocab(with_added_tokens=True)
    return {token: text for text, token in vocabulary.items()}


def with_table_of(source: PretrainedConfig, target: PretrainedConfig) -> PretrainedConfig:
    """A configuration with another one's rows and special tokens."""
    settings = {
        name: value for name, value in source.to_dict().items() if name not in ("_name_or_path", "transformers_version")
    }
    of_table = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    theirs = target.to_dict()
    settings |= {name: theirs[name] for name in of_table if name in theirs}
    return type(source).from_dict(settings)


def moved(model: PreTrainedModel, rows: Tensor) -> dict[str, Tensor]:
    """A model's state with the rows of embedding and head, and the head's bias, in another order.

    Args:
        rows: int64 [V_new], `MEAN` for the mean of all rows.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(embedding.weight), id(head.weight)} | ({id(head.bias)} if head.bias is not None else set())
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in tables:
                new = tensor[rows.clamp_min(0).to(tensor.device)]
                new[rows.to(tensor.device) == MEAN] = tensor.mean(0)
                state[name] = new.cpu()
            else:
                state[name] = tensor.detach().cpu()
    return state
