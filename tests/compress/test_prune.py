"""Pruned students: what is kept is what matters most, and the smaller model is the larger one with the rest masked."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoders import FAMILIES, SIZES, decoder, logits, text
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import edgewright
from edgewright.chunked import IGNORED
from edgewright.compress.blocks import running
from edgewright.compress.cut import Kept, KeptBlock, cut, prefix
from edgewright.compress.importance import losses_without, measure
from edgewright.compress.prune import PrunedStudentConfig, choose, head_choices, ranking
from edgewright.compress.shape import Shape
from edgewright.errors import RecipeError, RecipeErrors

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

SOURCE = {"type": "stage", "stage": "base"}


def pruned(**settings) -> PrunedStudentConfig:
    return PrunedStudentConfig.model_validate({"source": SOURCE, **settings})


def random_kept(shape: Shape, wanted: Shape, blocks: list[int], seed: int = 0) -> Kept:
    """Any channels and heads, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def some(of: int, count: int) -> torch.Tensor:
        return torch.randperm(of, generator=generator)[:count]

    def block(number: int) -> KeptBlock:
        pairs = some(shape.num_key_value_heads, wanted.num_key_value_heads)
        heads = torch.cat([pair * shape.group + some(shape.group, wanted.group) for pair in pairs])
        return KeptBlock(
            block=number,
            heads=heads,
            key_value_heads=pairs,
            ffn=some(shape.intermediate_size, wanted.intermediate_size),
        )

    return Kept(hidden=some(shape.hidden_size, wanted.hidden_size), blocks=tuple(block(number) for number in blocks))


@contextmanager
def masked(model, kept: Kept):
    """The whole model with everything else multiplied by 0; norms take the mean over what is kept of the stream."""
    shape, handles = Shape.of(model.config), []

    def ones(size: int, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros(size).index_fill(0, index, 1.0)

    hidden = ones(shape.hidden_size, kept.hidden)

    def norm(module, inputs, output):
        x = inputs[0] * hidden
        mean = x.square().sum(-1, keepdim=True) / len(kept.hidden)
        return module.weight * x * torch.rsqrt(mean + module.variance_epsilon) * hidden

    base = model.base_model
    for module in (
        base.norm,
        *(b.input_layernorm for b in base.layers),
        *(b.post_attention_layernorm for b in base.layers),
    ):
        handles.append(module.register_forward_hook(norm))
    handles.append(base.embed_tokens.register_forward_hook(lambda m, i, o: o * hidden))
    for part in kept.blocks:
        block = base.layers[part.block]
        heads = ones(shape.num_attention_heads, part.heads).repeat_interleave(shape.head_dim)
        ffn = ones(shape.intermediate_size, part.ffn)
        for module, mask in ((block.self_attn.o_proj, heads), (block.mlp.down_proj, ffn)):
            handles.append(module.register_forward_pre_hook(lambda m, i, mask=mask: (i[0] * mask, *i[1:])))
            handles.append(module.register_forward_hook(lambda m, i, o: o * hidden))
    try:
        with running(model, [part.block for part in kept.blocks]):
            yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_masked_one(family: str) -> None:
    model = decoder(family)
    shape = Shape.of(model.config)
    full = shape.num_key_value_heads == shape.num_attention_heads
    wanted = Shape(
        hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4 if full else 2,
        num_key_value_heads=4 if full else 2, head_dim=8,
    )  # fmt: skip
    kept = random_kept(shape, wanted, [1, 3])
    small = cut(model, kept)
    assert Shape.of(small.config) == wanted and type(small) is type(model)
    with masked(model, kept):
        expected = logits(model)
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-5)
    assert small.base_model.embed_tokens.weight.data_ptr() != model.base_model.embed_tokens.weight.data_ptr()


