"""Elastic models: a sub-network is the slice of the whole, bit for bit; the whole is the plain model, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import FAMILIES, decoder, logits, text
from safetensors.torch import load_file

import edgewright
from edgewright.compress.elastic import (
    ElasticConfig,
    find_size,
    save_sub_network,
    sizes_of,
    spaced,
    sub_network,
    weights_in_blocks,
)
from edgewright.compress.elastic_layers import net_of
from edgewright.compress.losses import forward_kl
from edgewright.compress.sandwich import SandwichConfig
from edgewright.compress.shape import Shape
from edgewright.data import Batches
from edgewright.errors import BadInput, RecipeError, RecipeErrors
from edgewright.student import hidden_states, output_head, recompute_blocks
from edgewright.training import Interrupted

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

CONFIG = ElasticConfig(
    hidden_size=(32,), intermediate_size=(32, 64), num_attention_heads=(4,), num_hidden_layers=(1, 3)
)


def elastic(family: str, config: ElasticConfig = CONFIG):
    """(plain model, the same one elastic, its method)."""
    plain, model, method = decoder(family), decoder(family), config.build()
    if family == "llama-full-heads":
        config = config.model_copy(update={"num_attention_heads": (4,)})
        method = config.build()
    method.prepare(model)
    return plain, model.eval(), method


def own_logits(model, inputs=None) -> torch.Tensor:
    """What training sees."""
    with torch.no_grad():
        return output_head(model)(hidden_states(model, inputs or text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_is_the_plain_model_bit_for_bit(family: str) -> None:
    plain, model, method = elastic(family)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(logits(model), logits(plain)) and torch.equal(own_logits(model), own_logits(plain))
    finished, lattice = method.finish(model)
    assert torch.equal(logits(finished), logits(plain)) and not lattice


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sub_network_is_the_slice_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Against the model that is cut out, which knows nothing of elastic layers."""
    from edgewright.compress.cut import cut, prefix

    plain, model, method = elastic(family)
    shape = Shape.of(plain.config)
    assert len(method.net.sizes) == 2 * 3 * 2 * 3
    for size in method.net.sizes:
        small = cut(plain, prefix(shape, size.shape, size.blocks))
        with method.net.at(model, size):
            assert torch.equal(own_logits(model), own_logits(small)), size.name
            assert torch.equal(logits(model), logits(small)), size.name
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_outside_of_the_slice_gets_a_gradient(family: str, recompute: bool) -> None:
    """And what is inside gets that of the plain model that is cut out; blocks that are computed again as well."""
    from edgewright.compress.cut import cut, prefix

    plain, model, method = elastic(family)
    if recompute:
        recompute_blocks(model)
        model.train()
    size = next(size for size in method.net.sizes if size.shape.hidden_size == 32 and len(size.blocks) == 3)
    small = cut(plain, prefix(Shape.of(plain.config), size.shape, size.blocks))

    def loss(of) -> torch.Tensor:
        return output_head(of)(hidden_states(of, text())).square().mean()

    with method.net.at(model, size):
        value = loss(model)
    hidden_states(model, text())  # another forward, of the whole, comes before the backward pass
    value.backward()
    loss(small).backward()
    wanted = {name: parameter.grad for name, parameter in small.named_parameters()}
    places = {f"layers.{number}.": f"layers.{block}." for number, block in enumerate(size.blocks)}
    seen = set()
    for name, gradient in wanted.items():
        there = next((name.replace(a, b) for a, b in places.items() if a in name), name)
        whole = dict(model.named_parameters())[there].grad
        inside = tuple(slice(0, length) for length in gradient.shape)
        torch.testing.assert_close(whole[inside], gradient, rtol=1e-4, atol=1e-7)
        outside = whole.clone()
        outside[inside] = 0
        assert outside.count_nonzero() == 0
        seen.add(there)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in seen)


def test_blocks_are_spaced_as_published() -> None:
    for there in range(1, 30):
        for wanted in range(1, there + 1):
            assert spaced(there, wanted) == tuple(np.linspace(0, there - 1, wanted).astype(int)), (there, wanted)


