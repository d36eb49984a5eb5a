"""Packed rows: what is predicted, where positions restart, what is masked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.data import IGNORED, Batches, TokenStream
from edgewright.errors import BadInput

BOS, EOS = 1, 2


def stream(tokens: list[int]) -> TokenStream:
    return TokenStream(tokens=np.array(tokens, dtype=np.uint16), documents=1, bytes=len(tokens))


def batches(tokens: list[int], length: int, *, start: int = EOS, restart: bool = True, seed: int = 3) -> Batches:
    return Batches(
        stream(tokens), sequence_length=length, seed=seed, restart_at_documents=restart, start_id=start, eos_id=EOS
    )


tokens_lists = st.lists(st.integers(1, 9), min_size=20, max_size=200)


@settings(deadline=None, max_examples=50)
@given(tokens_lists, st.integers(2, 12))
def test_rows_rebuild_the_stream_and_labels_are_the_next_tokens(tokens: list[int], length: int) -> None:
    data = batches(tokens, length)
    batch = data.rows(list(range(len(data))))
    assert batch.input_ids.ravel().tolist() == tokens[: len(data) * length]
    assert batch.labels.ravel().tolist() == tokens[1 : len(data) * length + 1]
    assert batch.valid_tokens == batch.labels.size
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype) == (np.int64,) * 3
    assert batch.document_ids.dtype == np.int32


@settings(deadline=None, max_examples=50)
@given(tokens_lists, st.integers(2, 12), st.sampled_from([BOS, EOS]))
def test_positions_and_segments_against_a_plain_loop(tokens: list[int], length: int, start: int) -> None:
    data = batches(tokens, length, start=start)
    batch = data.rows(list(range(len(data))))
    for row in range(len(data)):
        position, document = -1, 0
        for column, token in enumerate(batch.input_ids[row]):
            position += 1
            if token == start and column:
                position, document = 0, document + 1
            assert batch.position_ids[row, column] == position
            assert batch.document_ids[row, column] == document
    assert batch.has_borders == bool(batch.document_ids.max() > 0)


def test_the_start_of_a_document_is_not_predicted_when_it_has_a_token_of_its_own() -> None:
    batch = batches([BOS, 5, EOS, BOS, 6, EOS, BOS, 7, EOS], 4, start=BOS).rows([0, 1])
    assert batch.input_ids.tolist() == [[BOS, 5, EOS, BOS], [6, EOS, BOS, 7]]
    assert batch.labels.tolist() == [[5, EOS, IGNORED, 6], [EOS, IGNORED, 7, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch.valid_tokens == 6


def test_one_separator_ends_a_document_and_starts_the_next() -> None:
    batch = batches([EOS, 5, 6, EOS, 7, 8, 9, EOS, 3], 8).rows([0])
    assert batch.labels.tolist() == [[5, 6, EOS, 7, 8, 9, EOS, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]


def test_documents_may_flow_into_each_other_if_the_recipe_says_so() -> None:
    batch = batches([EOS, 5, EOS, 6, EOS, 7, EOS], 6, restart=False).rows([0])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert not batch.document_ids.any() and not batch.has_borders


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 9))
def test_the_order_does_not_depend_on_the_batch_size(position: int, first: int, second: int) -> None:
    data = batches(list(range(10, 10 + 7 * 5 + 1)), 5)
    whole = data.batch(position, first + second)
    parts = [data.batch(position, first), data.batch(position + first, second)]
    assert whole.indices == [index for part in parts for index in part.indices]
    assert np.array_equal(whole.input_ids, np.concatenate([part.input_ids for part in parts]))


def test_an_epoch_sees_every_sequence_once() -> None:
    data = batches(list(range(10, 10 + 7 * 5 + 3)), 5)
    assert len(data) == 7
    for epoch in range(3):
        assert sorted(data.batch(epoch * 7, 7).indices) == list(range(7))


def test_a_stream_shorter_than_a_sequence_is_refused() -> None:
    batches([EOS, 5, 6, EOS], 3)
    with pytest.raises(BadInput, match="more than 4 tokens") as caught:
        batches([EOS, 5, 6, EOS], 4)
    assert caught.value.code == "EW-212"
