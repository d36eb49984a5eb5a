"""Which matrices are projected, in the models of several families, and by what settings."""

import pytest
import torch
from torch import nn

from edgewright.errors import RecipeError
from edgewright.optim.groups import ROLES, chosen_matrices, parameter_groups
from edgewright.optim.projected_config import (
    ApolloConfig,
    ApolloMiniConfig,
    FiraConfig,
    GaLoreConfig,
    GradNormLoRPConfig,
)

CONFIGS = [ApolloConfig, ApolloMiniConfig, FiraConfig, GaLoreConfig, GradNormLoRPConfig]
FAMILIES = {
    "llama": (
        {"num_key_value_heads": 1, "intermediate_size": 48},
        {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]},
    ),
    "gpt2": ({"n_embd": 32, "n_head": 2, "n_layer": 1}, {"attn": ["c_attn", "c_proj"], "mlp": ["c_fc", "c_proj"]}),
    "gpt_neox": (
        {"intermediate_size": 48},
        {"attention": ["query_key_value", "dense"], "mlp": ["dense_h_to_4h", "dense_4h_to_h"]},
    ),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {"self_attn": ["q_proj", "k_proj", "v_proj", "out_proj"], "": ["fc1", "fc2"]},
    ),
    "phi": (
        {"intermediate_size": 48},
        {"self_attn": ["q_proj", "k_proj", "v_proj", "dense"], "mlp": ["fc1", "fc2"]},
    ),
}


def model_of(family, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model(
        family, **(common | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | sizes)
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def llama():
    return model_of("llama", **FAMILIES["llama"][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_attention_and_mlp_are_found(family):
    sizes, layers = FAMILIES[family]
    chosen = chosen_matrices(model_of(family, **sizes), roles=tuple(ROLES))
    expected = {f"{module}.{name}.weight".lstrip(".") for module, names in layers.items() for name in names}
    assert len(chosen) == len(expected)
    assert all(any(name.endswith(f".{each}") for name in chosen) for each in expected)


def test_roles_and_names_choose(llama):
    def chosen(**options):
        return [name.split(".")[-2] for name in chosen_matrices(llama, **options)]

    assert chosen(roles=["mlp"]) == ["gate_proj", "up_proj", "down_proj"]
    assert chosen(roles=["attention"], exclude=["k_proj", "self_attn.v_proj"]) == ["q_proj", "o_proj"]
    assert chosen(roles=["attention", "mlp"], layers=["0.mlp.up_proj", "q_proj"]) == ["q_proj", "up_proj"]


def test_frozen_parameters_are_left_out(llama):
    weight = llama.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(False)
    try:
        optimizer = ApolloConfig(rank=4).build(llama)
        assert all(each is not weight for group in optimizer.param_groups for each in group["params"])
    finally:
        weight.requires_grad_(True)


def test_every_parameter_is_in_one_group_and_vectors_are_not_decayed(llama):
    matrices = chosen_matrices(llama, roles=["mlp"])
    groups = parameter_groups(llama, matrices, rank=3, weight_decay=0.1)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in llama.named_parameters())
    assert [(group["rank"], group["weight_decay"]) for group in groups] == [(3, 0.1), (None, 0.1), (None, 0.0)]
    assert all(parameter.ndim < 2 for _, parameter in groups[2]["params"])


def test_an_unknown_role_is_refused_by_name(llama):
    with pytest.raises(RecipeError, match=r"(?s)EW-740.*attention, mlp.*router"):
        chosen_matrices(llama, roles=["mlp", "router"])


@pytest.mark.parametrize(
    ("options", "found"), [({"layers": ["up"]}, "up"), ({"exclude": ["q_proj", "lm_head"]}, "lm_head")]
)
def test_a_name_that_stands_for_nothing_is_refused(llama, options, found):
    with pytest.raises(RecipeError, match=rf"(?s)EW-742.*q_proj.*found: {found}$") as refused:
        chosen_matrices(llama, roles=["attention", "mlp"], **options)
    assert "k_proj" in refused.value.message()


def test_a_model_without_such_matrices_is_refused():
    with pytest.raises(RecipeError, match="EW-742"):
        chosen_matrices(nn.Sequential(nn.Linear(4, 4)), roles=["attention", "mlp"])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_rank_above_a_matrix_is_refused_by_its_name(llama, config):
    with pytest.raises(RecipeError, match=r"(?s)k_proj.*EW-741.*at least 17.*\[16, 32\]"):
        config(rank=17).build(llama)
    config(rank=17, exclude=("k_proj", "v_proj")).build(llama)


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_section_predicts_the_bytes_of_the_state_from_a_model_without_weights(config, states):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 64}
    section = config(states=states, rank=0.5)
    empty = model_of("llama", **sizes)
    real = empty.to_empty(device="cpu")
    predicted = section.state_bytes(model_of("llama", **sizes))
    optimizer = section.build(real)
    for parameter in real.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()) == predicted
