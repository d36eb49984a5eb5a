"""Every method under torch.compile and bf16 autocast: one graph, and the loss and gradients of the plain forward."""

import pytest
import torch
from methods import CASES, Loop, prepared, tokens
from torch._dynamo.utils import counters

from edgewright.compress.ternary import TernaryConfig

FIRST = {case.config.type: case for case in reversed(CASES)}.values()
"""The first case of each method."""


def passes(case, *, compiled):
    """(loss, gradient of everything) of two batches."""
    model, method = prepared(case.config)
    model.train()
    if compiled:
        model.base_model.compile(dynamic=False)
    found = []
    for seed in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.base_model(input_ids=tokens(seed=seed), use_cache=False).last_hidden_state
        loss = hidden.float().pow(4).mean()
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append((loss.detach(), torch.cat(gradients).clone()))
        model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("case", list(FIRST), ids=lambda case: case.name)
def test_a_compiled_model_is_the_same(case):
    torch._dynamo.reset()
    counters.clear()
    for (loss, gradient), (again, compiled) in zip(
        passes(case, compiled=False), passes(case, compiled=True), strict=True
    ):
        torch.testing.assert_close(again, loss, rtol=0.01, atol=0)
        assert float((compiled - gradient).norm() / gradient.norm()) < 0.02
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("quantizer", ["absmean", "tequila", "seq_ternary", "sherry"])
def test_the_warm_up_of_the_lattice_needs_no_second_graph(quantizer):
    torch._dynamo.reset()
    counters.clear()
    model, method = prepared(TernaryConfig(quantizer=quantizer, warmup_ratio=0.8))
    model.base_model.compile(dynamic=False, backend="eager")
    Loop(model, method, total_steps=10).run(4)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