def test_the_sandwich_is_its_formula() -> None:
    """CE(whole) + weight / 3 sum over subs of kl KL(whole || sub) + (1 - kl) CE(sub), and its gradient."""
    _, model, method = elastic("llama")
    config = SandwichConfig(random=2, weight=1.5, kl_weight=0.25)
    objective = config.build()
    objective.attach(model)
    inputs = text()
    counted = inputs.labels.numel()
    objective.begin_step(3, 10)
    sizes = objective.drawn(method.net, inputs)
    assert sizes[0] is method.net.sizes[0] and len({size.name for size in sizes}) == 3
    assert method.net.full not in sizes and objective.drawn(method.net, inputs) == sizes
    objective.begin_step(4, 10)
    assert objective.drawn(method.net, inputs) != sizes
    objective.begin_step(3, 10)
    hidden, head = hidden_states(model, inputs), output_head(model)
    loss, parts = objective.loss(hidden, head, inputs, scale=1 / counted, dtype=torch.float32)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert method.net.active is method.net.full

    def whole_logits() -> torch.Tensor:
        return output_head(model)(hidden_states(model, inputs))

    labels = inputs.labels.flatten()
    whole = whole_logits()
    expected = [torch.nn.functional.cross_entropy(whole, labels)]
    for size in sizes:
        with method.net.at(model, size):
            sub = whole_logits()
        term = 0.25 * forward_kl(sub, whole.detach()) + 0.75 * torch.nn.functional.cross_entropy(sub, labels)
        expected.append(1.5 / 3 * term)
    total = torch.stack(expected).sum()
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        parts, torch.stack([expected[0], expected[1], expected[2] + expected[3]]), rtol=1e-5, atol=0
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_plain_model_has_no_sandwich() -> None:
    with pytest.raises(RecipeError) as caught:
        net_of(decoder("llama"))
    assert caught.value.code == "EW-767"


ILLEGAL = [
    ({"hidden_size": [33]}, ["hidden_size", "33", "32 or 64"]),
    ({"hidden_size": [128]}, ["the whole model has 64"]),
    ({"intermediate_size": [40]}, ["32 or 64"]),
    ({"num_attention_heads": [3]}, ["groups of 2", "4"]),
    ({"num_hidden_layers": [0]}, ["at least one block", "1"]),
    ({"num_hidden_layers": [9]}, ["the whole model has 4"]),
    ({"hidden_size": [6], "multiple_of": 1}, ["multiple of the heads", "whole model has 8", "fix: hidden_size: 8"]),
    (
        {"hidden_size": [40], "num_attention_heads": [6], "multiple_of": 1},
        ["here 40, 64", "fix: num_attention_heads: 4"],
    ),
]


@pytest.mark.parametrize(("settings", "said"), ILLEGAL)
def test_sizes_that_cannot_be_are_refused_with_the_nearest(settings, said) -> None:
    config = ElasticConfig.model_validate({"num_hidden_layers": [2], **settings})
    with pytest.raises(RecipeError) as caught:
        config.build().chosen(decoder("llama"))
    assert caught.value.code == "EW-765"
    assert all(word in caught.value.message() for word in said), caught.value.message()


def test_the_fix_of_a_size_that_cannot_be_can() -> None:
    config = decoder("llama").config
    for settings, said in ILLEGAL:
        fixes = [word.removeprefix("fix: ").split(": ") for word in said if word.startswith("fix: ")]
        mended = {**settings, **{name: [int(value)] for name, value in fixes}}
        assert not fixes or len(ElasticConfig.model_validate(mended).sizes(config)) > 1


def test_all_wrong_sizes_are_told_at_once() -> None:
    with pytest.raises(RecipeErrors) as caught:
        ElasticConfig(hidden_size=(33, 34), num_hidden_layers=(9,)).sizes(decoder("llama").config)
    assert len(caught.value.errors) == 3


