"""What a stage says of that with which it does not go on."""

import pytest
from transformers.utils import logging

from edgewright.continuation import start_notes, without_load_report
from edgewright.recipe import Recipe

SEQ, TEQUILA = {"type": "ternary", "quantizer": "seq_ternary"}, {"type": "ternary", "quantizer": "tequila"}
FACTORS = {"type": "lowrank", "rank": 8}
RELORA = {**FACTORS, "relora": {"merge_every": 100}}


def notes(*methods: dict | None) -> list[str]:
    """Of the last stage of a chain whose stages have these methods; the first begins with a preset."""
    starts = [{"type": "preset"}, *({"type": "stage", "stage": str(number)} for number in range(len(methods) - 1))]
    stages = [
        {"name": str(number), "student": start, "methods": [method] if method else [], "budget": {"max_steps": 300}}
        for number, (start, method) in enumerate(zip(starts, methods, strict=True))
    ]
    data = {"type": "files", "files": "*.txt", "tokenizer": {"type": "train", "vocab_size": 300}}
    recipe = Recipe.model_validate({"version": 1, "name": "chain", "data": data, "stages": stages})
    return start_notes(recipe, recipe.stages[-1])


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([SEQ, {**SEQ, "quantizer": "seq_2bit"}], "the learned scales of stage 0"),
        ([SEQ, {**SEQ, "granularity": "tensor"}], "the learned scales of stage 0"),
        ([SEQ, {**SEQ, "exclude": ["q_proj"]}], "some of the learned scales of stage 0"),
        ([{**SEQ, "layers": ["q_proj", "k_proj"]}, {**SEQ, "layers": ["q_proj"]}], "some of the learned scales"),
        ([SEQ, None], "the learned scales of stage 0"),
        ([TEQUILA, SEQ], "the biases of dead weights of stage 0"),
        ([TEQUILA, None], "the biases of dead weights of stage 0"),
        ([RELORA], "those of a preset are random"),
        ([None, {**FACTORS, "init": "cola"}], "draws new weights"),
    ],
)
def test_what_is_lost_is_told(methods, words):
    (note,) = notes(*methods)
    assert words in note


@pytest.mark.parametrize(
    "methods",
    [
        [SEQ],
        [SEQ, SEQ],
        [{**SEQ, "exclude": ["q_proj"]}, SEQ],
        [TEQUILA, TEQUILA],
        [{"type": "ternary"}, SEQ],
        [None, RELORA],
        [FACTORS, SEQ],
        [FACTORS],
    ],
)
def test_where_nothing_is_lost_there_is_nothing_to_tell(methods):
    assert notes(*methods) == []


def test_transformers_is_quiet_for_as_long_as_it_is_asked_to_be():
    before = logging.get_verbosity()
    with without_load_report():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before
