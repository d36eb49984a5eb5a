"""Moments stored in 32, 16 and 8 bits: what is read back is what was written, within what each can hold."""

import pytest
import torch

from edgewright.optim.storage import BLOCK, SMALLEST_INT8, code_book, moment_storage

CPU = torch.device("cpu")


def moment(signed, shape=(50, 101)):
    """Values of very different sizes, not a whole number of blocks."""
    torch.manual_seed(0)
    values = torch.randn(shape) * torch.logspace(-6, 2, shape[0])[:, None]
    return values if signed else values.square()


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_err_by_half_a_gap_of_the_code_book_at_most_in_every_block(signed):
    state, values = {}, moment(signed)
    storage = moment_storage("int8", signed=signed)
    storage.write(state, "m", values.clone())
    error = (storage.read(state, "m") - values).abs().flatten()
    book = code_book(signed, CPU)
    half = (book[1:] - book[:-1]).max() / 2
    for start in range(0, values.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        assert error[block].max() <= values.flatten()[block].abs().max() * half * 1.005
    assert error.max() > 0


def test_fp32_is_exact_and_bf16_keeps_eight_bits():
    values = moment(True)
    for states, limit in (("fp32", 0.0), ("bf16", 2.0**-7)):
        state = {}
        storage = moment_storage(states, signed=True)
        storage.write(state, "m", values.clone())
        assert ((storage.read(state, "m") - values).abs() <= limit * values.abs()).all()


def test_a_second_moment_in_bf16_decays_as_it_does_in_fp32():
    """beta2 = 0.999 a step is less than half a unit in the last place: to nearest, nothing would ever change."""
    torch.manual_seed(0)
    state = {}
    storage = moment_storage("bf16", signed=False)
    storage.write(state, "v", torch.full((64, 64), 1.0))
    for _ in range(300):
        storage.write(state, "v", storage.read(state, "v") * 0.999)
    assert storage.read(state, "v").mean() == pytest.approx(0.999**300, rel=3e-3)
    nearest = torch.tensor(1.0, dtype=torch.bfloat16)
    assert nearest * 0.999 == nearest


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("signed", [True, False])
def test_zero_forgets_where_the_mask_is_and_nothing_else(states, signed):
    state, values = {}, moment(signed)
    storage = moment_storage(states, signed=signed)
    storage.write(state, "m", values.clone())
    before = storage.read(state, "m").clone()
    mask = torch.zeros(values.shape, dtype=torch.bool)
    mask[7:20, 3:90] = True
    storage.zero(state, "m", mask)
    after = storage.read(state, "m")
    assert (after[mask] == 0).all()
    assert torch.equal(after[~mask], before[~mask])


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(50, 101), (10, 10), (16, SMALLEST_INT8)])
def test_the_predicted_bytes_are_those_of_the_state(states, shape):
    state = {}
    storage = moment_storage(states, signed=True)
    storage.write(state, "m", moment(True, shape))
    assert sum(t.numel() * t.element_size() for t in state.values()) == storage.nbytes(shape[0] * shape[1])


def test_small_moments_stay_float32_and_zeros_stay_zeros():
    storage = moment_storage("int8", signed=True)
    state, values = {}, moment(True, (40, 40))
    storage.write(state, "m", values.clone())
    assert torch.equal(storage.read(state, "m"), values)
    storage.write(state, "m", torch.zeros(100, 100))
    assert state["m"].dtype == torch.uint8
    assert (storage.read(state, "m") == 0).all()