def test_fewer_blocks_than_the_model_has_is_a_forward_through_them() -> None:
    """And leaves the model as it was."""
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, layer_types=kinds, use_sliding_window=True, sliding_window=3)
    model = Qwen2ForCausalLM(config).eval()
    before, names = logits(model), list(model.state_dict())
    shape = Shape.of(model.config)
    small = cut(model, prefix(shape, Shape(**{**shape.numbers(), "num_hidden_layers": 2}), [1, 2]))
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    with running(model, [1, 2]):
        between = logits(model)
    assert not torch.equal(before, between)
    torch.testing.assert_close(logits(small), between, rtol=0, atol=1e-6)
    assert torch.equal(logits(model), before) and list(model.state_dict()) == names


def test_importance_is_that_of_the_formula() -> None:
    """Against the formulas written out in float64, on activations caught one by one."""
    model, micro_batches = decoder("llama"), [text(2, 9, seed=1), text(3, 9, seed=2)]
    shape, caught = Shape.of(model.config), {}

    def keep(name, value):
        caught.setdefault(name, []).append(value.detach().double())

    handles = []
    for name, module in model.named_modules():
        if name.endswith("norm"):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: keep(name, o)))
        if name.endswith(("o_proj", "down_proj")):
            handles.append(module.register_forward_pre_hook(lambda m, i, name=name: keep(name, i[0])))
        if name.endswith("input_layernorm") or name == "model.norm":
            handles.append(module.register_forward_pre_hook(lambda m, i, name=f"{name}.in": keep(name, i[0])))
    for inputs in micro_batches:
        logits_of = model(input_ids=inputs.input_ids, use_cache=False)
        assert logits_of is not None
    for handle in handles:
        handle.remove()
    seen = {name: torch.cat(values) for name, values in caught.items()}  # [B, S, size]

    def score(a):
        return sum(a[b].abs().mean(0) ** 2 for b in range(len(a))).sqrt()

    found = measure(model, micro_batches, span=2)
    torch.testing.assert_close(
        found.hidden, sum(score(a) for n, a in seen.items() if n.endswith("norm")), rtol=1e-6, atol=0
    )
    states = [seen[f"model.layers.{n}.input_layernorm.in"] for n in range(4)] + [seen["model.norm.in"]]
    for number in range(4):
        parts = seen[f"model.layers.{number}.self_attn.o_proj"].reshape(5, 9, 8, 8).square().sum(-1).sqrt()
        torch.testing.assert_close(found.heads[number], score(parts), rtol=1e-6, atol=0)
        entering = seen[f"model.layers.{number}.mlp.down_proj"]
        torch.testing.assert_close(found.ffn[number], score(entering), rtol=1e-6, atol=0)
        cosine = F.cosine_similarity(states[number], states[number + 1], dim=-1)
        torch.testing.assert_close(found.influence[number], 1 - cosine.mean(), rtol=1e-5, atol=1e-7)
    for start in range(3):
        cosine = F.cosine_similarity(states[start], states[start + 2], dim=-1)
        torch.testing.assert_close(found.spans[start], 1 - cosine.mean(), rtol=1e-5, atol=1e-7)
    assert (found.sequences, found.tokens) == (5, 45) and shape.num_hidden_layers == 4


def test_padding_has_no_say() -> None:
    """A row that ends in padding counts as it would without; prompts, which are not learned, count."""
    model, (short, long) = decoder("llama"), (text(2, 7), text(2, 12, seed=1))
    padded = replace(
        short,
        input_ids=F.pad(short.input_ids, (0, 5), value=3),
        labels=F.pad(short.labels.index_fill(1, torch.arange(3), IGNORED), (0, 5), value=IGNORED),
    )
    found, expected = measure(model, [padded, long], span=2), measure(model, [short, long], span=2)
    assert found.tokens == expected.tokens == 2 * 7 + 2 * 12
    for name in ("hidden", "heads", "ffn", "influence", "spans"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-7)


def test_the_loss_without_blocks_is_that_of_the_model_that_lacks_them() -> None:
    model, inputs = decoder("llama"), text()
    losses, whole = losses_without(model, lambda: [inputs], span=2)
    shape = Shape.of(model.config)
    for start, loss in enumerate(losses.tolist()):
        blocks = [block for block in range(4) if not start <= block < start + 2]
        small = cut(model, prefix(shape, Shape(**{**shape.numbers(), "num_hidden_layers": 2}), blocks))
        expected = F.cross_entropy(logits(small).flatten(0, 1), inputs.labels.flatten())
        assert loss == pytest.approx(float(expected), rel=1e-5)
    assert whole == pytest.approx(
        float(F.cross_entropy(logits(model).flatten(0, 1), inputs.labels.flatten())), rel=1e-5
    )


