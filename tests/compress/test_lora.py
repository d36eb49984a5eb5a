"""Adapters beside frozen weights: against peft's own models, over 4 bits, with blocks trained whole, in whole runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from methods import Loop, difference, logits, prepared, small_model, tokens
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

import edgewright
from edgewright.compress.adapted_linear import AdaptedLinear
from edgewright.compress.four_bits import FourBitLinear
from edgewright.compress.lora import LoraConfig
from edgewright.compress.ternary import TernaryConfig
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dora", [False, True])
def test_it_trains_as_peft_does(dora):
    ours, method = prepared(LoraConfig(rank=4, alpha=8.0, dora=dora))
    settings = PeftConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=EVERY, task_type="CAUSAL_LM")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # of transformers, which peft still asks
        theirs = get_peft_model(small_model(), settings)
    start = {name.replace(".adapted", ""): tensor for name, tensor in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.base_model.model.named_parameters():
            parameter.copy_(start[name])
    Loop(ours, method).run(6)
    Loop(theirs, method).run(6)
    assert difference(logits(ours), logits(theirs)) < 1e-6
    plain, _ = method.finish(ours)
    merged = theirs.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_formula_of_dora_in_float64():
    model, method = prepared(LoraConfig(rank=4, alpha=6.0, dora=True))
    Loop(model, method).run(3)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    adapted = layer.adapted
    parts = (layer.base.weight, adapted.lora_A.default.weight, adapted.lora_B.default.weight)
    base, a, b = (part.double() for part in parts)
    whole = base + 6.0 / 4 * b @ a
    expected = adapted.lora_magnitude_vector.default.weight.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    assert difference(layer.effective_weight().detach().double(), expected.detach()) < 1e-6
    assert difference(expected.detach(), base) > 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_get_gradients(dora):
    model, method = prepared(LoraConfig(rank=4, dora=dora))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained_names(model)
    assert all(any(part in name for part in parts) for name in with_gradient)
    assert len(with_gradient) == 14 * (3 if dora else 2)
    frozen = method.describe(model).numbers["frozen"]
    plain = small_model()
    linear = sum(m.weight.numel() for n, m in plain.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n)
    assert frozen == sum(p.numel() for p in plain.parameters()) - linear


def test_what_is_frozen_stays_bit_for_bit():
    model, method = prepared(LoraConfig(rank=4))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    Loop(model, method).run(4)
    assert before
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_some_blocks_whole_and_adapters_elsewhere():
    model, method = prepared(LoraConfig(rank=4, train_blocks=(-1,), train_norms=True))
    assert method.describe(model).changed == 7
    assert not any(isinstance(module, AdaptedLinear) for module in model.model.layers[1].modules())
    block = {f"model.layers.1.{name}" for name, _ in model.model.layers[1].named_parameters()}
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert {name for name in trained_names(model) if "lora" not in name} == block | norms
    before = {name: p.clone() for name, p in model.named_parameters()}
    Loop(model, method).run(3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained_names(model)


@pytest.mark.parametrize("number, nearest", [(2, 1), (7, 1), (-3, -2)])
def test_a_block_that_is_not_there_is_refused(number, nearest):
    with pytest.raises(RecipeError) as error:
        prepared(LoraConfig(rank=4, train_blocks=(number,)))
    assert error.value.code == "EW-734"
    assert f"[{nearest}]" in error.value.fix


def test_a_rank_above_the_matrix_is_refused_with_the_largest():
    with pytest.raises(RecipeError) as error:
        prepared(LoraConfig(rank=200))
    assert error.value.code == "EW-720"
    assert "k_proj" in error.value.what and "rank: 128" in error.value.fix


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    linear = nn.Linear(128, 96)
    layer = FourBitLinear(linear, kind)
    codes, state = quantize_4bit(linear.weight.data, quant_type=kind, blocksize=64)
    expected = dequantize_4bit(codes, state)
    assert torch.equal(layer.weight, expected)
    x = torch.randn(5, 128, requires_grad=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, linear.bias))
    assert layer.codes.numel() == linear.weight.numel() // 2 and not list(layer.parameters())[1:]
    other = FourBitLinear(nn.Linear(128, 96), kind)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, expected)


def test_over_four_bits_adapters_are_merged_into_the_dequantized_weights():
    model, method = prepared(LoraConfig(rank=4, quantize_base="nf4"))
    Loop(model, method).run(3)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    plain, _ = method.finish(model)
    update = layer.adapted.get_delta_weight("default")
    merged = plain.get_submodule(name).weight
    assert torch.equal(merged, layer.base.weight + update)
    original = small_model().get_submodule(name).weight.detach()
    assert difference(layer.base.weight, original) > 0.01
    assert difference(logits(plain), logits(model)) < 1e-5


def test_the_device_never_sees_what_is_put_into_four_bits_before():
    model = small_model()
    method = LoraConfig(rank=4, quantize_base="nf4").build()
    said = method.before_device(model, "cpu")
    assert "14 frozen layers in nf4" in said and "dequantizes" in said
    held = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("codes"))
    assert not any("proj" in name for name, _ in model.named_parameters())
    assert 2 * held == sum(p.numel() for n, p in small_model().named_parameters() if "proj" in n)
    method.prepare(model)
    twin, same = prepared(LoraConfig(rank=4, quantize_base="nf4"))
    assert torch.equal(logits(model), logits(twin))


def test_other_methods_keep_training_their_layers():
    model = small_model()
    ternary = TernaryConfig(layers=("mlp.down_proj",)).build()
    lora = LoraConfig(rank=4, exclude=("down_proj",)).build()
    ternary.prepare(model)
    lora.prepare(model)
    latent = {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1)}
    assert {name for name in trained_names(model) if "lora" not in name} == latent
    plain, lattice = ternary.finish(model)
    plain, _ = lora.finish(plain)
    assert lattice.keys() == latent
    assert difference(logits(plain), logits(model)) < 1e-5


def test_a_method_after_it_would_train_nothing_and_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    methods = [{"type": "lora", "rank": 4, "exclude": ["down_proj"]}, {"type": "ternary", "layers": ["down_proj"]}]
    with pytest.raises(RecipeErrors) as errors:
        load_recipe(recipe, [f"stages.base.methods={json.dumps(methods)}"])
    assert [error.code for error in errors.value.errors] == ["EW-125"]
    assert "last" in errors.value.errors[0].fix
    load_recipe(recipe, [f"stages.base.methods={json.dumps(methods[::-1])}"])


@pytest.mark.parametrize("setting, value, expected", [
    ("rank", 0, "more than 0"), ("alpha", -1.0, "more than 0"), ("dropout", 1.0, "less than 1"),
    ("quantize_base", "nf8", "'nf4' or 'fp4'"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_with_what_does(setting, value, expected, tmp_path):
    method = {"type": "lora", "rank": 4, setting: value}
    with pytest.raises(RecipeErrors) as errors:
        load_recipe(write_recipe(tmp_path), [f"stages.base.methods={json.dumps([method])}"])
    (error,) = errors.value.errors
    assert error.code == "EW-113" and expected in str(error.expected)


def test_a_finished_stage_is_a_plain_directory_and_the_next_stage_goes_on_from_it(tmp_path):
    from transformers import AutoModelForCausalLM

    method = {"type": "lora", "rank": 4, "quantize_base": "nf4", "dropout": 0.1, "train_norms": True}
    second = {
        "name": "adapted", "student": {"type": "stage", "stage": "base"}, "methods": [method],
        "budget": {"max_steps": 4}, "training": {"per_device_train_batch_size": 2, "eval_sequences": 4},
    }  # fmt: skip
    third = {**second, "name": "whole", "student": {"type": "stage", "stage": "adapted"}, "methods": []}
    recipe = load_recipe(write_recipe(tmp_path))
    tree = json.loads(recipe.model_dump_json())
    tree["stages"] += [second, third]
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(tree))
    lines = []
    edgewright.run(path, f"output_dir={tmp_path / 'run'}", say=lines.append)
    assert any("frozen layers in nf4" in line for line in lines)
    stage = tmp_path / "run/stages/adapted"
    model = AutoModelForCausalLM.from_pretrained(stage / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run/stages/base/model")
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(t.dtype == torch.float32 for t in load_file(stage / "model/model.safetensors").values())
    trained = load_file(stage / "checkpoints/step-00000004/model/model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert trained[f"{name}.adapted.base_layer.codes"].dtype == torch.uint8
    assert (tmp_path / "run/stages/whole/done.json").exists()
    numbers = json.loads((stage / "done.json").read_text())["methods"]["lora"]
    assert numbers["frozen"] == base.get_input_embeddings().weight.numel()  # and the head, which is the same matrix


def test_no_kernel_is_fetched_from_a_hub(tmp_path):
    import subprocess

    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    raise SystemExit('fetched')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import edgewright.compress.four_bits, sys\n"
    program += (
        "import edgewright.compress.lora as l, torch; from edgewright.compress.adapted_linear import AdaptedLinear\n"
    )
    program += "AdaptedLinear(torch.nn.Linear(8, 8), rank=2, alpha=1.0, dropout=0.0, dora=False)\n"
    program += "assert 'kernels' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels-community" not in done.stderr


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", [None, "nf4"])
def test_a_step_can_be_simulated_without_memory(base, dora):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model, _ = prepared(LoraConfig(rank=4, quantize_base=base, dora=dora, dropout=0.1))
        batch = torch.zeros(2, 16, dtype=torch.long)
        model(input_ids=batch, labels=batch).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained_names(model)
