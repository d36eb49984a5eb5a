"""Muon and AdamW as one optimizer: each does what torch's own does, and one state holds both."""

import copy

import torch
from torch import nn

from edgewright.optim.muon import MuonConfig
from edgewright.optim.muon_adamw import Muon
from edgewright.optim.state import named_state, restore_state


class Block(nn.Module):
    """Names as a Llama has them."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 20, bias=False)

    def forward(self, ids):
        return self.head(self.mlp(self.embed_tokens(ids)))


def block():
    torch.manual_seed(0)
    return Block()


def train(model, steps, step, first=0):
    for number in range(first, first + steps):
        ids = torch.randint(0, 20, (8, 12), generator=torch.Generator().manual_seed(number))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flip(1).flatten()).backward()
        step()
        model.zero_grad()


def test_both_halves_are_torchs():
    ours, theirs = block(), block()
    config = MuonConfig(learning_rate=1e-2)
    optimizer = config.build(ours)
    train(ours, 5, optimizer.step)
    hidden = [theirs.mlp[0].weight, theirs.mlp[2].weight]
    rest = [theirs.embed_tokens.weight, theirs.head.weight]
    vectors = [theirs.mlp[0].bias, theirs.mlp[2].bias]
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    train(theirs, 5, lambda: (muon.step(), adamw.step()))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_state_goes_on_with_the_same_bits_and_is_as_large_as_predicted():
    ours, theirs = block(), block()
    config = MuonConfig(learning_rate=1e-2)
    optimizer, by_name, by_torch = config.build(ours), config.build(theirs), config.build(twin := block())
    train(ours, 3, optimizer.step)
    state = named_state(optimizer, ours)
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == config.state_bytes(ours)
    for other in (theirs, twin):
        other.load_state_dict(ours.state_dict())
    restore_state(by_name, theirs, {key: tensor.clone() for key, tensor in state.items()})
    by_torch.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((ours, optimizer), (theirs, by_name), (twin, by_torch)):
        for group in each.param_groups:
            group["lr"] = 5e-3
        train(model, 2, each.step, first=3)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_one_half_alone_will_do():
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = Muon([{"params": [weight], "muon": True}], lr=0.1)
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(4, 3))