def test_dead_parts_are_what_goes() -> None:
    """Channels, heads and blocks that do nothing are pruned, and nothing changes."""
    model = decoder("mistral")
    shape, generator = Shape.of(model.config), torch.Generator().manual_seed(3)
    dead_hidden = torch.randperm(64, generator=generator)[:32]
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "embed_tokens" in name:
                value[:, dead_hidden] = 0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value[dead_hidden] = 0
            if "layers.2." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                value.zero_()  # a block that adds nothing
        for number in range(4):
            model.base_model.layers[number].mlp.up_proj.weight[::3] = 0
            model.base_model.layers[number].self_attn.v_proj.weight[8 * number : 8 * number + 8] = 0
    found = measure(model, [text()], span=1)
    wanted = Shape(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
    )
    blocks = sorted(ranking(found.influence)[:3])
    assert blocks == [0, 1, 3]
    kept = choose(found, shape, wanted, blocks, sort=False)
    assert not set(kept.hidden.tolist()) & set(dead_hidden.tolist())
    for part in kept.blocks:
        assert part.block not in part.key_value_heads and not any(part.ffn % 3 == 0)
    small = cut(model, kept)
    with torch.no_grad():  # the mean of squares is over half as many channels
        for name, value in small.state_dict().items():
            if name.endswith("norm.weight"):
                value.mul_(2**0.5)
    for module in small.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 2
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_alone_changes_no_function(family: str) -> None:
    model = decoder(family)
    shape, found = Shape.of(model.config), measure(model, [text()], span=1)
    kept = choose(found, shape, shape, list(range(4)), sort=True)
    assert found.hidden[kept.hidden].diff().le(0).all() and kept.hidden.tolist() != list(range(64))
    torch.testing.assert_close(logits(cut(model, kept)), logits(model), rtol=1e-5, atol=1e-5)


LEGAL = [
    ({"hidden_size": 32}, (32, 96, 4, 8, 4)),
    ({"intermediate_size": 64, "num_hidden_layers": 1}, (64, 64, 1, 8, 4)),
    ({"num_attention_heads": 4}, (64, 96, 4, 4, 4)),
    ({"num_key_value_heads": 2}, (64, 96, 4, 4, 2)),
    ({"num_attention_heads": 4, "num_key_value_heads": 2}, (64, 96, 4, 4, 2)),
    ({"hidden_size": 8, "multiple_of": 1}, (8, 96, 4, 8, 4)),
    ({"layers": [0, 3]}, (64, 96, 2, 8, 4)),
    ({"sort": True}, (64, 96, 4, 8, 4)),
]


@pytest.mark.parametrize(("settings", "expected"), LEGAL)
def test_shapes_that_can_be_reached(settings, expected) -> None:
    source = decoder("llama").config
    shape = Shape.of(pruned(**settings).architecture(source))
    assert tuple(shape.numbers().values()) == (*expected, 8)


ILLEGAL = [
    ({"hidden_size": 33}, ["hidden_size", "33", "32 or 64"]),
    ({"hidden_size": 128}, ["hidden_size", "the source has 64"]),
    ({"intermediate_size": 95}, ["intermediate_size", "64 or 96"]),
    ({"num_hidden_layers": 5}, ["num_hidden_layers", "nearest that can be: 4"]),
    ({"layers": [0, 4]}, ["layers", "4, which are not there", "from 0 to 3"]),
    ({"layers": [2, 1]}, ["layers", "[2, 1]", "layers: [1, 2]"]),
    ({"hidden_size": 64, "num_attention_heads": 8}, ["nothing would be pruned", "hidden 64"]),
    ({"layers": [0, 1, 2, 3]}, ["nothing would be pruned"]),
    ({"num_attention_heads": 5}, ["num_attention_heads 5", "4 on 4"]),
    ({"num_attention_heads": 8, "num_key_value_heads": 2}, ["num_key_value_heads 2", "4 on 2"]),
    ({"num_attention_heads": 8, "num_key_value_heads": 8}, ["4 or fewer key and value heads"]),
    ({"hidden_size": 8, "multiple_of": 1, "num_attention_heads": 3}, ["multiple of the heads", "2 or 4"]),
]


