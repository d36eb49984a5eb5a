"""Learned masks: the formula, exactly the shape that was asked for, and the finished model is the masked one."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from decoders import FAMILIES, decoder, logits, text
from safetensors.torch import load_file

import edgewright
from edgewright.compress.gates import HIGH, LOW, START, TEMPERATURE, Gates
from edgewright.compress.shape import Shape
from edgewright.compress.shear import ShearConfig
from edgewright.data import Batches
from edgewright.errors import RecipeError
from edgewright.method import StepContext
from edgewright.training import Interrupted

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def context(step: int = 0, total: int = 10) -> StepContext:
    return StepContext(
        step=step,
        total_steps=total,
        reset_state=lambda parameter, mask: None,
        reset_all_state=lambda: None,
        rewarm=lambda steps: None,
    )


def sheared(family: str = "llama", **settings):
    """(model with gates, the method)."""
    torch.manual_seed(3)
    model, method = decoder(family), ShearConfig.model_validate({**SIZES, **settings}).build()
    method.prepare(model)
    return model, method


def with_random_masks(method) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gates in method.gated.gates.values():
            gates.log_alpha.copy_(torch.randn(gates.log_alpha.shape, generator=generator) * 3)


def test_a_gate_is_open_as_often_as_the_formula_says() -> None:
    """Against drawing u and computing s and z step by step in float64; P(z = 0) at the start is 0.0014."""
    generator = torch.Generator().manual_seed(0)
    for log_alpha in (-3.0, -1.0, 0.0, 1.0, 3.0):
        gates = Gates(1, 1, 1)
        gates.log_alpha.data.fill_(log_alpha)
        u = torch.rand(200_000, generator=generator, dtype=torch.float64)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / TEMPERATURE)
        z = (s * (HIGH - LOW) + LOW).clamp(0, 1)
        assert gates.probabilities().item() == pytest.approx(float((z > 0).double().mean()), abs=0.005)
        gates.train().set_noise(u[:1].float()[None])
        assert gates.open().item() == pytest.approx(float(z[0]), abs=1e-5)
    assert 1 - Gates(1, 1, 1).probabilities().item() == pytest.approx(0.0014, abs=5e-5) and START == 5.0


def test_the_lagrangian_is_0_at_the_target_and_its_gradient_is_that_of_finite_differences() -> None:
    gates = Gates(2, 8, 4).double()
    gates.multipliers.data = torch.tensor([[0.7, 0.7], [1.3, 1.3]], dtype=torch.float64)
    gates.log_alpha.data = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.autograd.gradcheck(lambda a: _lagrangian(gates, a), (gates.log_alpha.detach().clone().requires_grad_(),))
    gates.log_alpha.data.fill_(-40.0)
    gates.log_alpha.data[:, :4] = 40.0
    assert gates.lagrangian(1.0).item() == pytest.approx(0.0, abs=1e-12)
    assert gates.lagrangian(0.0).item() == pytest.approx(0.7 * -0.5 + 1.3 * 0.25, abs=1e-9)


def _lagrangian(gates: Gates, log_alpha: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(_Lagrangian(gates), {"gates.log_alpha": log_alpha}, (0.6,))


class _Lagrangian(torch.nn.Module):
    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self.gates = gates

    def forward(self, progress: float) -> torch.Tensor:
        return self.gates.lagrangian(progress)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_finished_model_has_the_shape_and_is_the_masked_one(family: str) -> None:
    """Masks as they would be fixed, in evaluation, against the model that is cut out."""
    model, method = sheared(family)
    with_random_masks(method)
    small, lattice = method.finish(model)
    wanted = Shape.of(small.config).numbers()
    assert {name: wanted[name] for name in SIZES} == SIZES and not lattice
    assert all(type(module) is torch.nn.Linear for name, module in small.named_modules() if name.endswith("_proj"))
    torch.testing.assert_close(logits(small), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_open_gates_leave_the_model_as_it_is() -> None:
    plain = logits(decoder("llama"))
    model, method = sheared()
    model.train()
    for gates in method.gated.gates.values():
        gates.set_noise(torch.full(gates.log_alpha.shape, 0.999))
    assert torch.equal(method.gated.gates["hidden"].open(), torch.ones(1, 64))
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 32}, {"num_key_value_heads": 2}, {"num_attention_heads": 4}, {"num_hidden_layers": 1}],
    ids=str,
)
def test_only_what_is_pruned_has_gates(sizes: dict[str, int]) -> None:
    model = decoder("llama")
    method = ShearConfig.model_validate(sizes).build()
    method.prepare(model)
    assert len(method.gated.gates) == 1
    with_random_masks(method)
    small, _ = method.finish(model)
    assert {name: Shape.of(small.config).numbers()[name] for name in sizes} == sizes
    torch.testing.assert_close(logits(small), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_training_brings_the_masks_to_their_targets_and_prunes_what_is_useless() -> None:
    """Half of the intermediate channels are dead: those are closed."""
    torch.manual_seed(0)
    model = decoder("llama")
    with torch.no_grad():
        for block in model.base_model.layers:
            block.mlp.down_proj.weight[:, 1::3] = 0
            block.mlp.up_proj.weight[1::3] = 0
    method = ShearConfig(intermediate_size=64, mask_learning_rate=0.3).build()
    method.prepare(model)
    model.train()
    inputs = text(8, 12)
    targets = torch.softmax(4 * _teacher_logits(inputs), -1)
    for step in range(200):
        method.before_step(context(step, 200))
        got = model(input_ids=inputs.input_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(got.flatten(0, 1), targets.flatten(0, 1)) + method.penalty()
        loss.backward()
        method.after_backward(context(step, 200))
        model.zero_grad()
    gates = method.gated.gates["ffn"]
    assert (gates.probabilities().mean(1) - 64 / 96).abs().max().item() < 0.1
    kept = gates.kept()
    dead = (kept % 3 == 1).float().mean()
    assert kept.shape == (4, 64) and dead < 0.1, dead


def _teacher_logits(inputs) -> torch.Tensor:
    model = decoder("llama")
    with torch.no_grad():
        for block in model.base_model.layers:
            block.mlp.down_proj.weight[:, 1::3] = 0
        return model(input_ids=inputs.input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"hidden_size": 33}, "EW-762", "32 or 64"),
        ({"num_hidden_layers": 5}, "EW-762", "nearest that can be: 4"),
        ({"num_attention_heads": 3}, "EW-762", "the nearest: "),
        ({"hidden_size": 64}, "EW-762", "nothing would be pruned"),
    ],
)
def test_shapes_that_cannot_be_reached(settings, code, said) -> None:
    with pytest.raises(RecipeError) as caught:
        ShearConfig.model_validate(settings).build().chosen(decoder("llama"))
    assert caught.value.code == code and said in caught.value.message()


STAGES = """
  - name: small
    student: {type: stage, stage: base}
    optimizer: {type: adamw, learning_rate: 2e-3}
    budget: {max_steps: 4}
    training: {per_device_train_batch_size: 4, save_steps: 3, eval_steps: 0, eval_sequences: 4}
