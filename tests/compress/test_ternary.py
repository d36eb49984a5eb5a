"""Ternary training: the rule, the straight-through gradient, the layer, and the method as a whole."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgewright.compress.ternary import TernaryConfig
from edgewright.compress.ternary_linear import TernaryLinear
from edgewright.errors import RecipeError
from edgewright.method import StepContext

GRANULARITIES = ("tensor", "row", "group")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def _context(step, total=10):
    return StepContext(
        step=step,
        total_steps=total,
        reset_state=lambda parameter, mask: None,
        reset_all_state=lambda: None,
        rewarm=lambda steps: None,
    )


def test_gradient_passes_straight_through_also_to_dead_weights():
    layer = TernaryLinear(nn.Linear(256, 16, bias=False))
    x = torch.randn(5, 256)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(16, 256))
    dead = layer.round()[0] == 0
    assert torch.count_nonzero(layer.weight.grad[dead]) == dead.sum()


def test_int8_activations_follow_the_formula():
    layer = TernaryLinear(nn.Linear(256, 4, bias=False), quantize_activations=True)
    x = torch.randn(3, 256, requires_grad=True)
    a = 127 / x.detach().abs().amax(-1, keepdim=True)
    expected = (torch.round(x.detach() * a).clamp(-128, 127) / a) @ layer.effective_weight().T
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    output.sum().backward()
    torch.testing.assert_close(x.grad, layer.effective_weight().detach().sum(0).expand(3, 256))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_finish_reproduces_the_training_forward_bit_for_bit(model, granularity):
    method = TernaryConfig(granularity=granularity).build()
    method.prepare(model)
    before = copy.deepcopy(model.state_dict())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        trained = model(tokens).logits
        plain, lattice = method.finish(model)
        assert torch.equal(plain(tokens).logits, trained)
    assert len(lattice) == 7
    weights = plain.state_dict()
    for name, tensor in lattice.items():
        assert np.array_equal(tensor.dequantize(), weights[name].numpy())
        assert type(plain.get_submodule(name.removesuffix(".weight"))) is nn.Linear
    for name, value in model.state_dict().items():  # finish is pure: the latents are untouched
        assert torch.equal(value, before[name])


def test_bf16_save_keeps_every_weight_of_the_lattice(model):
    method = TernaryConfig(granularity="row").build()
    method.prepare(model)
    plain, lattice = method.finish(model)
    for name in lattice:
        weight = plain.state_dict()[name]
        assert torch.equal(weight.bfloat16().float(), weight)


def test_warm_up_goes_from_full_precision_to_the_lattice(model):
    method = TernaryConfig(warmup_ratio=0.5).build()
    method.prepare(model)
    layer = model.model.layers[0].mlp.up_proj
    strengths = []
    for step in range(10):
        method.before_step(_context(step))
        strengths.append(layer.strength)
    assert strengths == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_describe_counts_what_changed(model):
    method = TernaryConfig().build()
    assert method.describe(model).changed == 0
    method.prepare(model)
    report = method.describe(model)
    assert report.changed == 7
    assert report.skipped == ("lm_head",)
    assert 0.25 < report.numbers["zeros"] < 0.45
    assert report.numbers["weights"] == 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512


def test_a_group_that_does_not_divide_a_row_is_refused_by_name():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(RecipeError, match=r"self_attn\.q_proj[\s\S]*128 columns"):
        TernaryConfig(granularity="group").build().prepare(model)


def test_exclude_matches_whole_parts_of_names(model):
    method = TernaryConfig(exclude=("down_proj", "0.self_attn.q_proj")).build()
    method.prepare(model)
    report = method.describe(model)
    assert report.changed == 5
    assert set(report.skipped) == {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"}


@pytest.mark.parametrize("pattern", ["dwn_proj", "proj", "lm_hed"])
def test_an_exclude_that_matches_nothing_is_an_error(model, pattern):
    with pytest.raises(RecipeError, match=f"EW-708[\\s\\S]*{pattern}"):
        TernaryConfig(exclude=(pattern,)).build().prepare(model)


def test_a_tied_head_is_not_made_ternary(model):
    with pytest.raises(RecipeError, match="EW-709"):
        TernaryConfig(head=True).build().prepare(model)


def test_an_untied_head_can_be_ternary(model):
    from edgewright.student import output_head

    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    method = TernaryConfig(head=True).build()
    method.prepare(model)
    assert method.describe(model).changed == 8
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[0]
        assert torch.equal(output_head(model)(hidden), model(tokens).logits[0])
        plain, lattice = method.finish(model)
        assert "lm_head.weight" in lattice
        assert torch.equal(plain(tokens).logits, model(tokens).logits)


def test_a_head_of_another_kind_is_refused_not_ignored(model):
    from edgewright.student import output_head

    class Odd(nn.Linear):
        pass

    model.lm_head = Odd(256, 64, bias=False)
    with pytest.raises(RecipeError, match="EW-707"):
        output_head(model)


def test_training_moves_the_codes(model):
    method = TernaryConfig().build()
    method.prepare(model)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.round()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(32)[None]
    losses = []
    for _ in range(20):  # without a method's hooks: the layer sees by itself that its weight has changed
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(layer.round()[0], before)


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("Qwen2", {}, r"self_attn\.o_proj|mlp\.down_proj"),
        ("BitNet", {"hidden_act": "silu"}, r"mlp\.down_proj"),
        ("Llama", {}, r"lm_head"),
    ],
)
def test_an_architecture_without_a_place_for_the_bias_is_refused_by_name(family, settings, named):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(RecipeError, match=rf"({named})[\s\S]*EW-732"):
        TernaryConfig(quantizer="tequila", head=family == "Llama").build().prepare(model)
    if family == "BitNet":
        TernaryConfig(quantizer="tequila", layers=("q_proj",)).build().prepare(model)


def test_biases_that_are_there_stay_and_others_of_the_kind_are_zero():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            attention_bias=True,
        )
    )  # fmt: skip
    attention = model.model.layers[0].self_attn
    nn.init.normal_(attention.q_proj.bias)
    own = attention.q_proj.bias.detach().clone()
    method = TernaryConfig(quantizer="tequila", layers=("q_proj", "up_proj"), dead_bias=0.1).build()
    method.prepare(model)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        plain, _ = method.finish(model)
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits)
    assert plain.config.mlp_bias is True and model.config.mlp_bias is False
    layer = plain.model.layers[0]
    dead = (attention.q_proj.round()[0] == 0) * attention.q_proj.weight.detach()
    torch.testing.assert_close(layer.self_attn.q_proj.bias.detach(), own + 0.1 * dead.sum(1))
    assert layer.mlp.up_proj.bias.abs().max() > 0
    assert torch.count_nonzero(layer.mlp.gate_proj.bias) == torch.count_nonzero(layer.mlp.down_proj.bias) == 0


def test_groups_of_four_must_fit_the_rows():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=98, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(RecipeError, match=r"mlp\.down_proj[\s\S]*98 columns to be a multiple of 4"):
        TernaryConfig(quantizer="sherry").build().prepare(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group": 64}, "group is of granularity: group alone, not of row"),
        ({"group": 64, "granularity": "tensor"}, "not of tensor"),
        ({"head": True, "quantize_activations": True}, "does not reach the head"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        TernaryConfig(**settings)


def test_a_resolved_recipe_is_accepted_with_all_its_defaults():
    config = TernaryConfig()
    assert TernaryConfig.model_validate(config.model_dump()) == config