@pytest.mark.parametrize(("settings", "said"), ILLEGAL)
def test_shapes_that_cannot_be_reached_are_refused_with_the_nearest(settings, said) -> None:
    with pytest.raises(RecipeError) as caught:
        pruned(**settings).architecture(decoder("llama").config)
    assert caught.value.code == "EW-762"
    assert all(word in caught.value.message() for word in said), caught.value.message()


def test_all_wrong_sizes_are_told_at_once() -> None:
    with pytest.raises(RecipeErrors) as caught:
        pruned(hidden_size=33, intermediate_size=33, num_hidden_layers=9).architecture(decoder("llama").config)
    assert len(caught.value.errors) == 3


def test_heads_come_in_whole_groups() -> None:
    shape = Shape.of(decoder("llama").config)
    assert {(1, 1), (2, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4), (8, 4)} == set(head_choices(shape, 1))
    assert {(4, 2), (4, 4), (8, 4)} == set(head_choices(shape, 32))


PRUNED_STAGE = """
  - name: small
    student: {type: pruned, source: {type: stage, stage: base}, hidden_size: 32, num_hidden_layers: 2, depth: loss,
              calibration_sequences: 12}
    objective: {type: distill, teacher: {type: stage, stage: base}, kl_weight: 1.0}
    optimizer: {type: adamw, learning_rate: 2e-3}
    budget: {max_steps: 6}
    training: {per_device_train_batch_size: 4, save_steps: 3, eval_steps: 0, eval_sequences: 4}
"""


def pruning_recipe(folder: Path) -> Path:
    path = write_recipe(folder)
    larger = path.read_text().replace("num_hidden_layers: 1", "num_hidden_layers: 3")
    path.write_text(larger.replace("evaluate: null", PRUNED_STAGE.strip("\n") + "\nevaluate: null"))
    return path


def test_a_run_prunes_its_own_stage_and_goes_on_with_it_after_a_kill(tmp_path: Path, monkeypatch) -> None:
    from edgewright.trainer import Trainer

    recipe = pruning_recipe(tmp_path)
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
    start = tmp_path / "whole/stages/small/start"
    record = json.loads((start / "start.json").read_text())
    assert record["to"]["hidden_size"] == 32 and len(record["kept"]["blocks"]) == 2
    assert record["calibration"] == {"sequences": 12, "tokens": 12 * 64}
    assert len(record["importance"]["losses_without"]) == 3 and len(record["kept"]["hidden"]) == 32
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(start, local_files_only=True)
    assert opened.config.hidden_size == 32 and record["parameters"] == sum(p.numel() for p in opened.parameters())

    stopped = tmp_path / "stopped"
    original = Trainer._one_step

    def until_four(self):
        if self.job.directory.name == "small" and self.state.step == 4:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", until_four)
        with pytest.raises(KeyboardInterrupt):
            edgewright.run(recipe, f"output_dir={stopped}")
    edgewright.run(recipe, f"output_dir={stopped}")
    assert curve(stopped, "small") == curve(tmp_path / "whole", "small")
    ours, theirs = (
        (run / "stages/small/start/model.safetensors").read_bytes() for run in (stopped, tmp_path / "whole")
    )
    assert ours == theirs


def test_check_knows_the_pruned_size_and_what_cannot_be(tmp_path: Path) -> None:
    recipe = pruning_recipe(tmp_path)
    report = edgewright.check(recipe)
    assert report.ok and report.parameters["small"] < report.parameters["base"]
    (error,) = edgewright.check(recipe, "stages.small.student.hidden_size=96").errors
    assert error.code == "EW-762"
    (error,) = edgewright.check(recipe, "stages.base.student.sub_norm=true").errors
    assert error.code == "EW-761" and "bitnet" in error.message()