"""


def shear_recipe(folder: Path) -> Path:
    path = write_recipe(folder)
    content = path.read_text().replace("num_hidden_layers: 1", "num_hidden_layers: 3")
    method = "    methods: [{type: shear, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2, ramp: 0.5}]\n"
    content = content.replace("    optimizer:", method + "    optimizer:", 1)
    path.write_text(content.replace("evaluate: null", STAGES.strip("\n") + "\nevaluate: null"))
    return path


def test_a_run_shears_and_a_later_stage_goes_on_and_a_stop_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    recipe = shear_recipe(tmp_path)
    assert edgewright.check(recipe).ok
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
    for stage in ("base", "small"):
        config = json.loads((tmp_path / f"whole/stages/{stage}/model/config.json").read_text())
        assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (32, 32, 2)
    planned = json.loads((tmp_path / "whole/plan.json").read_text())
    assert "problem" not in planned and planned["stages"]  # gates can be made without memory
    results = json.loads((tmp_path / "whole/results.json").read_text())["stages"][0]["methods"]["shear"]
    assert results["kept"] < 0.5 and {"hidden_open", "ffn_open", "block_open"} <= results.keys()
    original, calls = Batches.batch, []

    def batch(self, position, size):
        calls.append(position)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, position, size)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", batch)
        with pytest.raises(Interrupted):
            edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / n / "stages/small/model/model.safetensors") for n in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
