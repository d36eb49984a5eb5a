"""8-bit AdamW: near AdamW's steps, two bytes a parameter, and saved and restored bit for bit."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgewright.errors import RecipeError
from edgewright.optim.adamw_8bit import AdamW8bitConfig
from edgewright.optim.blockwise_adamw import AdamW8bit
from edgewright.optim.state import named_state, reset_state, restore_state  # noqa: F401 - for SCRIPT


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def train(network, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        network(x).sub(x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_fifty_steps_are_those_of_adamw_within_five_percent():
    ours, theirs = model(), model()
    start = nn.utils.parameters_to_vector(theirs.parameters()).detach().clone()
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    train(ours, AdamW8bit(ours.parameters(), **settings), 50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), 50)
    a, b = (nn.utils.parameters_to_vector(network.parameters()) for network in (ours, theirs))
    assert 0 < (a - b).norm() < 0.05 * (b - start).norm()


def test_small_parameters_are_updated_as_in_float32():
    ours, theirs = (nn.Linear(20, 20) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = AdamW8bit(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(20):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight, rtol=0, atol=1e-6)


def test_the_state_is_tensors_of_two_bytes_a_parameter_and_as_large_as_predicted():
    network = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    config = AdamW8bitConfig()
    optimizer = config.build(network)
    network(torch.randn(4, 512)).sum().backward()
    optimizer.step()
    state = named_state(optimizer, network)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert size == config.state_bytes(network)
    matrices = [tensor for name, tensor in state.items() if name.endswith("weight")]
    assert sum(tensor.numel() * tensor.element_size() for tensor in matrices) / (2 * 512 * 512) <= 2.05


def test_a_llama_of_1b_needs_two_bytes_a_parameter():
    from transformers import LlamaConfig, LlamaForCausalLM  # not above: the process that `SCRIPT` runs in needs none

    with torch.device("meta"):
        config = LlamaConfig(hidden_size=2048, intermediate_size=5461, num_hidden_layers=2, vocab_size=32000)
        llama = LlamaForCausalLM(config)
    assert AdamW8bitConfig().state_bytes(llama) / sum(p.numel() for p in llama.parameters()) <= 2.05


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from test_adamw_8bit import AdamW8bit, load_file, model, named_state, restore_state, save_file, train
network = model()
network.load_state_dict(load_file({folder!r} + "/weights"))
optimizer = AdamW8bit(network.parameters(), lr=1e-2)
restore_state(optimizer, network, load_file({folder!r} + "/state"))
train(network, optimizer, 2, first=5)
save_file(dict(network.state_dict()), {folder!r} + "/weights_after")
save_file(named_state(optimizer, network), {folder!r} + "/state_after")
"""


def test_another_process_goes_on_with_the_same_bits(tmp_path):
    network = model()
    optimizer = AdamW8bit(network.parameters(), lr=1e-2)
    train(network, optimizer, 5)
    save_file(dict(network.state_dict()), tmp_path / "weights")
    save_file(named_state(optimizer, network), tmp_path / "state")
    here = __file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", SCRIPT.format(here=here, folder=str(tmp_path))], check=True)
    train(network, optimizer, 2, first=5)
    for ours, name in ((network.state_dict(), "weights"), (named_state(optimizer, network), "state")):
        theirs = load_file(tmp_path / f"{name}_after")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_torchs_own_state_dict_goes_on_with_the_same_bits():
    ours, theirs = model(), model()
    optimizer = AdamW8bit(ours.parameters(), lr=1e-2)
    train(ours, optimizer, 5)
    theirs.load_state_dict(ours.state_dict())
    other = AdamW8bit(theirs.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    train(ours, optimizer, 2, first=5)
    train(theirs, other, 2, first=5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_reset_forgets_the_moments_of_masked_weights_alone():
    """Code 0 of a signed moment stands for -1: zeroing codes would make up a gradient."""
    network = model()
    optimizer = AdamW8bit(network.parameters(), lr=1e-2)
    train(network, optimizer, 3)
    weight = network[0].weight
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[:10] = True
    kept = weight.detach()[~mask].clone()
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    reset_state(optimizer, weight, mask)
    after = optimizer.state[weight]
    for key in ("state1", "state2"):
        assert torch.equal(after[key][~mask], before[key][~mask])
        assert not torch.equal(after[key][mask], before[key][mask])
    start = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (weight.detach()[mask] - start[mask] * (1 - 1e-2 * 1e-2)).abs().max() < 1e-8
    assert (weight.detach()[~mask] - kept).abs().max() > 1e-4
    reset_state(optimizer, weight, None)
    assert weight not in optimizer.state


def test_a_type_without_a_kernel_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"float64[\s\S]*adamw") as error:
        AdamW8bitConfig().build(nn.Linear(8, 8).double())
    assert error.value.code == "EW-748" and error.value.where == "weight"


def test_it_says_that_it_is_slow_on_a_cpu_and_nothing_on_a_gpu():
    assert len(AdamW8bitConfig().notes("cpu")) == 1
    assert AdamW8bitConfig().notes("cuda") == ()
