"""Grown students: the same function where it is promised, the copies of the papers where it is not."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from decoders import FAMILIES, SIZES, decoder, logits
from transformers import LlamaConfig, LlamaForCausalLM

import edgewright
from edgewright.compress.growth import (
    GrownStudentConfig,
    from_the_top,
    grow,
    interleaved,
    published_rule,
    stacked,
    stacking_tokens,
)
from edgewright.compress.shape import Shape
from edgewright.compress.widen import Widening, copied_heads, copies
from edgewright.errors import RecipeError

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402

SOURCE = {"type": "stage", "stage": "base"}


def grown(**settings) -> GrownStudentConfig:
    return GrownStudentConfig.model_validate({"source": SOURCE, "multiple_of": 1, **settings})


def made(model, config: GrownStudentConfig, seed: int = 0):
    """The grown model."""
    shape = Shape.of(model.config)
    wanted = config.shape(shape, model.config.model_type)
    tied = bool(model.config.tie_word_embeddings)
    widening = Widening(shape, wanted, unevenness=config.unevenness, tied=tied, seed=seed)
    blocks = config.blocks(shape, wanted)
    return grow(model, wanted, blocks, widening, advanced=config.method == "advanced").eval()


WIDER = {
    "hidden-doubled": {"hidden_size": 128},
    "hidden-uneven": {"hidden_size": 104},
    "intermediate": {"intermediate_size": 130},
    "more-heads-on-each": {"num_attention_heads": 16, "num_key_value_heads": 4},
    "more-pairs": {"num_attention_heads": 16, "num_key_value_heads": 8},
    "uneven-pairs": {"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 80},
    "deeper": {"num_hidden_layers": 7},
    "everything": {
        "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 12, "num_key_value_heads": 6,
        "num_hidden_layers": 6,
    },
}  # fmt: skip


def fits(family: str, sizes: dict[str, int]) -> dict[str, int]:
    """Where every head has its own key and value head, they grow together."""
    if family == "llama-full-heads" and "num_attention_heads" in sizes:
        return {**sizes, "num_key_value_heads": sizes["num_attention_heads"]}
    return sizes


@pytest.mark.parametrize("sizes", WIDER.values(), ids=WIDER)
@pytest.mark.parametrize("family", FAMILIES)
def test_growth_that_promises_it_keeps_the_logits(family: str, sizes: dict[str, int]) -> None:
    """With the uneven shares, and norms over a stream that is no multiple of the old one."""
    model = decoder(family)
    asked = fits(family, sizes)
    large = made(model, grown(**asked, unevenness=0.5))
    shape = Shape.of(large.config)
    assert {name: shape.numbers()[name] for name in asked} == asked and type(large) is type(model)
    before, after = logits(model), logits(large)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert (after - before).abs().max() < 1e-4  # logits of this model reach to 20 and more: see the next test


def test_in_double_precision_nothing_is_left_of_the_difference() -> None:
    for family in ("llama", "llama-tied", "qwen3"):
        model = in_double(decoder(family))
        large = in_double(made(model, grown(**WIDER["everything"])))
        torch.testing.assert_close(logits(large), logits(model), rtol=0, atol=1e-9)


def in_double(model):
    """Also its norms, which transformers computes in float32."""

    def norm(module, inputs, output):
        x = inputs[0]
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(norm)
    return model.double()


def test_the_logits_of_a_model_as_it_is_trained_change_by_less_than_1e_5() -> None:
    for tied in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
        large = made(model, grown(**WIDER["everything"]))
        assert (logits(large) - logits(model)).abs().max() < 1e-5


def test_the_copies_get_gradients_of_their_own() -> None:
    """With even shares the copies of an intermediate channel would stay alike for good."""

    def gradients(unevenness: float) -> tuple[torch.Tensor, torch.Tensor]:
        model = made(decoder("llama"), grown(intermediate_size=192, unevenness=unevenness)).train()
        ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
        model(input_ids=ids, labels=ids).loss.backward()
        whole = model.base_model.layers[1].mlp.gate_proj.weight.grad
        return whole[:96], whole[96:]

    def alike(first: torch.Tensor, second: torch.Tensor) -> float:
        """Largest cosine of each second row with any first row, the smallest over the rows."""
        cosine = torch.nn.functional.normalize(second, dim=1) @ torch.nn.functional.normalize(first, dim=1).T
        return float(cosine.max(1).values.min())

    assert alike(*gradients(0.0)) > 1 - 1e-5
    assert alike(*gradients(0.5)) < 0.999


def test_advanced_growth_takes_the_new_outputs_from_the_block_above() -> None:
    """bert2BERT's formula, written out: first the inputs, then rows of the block above, for up_proj and q_proj."""
    model = decoder("llama")
    config = grown(hidden_size=128, intermediate_size=192, method="advanced", unevenness=0.0)
    large, shape = made(model, config, seed=5), Shape.of(model.config)
    widening = Widening(shape, config.shape(shape, "llama"), unevenness=0.0, tied=False, seed=5)
    hidden, ffn = widening.axes["hidden"].origin, widening.axes["ffn"].origin
    for block in range(4):
        for name in ("mlp.up_proj", "mlp.gate_proj"):
            own, above = (
                model.base_model.get_submodule(f"layers.{each}.{name}").weight for each in (block, min(block + 1, 3))
            )
            weight = large.base_model.get_submodule(f"layers.{block}.{name}").weight
            for row in range(192):
                source = own if row < 96 else above
                expected = source[ffn[row], hidden] / 2  # twice as many channels: two copies of each
                torch.testing.assert_close(weight[row], expected, rtol=1e-6, atol=1e-7)
    assert (logits(large) - logits(model)).abs().max() > 1e-3