def elastic_recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    path = write_recipe(folder)
    content = path.read_text().replace("num_hidden_layers: 1", "num_hidden_layers: 3")
    content = content.replace("num_attention_heads: 2", "num_attention_heads: 4")
    content = content.replace(
        "    optimizer:",
        "    methods: [{type: elastic, hidden_size: [32], intermediate_size: [32], num_attention_heads: [2], "
        "num_hidden_layers: [1, 2]}]\n"
        "    objective: {type: sandwich, random: 1}\n    optimizer:",
        1,
    )
    for before, after in changes:
        assert before in content
        content = content.replace(before, after)
    path.write_text(content)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with an export of a sub-network."""
    folder = tmp_path_factory.mktemp("elastic")
    export = "exports:\n  - {name: small, model: base, to: hf, quant: fp32, size: h32-f32-a2-l2}\nevaluate: null"
    recipe = elastic_recipe(folder, ("evaluate: null", export))
    assert edgewright.check(recipe).ok
    edgewright.run(recipe, f"output_dir={folder / 'run'}")
    return folder / "run"


def test_every_size_of_a_run_is_an_ordinary_directory(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = trained / "stages/base/model"
    sizes = sizes_of(model)
    assert len(sizes) == 24 and [weights_in_blocks(s.shape) for s in sizes] == sorted(
        weights_in_blocks(s.shape) for s in sizes
    )
    whole = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    method = ElasticConfig(
        hidden_size=(32,), intermediate_size=(32,), num_attention_heads=(2,), num_hidden_layers=(1, 2)
    ).build()
    method.prepare(whole)
    whole.eval()
    for size in sizes[::5]:
        folder = save_sub_network(model, size.name, tmp_path / size.name)
        opened = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        assert (folder / "tokenizer.json").exists() and Shape.of(opened.config) == size.shape
        with method.net.at(whole, find_size(method.net.sizes, size.name, "here")):
            assert torch.equal(own_logits(whole), own_logits(opened))
    assert torch.equal(own_logits(sub_network(model, sizes[-1].name)), own_logits(whole))


def test_a_recipe_and_the_command_line_export_a_size(trained: Path, tmp_path: Path) -> None:
    exported = json.loads((trained / "results.json").read_text())["artifacts"]
    assert [row["gate"] for row in exported] == ["passed"]
    config = json.loads((trained / "exports/small/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 2)
    command = [sys.executable, "-m", "edgewright"]
    model, size = str(trained / "stages/base/model"), "h32-f64-a4-l1"
    written = subprocess.run(
        [
            *command, "export", model, "--to", "hf", "--quant", "fp32", "--size", size, "--out", str(tmp_path / "x"),
            "--json",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout)["gate"] == "passed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    verified = edgewright.verify(tmp_path / "x", against=model, size=size)
    assert verified.gate == "passed" and verified.against == Path(model)
    with pytest.raises(RecipeError) as caught:
        edgewright.export(model, to="hf", quant="fp32", size="h32-f64-a4-l9", out=tmp_path / "y")
    assert caught.value.code == "EW-766" and size in caught.value.message()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize(
    ("asked", "near"),
    [("h32-f64-a4-l9", "h32-f64-a4-l3"), ("h65-f32-a4-l2", "h64-f32-a4-l2"), ("h64-f33-a3-l2", "h64-f32-a4-l2")],
)
def test_the_nearest_sub_network_is_nearest_in_size(trained: Path, asked: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_size(sizes_of(trained / "stages/base/model"), asked, trained)
    assert caught.value.fix.startswith(f"--size {near};"), caught.value.fix


def test_a_model_without_sizes_or_with_damaged_ones(trained: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(trained / "stages/base/model", model)
    stored = json.loads((model / "elastic.json").read_text())
    for change in (
        {"hidden_size": 96},
        {"blocks": [0, 7]},
        {"num_key_value_heads": 1},
        {"name": "h1"},
        {"more": 1},
        {"blocks": [1, 0]},
    ):
        sizes = [{**stored["sizes"][5], **change}]
        (model / "elastic.json").write_text(json.dumps({**stored, "sizes": sizes}))
        with pytest.raises(BadInput) as caught:
            sizes_of(model)
        assert caught.value.code == "EW-768"
    (model / "elastic.json").unlink()
    with pytest.raises(BadInput, match="EW-768"):
        edgewright.export(model, to="hf", quant="fp32", size="h32-f64-a4-l1", out=tmp_path / "y")


def test_a_run_that_was_stopped_gives_the_bits_of_one_that_was_not(tmp_path: Path, monkeypatch) -> None:
    recipe = elastic_recipe(tmp_path)
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
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
    ours, theirs = (load_file(tmp_path / n / "stages/base/model/model.safetensors") for n in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


REFUSED = [
    ("stages.base.objective={type: next_token}", "EW-767"),
    ("stages.base.methods=[]", "EW-767"),
    ("stages.base.training.compile=on", "EW-767"),
    ("stages.base.methods.0.layers=[up_proj]", "EW-115"),
    ("stages.base.methods=[{type: elastic}]", "EW-115"),
    ("stages.base.methods=[{type: elastic, hidden_size: [32]}, {type: ternary}]", "EW-125"),
]


@pytest.mark.parametrize(("override", "code"), REFUSED)
def test_recipes_that_do_not_hold_together(tmp_path: Path, override: str, code: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        edgewright.check(elastic_recipe(tmp_path), override)
    assert caught.value.errors[0].code == code


def test_an_export_of_a_size_that_will_not_be_is_refused_before_training(tmp_path: Path) -> None:
    export = "exports: [{name: small, model: base, to: hf, quant: fp32, size: h32-f32-a2-l4}]\nevaluate: null"
    recipe = elastic_recipe(tmp_path, ("evaluate: null", export))
    (error,) = edgewright.check(recipe).errors
    assert error.code == "EW-766" and "h32-f32-a2-l2" in error.message()
    with pytest.raises(RecipeError, match="EW-766"):
        edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "run").glob("stages/*/checkpoints"))
    (error,) = edgewright.check(
        write_recipe(tmp_path), "exports=[{name: s, model: base, to: hf, quant: fp32, size: x}]"
    ).errors
    assert error.code == "EW-766"


@pytest.mark.slow
def test_the_plan_knows_what_a_sandwich_holds(tmp_path: Path) -> None:
    """The activations of every sub-network, until the backward pass."""
    recipe = elastic_recipe(tmp_path)
    few, many = (
        edgewright.plan(recipe, f"stages.base.objective.random={number}", probe=False).to_json()["memory"]
        for number in (0, 3)
    )
    assert many["total"] > 1.05 * few["total"] and many["weights"] == few["weights"]
