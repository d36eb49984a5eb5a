"""Loss and gradients through the chunked head are those of the families' own forwards, caps and scales included."""

import pytest
import torch
import transformers

from edgewright.errors import RecipeError
from edgewright.objective import ModelInputs, NextToken
from edgewright.student import check_head, hidden_states, output_head
from edgewright.trainer import TrainingModule

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0, "attn_implementation": "eager"},
    "Cohere": {"logit_scale": 0.5},
    "Granite": {"logits_scaling": 4.0},
}


def tiny(family):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def example():
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return ids, ModelInputs(input_ids=ids, labels=labels, position_ids=None, attention_mask=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_family(family):
    model = tiny(family)
    ids, inputs = example()
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    module = TrainingModule(model, NextToken(), torch.float32)
    loss, _ = module(inputs, 1 / 18)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs, 1 / 18)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teachers_logits_are_its_own(family):
    model = tiny(family)
    ids, inputs = example()
    with torch.no_grad():
        logits = output_head(model)(hidden_states(model, inputs))
        torch.testing.assert_close(logits, model(input_ids=ids).logits.flatten(0, 1), rtol=1e-4, atol=1e-5)
    check_head(model, "teacher")


def test_other_uses_of_the_logits_are_refused(monkeypatch):
    model = tiny("Llama")
    own = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 2 * own(hidden))
    with pytest.raises(RecipeError, match="EW-712"):
        check_head(model, "start")