def test_stacking_is_block_i_mod_l_with_memory_of_its_own() -> None:
    model = decoder("llama")
    large = made(model, grown(method="stack"))
    small, state = model.state_dict(), large.state_dict()
    assert large.config.num_hidden_layers == 16
    for name, value in state.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(int(parts[2]) % 4)
        assert torch.equal(value, small[".".join(parts)])
    pointers = [parameter.data_ptr() for parameter in [*large.parameters(), *model.parameters()]]
    assert len(set(pointers)) == len(pointers)


def test_which_blocks_are_made_of_which() -> None:
    assert [(block.source, block.idle) for block in interleaved(3, 5)] == [
        (0, False), (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    assert [block.source for block in from_the_top(3, 8)] == [0, 1, 2, 0, 1, 2, 1, 2]
    assert [block.source for block in stacked(2, 6)] == [0, 1, 0, 1, 0, 1]
    for there in range(1, 6):
        for wanted in range(there, 20):
            found = interleaved(there, wanted)
            assert len(found) == wanted and [b.source for b in found if not b.idle] == list(range(there))


def test_copies_are_spread_evenly_and_heads_stay_on_copies_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    for narrow, wide in ((4, 4), (4, 7), (5, 23)):
        found = copies(narrow, wide, generator)
        counts = torch.bincount(found.origin, minlength=narrow)
        assert found.origin[:narrow].tolist() == list(range(narrow)) and counts.max() - counts.min() <= 1
        assert torch.equal(found.count, counts[found.origin])
    source = Shape.of(decoder("llama").config)  # 8 heads on 4
    for heads, pairs in ((8, 8), (16, 4), (10, 5), (12, 4)):
        wanted = Shape(**{**source.numbers(), "num_attention_heads": heads, "num_key_value_heads": pairs})
        of_pairs = copies(4, pairs, generator)
        of_heads = copied_heads(source, wanted, of_pairs)
        on = of_pairs.origin.repeat_interleave(heads // pairs)
        assert torch.equal(of_heads.origin // source.group, on)
        assert set(of_heads.origin.tolist()) == set(range(8))


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_published_rule_gives_the_published_numbers(parameters, tokens, expected) -> None:
    assert published_rule(parameters, tokens) == pytest.approx(expected, rel=0.002)
    assert stacking_tokens(int(parameters), int(tokens)).tokens == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(("parameters", "tokens"), [(100e6, 10e9), (30e6, 1e9), (1e6, 1e6), (1, 1)])
def test_where_the_rule_explodes_a_small_share_is_advised(parameters, tokens) -> None:
    assert published_rule(parameters, tokens) > 0.05 * tokens
    advice = stacking_tokens(int(parameters), int(tokens))
    assert 0.01 * tokens <= advice.tokens <= max(1, 0.05 * tokens) and "3%" in advice.why
    assert math.isfinite(advice.tokens)


ILLEGAL = [
    ({"hidden_size": 32}, ["hidden_size", "the source has 64", "nearest that can be: 64"]),
    ({"hidden_size": 100, "multiple_of": 32}, ["multiple of 32", "96 or 128"]),
    ({"hidden_size": 64}, ["nothing would be grown"]),
    ({"num_hidden_layers": 3}, ["num_hidden_layers", "has 4 already"]),
    ({"num_hidden_layers": 6, "method": "stack"}, ["repeats all of the 4 blocks", "4 or 8"]),
    ({"num_attention_heads": 9}, ["multiple of the heads", "8 or 16"]),
    ({"num_attention_heads": 9, "multiple_of": 32}, ["the nearest: ", "8 on 4"]),
    ({"num_attention_heads": 4}, ["8 on 4"]),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["a place for each of the 8 heads"]),
    ({"hidden_size": 72, "num_attention_heads": 16}, ["multiple of the heads"]),
]


@pytest.mark.parametrize(("settings", "said"), ILLEGAL)
def test_what_cannot_be_grown_is_refused_with_the_nearest(settings, said) -> None:
    with pytest.raises(RecipeError) as caught:
        grown(**settings).architecture(decoder("llama").config)
    assert caught.value.code == "EW-763"
    assert all(word in caught.value.message() for word in said), caught.value.message()


@pytest.mark.parametrize("settings", [{}, {"method": "stack", "hidden_size": 128}, {"hidden_size": 0}])
def test_settings_that_make_no_sense(settings) -> None:
    with pytest.raises(ValueError, match="grow|stack|greater"):
        grown(**settings)


GROWN_STAGE = """
  - name: large
    student: {type: grown, source: {type: stage, stage: base}, method: METHOD, num_hidden_layers: 3}
    optimizer: {type: adamw, learning_rate: 2e-3}
    budget: {max_steps: 4}
    training: {per_device_train_batch_size: 4, save_steps: 3, eval_steps: 0, eval_sequences: 4, precision: fp32}
"""


@pytest.mark.parametrize("method", ["function_preserving", "stack"])
def test_a_run_grows_its_own_stage(tmp_path: Path, method: str) -> None:
    recipe = write_recipe(tmp_path)
    stage = GROWN_STAGE.strip("\n").replace("METHOD", method)
    recipe.write_text(recipe.read_text().replace("evaluate: null", stage + "\nevaluate: null"))
    report = edgewright.check(recipe)
    notes = [check.found for check in report.checks if check.status == "note"]
    assert report.ok and report.parameters["large"] > report.parameters["base"]
    assert any("stacking pays after about" in note for note in notes) == (method == "stack")
    lines: list[str] = []
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", say=lines.append)
    assert any("stacking pays after about" in line for line in lines) == (method == "stack")
    record = json.loads((tmp_path / "run/stages/large/start/start.json").read_text())
    assert record["to"]["num_hidden_layers"] == 3
    assert [block["adds_nothing"] for block in record["blocks"]] == [False, *[method != "stack"] * 2]
    assert (record["logit_difference"] < 1e-5) == (method != "stack")
