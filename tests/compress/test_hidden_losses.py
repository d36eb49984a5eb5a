"""Losses of hidden states: formulas, what they record, layer maps, and runs in which projections train."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_table import differences
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import edgewright
from edgewright.chunked import IGNORED
from edgewright.compress.distill import DistillConfig
from edgewright.compress.hidden_losses import Projection, minilm, relation_loss, tinybert, weighted_mse
from edgewright.compress.recording import Recorder, Wanted, projections
from edgewright.compress.teacher import OnlineTeacher
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.objective import BESIDE, ModelInputs, NextToken
from edgewright.recipe import load_recipe
from edgewright.student import hidden_states, recompute_blocks
from edgewright.trainer import TrainingModule

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, weights, write_recipe  # noqa: E402

TEACHER = {"type": "stage", "stage": "base"}


def states(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(layers: int = 2, hidden: int = 32, heads: int = 4, key_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, pad_token_id=None,
        )
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def micro_batch(rows: int = 2, length: int = 9, seed: int = 1) -> ModelInputs:
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    return ModelInputs(input_ids=ids, labels=labels, position_ids=None, attention_mask=None)


def test_relations_are_those_of_the_formula_token_by_token() -> None:
    ours, theirs = states(2, 5, 8, seed=0), states(2, 5, 12, seed=1)
    expected, heads = 0.0, 2
    for row in range(2):
        for head in range(heads):
            relations = []
            for each in (ours, theirs):
                size = each.shape[-1] // heads
                part = each[row, :, head * size : (head + 1) * size]
                relations.append(part @ part.T / math.sqrt(size))
            for token in range(5):
                r_s, r_t = (relation[token, : token + 1].softmax(0) for relation in relations)
                expected += float((r_t * (r_t / r_s).log()).sum()) / (2 * 5 * heads)
    assert float(minilm(ours, theirs, heads=heads)) == pytest.approx(expected, rel=1e-12)
    assert float(minilm(ours, ours, heads=heads)) == 0.0


def test_relations_do_not_depend_on_how_a_head_is_turned() -> None:
    ours, theirs = states(2, 6, 8, seed=0), states(2, 6, 12, seed=1)
    turns = [torch.linalg.qr(states(4, 4, seed=seed))[0] for seed in (2, 3)]
    turned = torch.cat([ours[..., :4] @ turns[0], ours[..., 4:] @ turns[1]], -1)
    torch.testing.assert_close(minilm(turned, theirs, heads=2), minilm(ours, theirs, heads=2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_relations_is_that_of_finite_differences(masked: bool) -> None:
    ours, theirs = states(2, 5, 8, seed=0).requires_grad_(), states(2, 5, 12, seed=1)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril_() if masked else None
    if mask is not None:
        mask[0, :, 3:, :3] = False  # a second document
    even = torch.full((2, 5), 0.1, dtype=torch.float64)
    loss = relation_loss(ours, theirs, 2, mask, even)
    loss.backward()
    torch.testing.assert_close(loss, minilm(ours, theirs, heads=2, mask=mask))
    expected = differences(lambda x: minilm(x, theirs, heads=2, mask=mask), ours)
    torch.testing.assert_close(ours.grad, expected, rtol=0, atol=1e-6)
    uneven = states(2, 5, seed=4).abs()
    again = ours.detach().clone().requires_grad_()
    relation_loss(again, theirs, 2, mask, uneven).mul(3.0).backward()
    expected = differences(lambda x: 3.0 * relation_loss(x, theirs, 2, mask, uneven), ours)
    torch.testing.assert_close(again.grad, expected, rtol=0, atol=1e-6)


def test_mapped_layers_are_compared_through_the_projection() -> None:
    ours, theirs = states(2, 5, 8, seed=0), states(2, 5, 12, seed=1)
    projection = Projection(8, 12).double()
    even = torch.full((2, 5), 0.1, dtype=torch.float64)
    plain = tinybert(ours, theirs, projection=projection.weight)
    torch.testing.assert_close(weighted_mse(projection(ours), theirs, even).double(), plain, rtol=1e-5, atol=1e-6)
    assert float(tinybert(ours, ours)) == 0.0


def test_a_recorder_sees_what_transformers_shows_and_only_when_asked() -> None:
    made, inputs = model(layers=3), micro_batch()
    recorder = Recorder(made, Wanted(hidden=frozenset({0, 1, 2}), attention=frozenset({2}), last=True))
    with recorder.recording():
        hidden_states(made, inputs)
    shown = made(input_ids=inputs.input_ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        torch.testing.assert_close(recorder.hidden(layer), shown[layer])
    torch.testing.assert_close(recorder.last(), shown[3])
    q, k, v = recorder.attention(2)
    assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (32, 16, 16)
    recorder.forget()
    hidden_states(made, inputs)
    with pytest.raises(KeyError):
        recorder.hidden(0)


def objective(*losses: dict[str, object], student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> Any:
    config = DistillConfig.model_validate({"teacher": TEACHER, "losses": losses})
    made = config.build(OnlineTeacher(model=teacher.requires_grad_(False)))
    made.attach(student)
    made.prepare(student, torch.device("cpu"))
    return made


ALL = (
    {"function": "minilm", "weight": 1.0, "relation_heads": 4},
    {"function": "tinybert", "weight": 0.5},
    {"function": "had", "weight": 0.5, "mask_ratio": 0.3},
    {"function": "cross_entropy", "weight": 0.5},
)


def test_blocks_that_are_computed_again_change_no_gradient() -> None:
    gradients = []
    for again in (False, True):
        student, teacher = model(), model(layers=4, hidden=48, seed=1)
        made = objective(*ALL, student=student, teacher=teacher)
        if again:
            recompute_blocks(student)
        student.train()
        torch.manual_seed(3)
        loss, parts = TrainingModule(student, made, torch.float32)(micro_batch(), 1 / 16)
        loss.backward()
        assert float(parts.sum()) == pytest.approx(loss.item(), rel=1e-6) and bool((parts > 0).all())
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients[0].values())
    assert {name.split(".")[1] for name in gradients[0] if name.startswith(BESIDE)} == {"tinybert", "had"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_an_evaluation_records_nothing() -> None:
    student, teacher = model(), model(layers=4, seed=1)
    made = objective(ALL[1], student=student, teacher=teacher)
    TrainingModule(student, made, torch.float32)(micro_batch(), 1.0, NextToken())
    with pytest.raises(KeyError):
        made._recorders["student"].hidden(0)


def test_hidden_tokens_are_seen_by_no_other_and_aligned_nowhere() -> None:
    student, teacher = model(), model(seed=1)
    made = objective({"function": "had", "mask_ratio": 0.4, "reconstruction": 0.0}, student=student, teacher=teacher)
    (had,) = made.of_hidden.values()
    inputs = micro_batch()
    torch.manual_seed(5)
    view = made.view(inputs)
    drawn = had._hidden
    hidden = drawn.mask
    assert bool(hidden.any()) and not bool(hidden[:, 0].any())
    changed = view.input_ids.clone()
    changed[hidden] = (changed[hidden] + 7) % 50
    before = hidden_states(student, view).unflatten(0, (2, 9))
    after = hidden_states(student, ModelInputs(
        input_ids=changed, labels=view.labels, position_ids=None, attention_mask=view.attention_mask
    )).unflatten(0, (2, 9))  # fmt: skip
    torch.testing.assert_close(before[~hidden], after[~hidden])
    assert not torch.allclose(before[hidden], after[hidden])

    def value(features: Tensor, of_teacher: Tensor) -> float:
        had._hidden = drawn
        made._recorders["teacher"]._found["last"] = of_teacher
        found = made._hidden_values(features.flatten(0, 1), None, inputs, scale=0.1, dtype=torch.float32)
        return float(sum(part.item() for _, part in found))

    features, said = before.detach(), torch.randn(2, 9, 32)
    moved = said.clone()
    moved[hidden] += 1.0
    assert value(features, said) == value(features, moved) > 0
    moved = said.clone()
    moved[0, 0] += 1.0
    assert value(features, said) != value(features, moved)
    assert "decoder" not in student.get_submodule(f"{BESIDE}.had")._modules


def test_the_decoder_finds_hidden_tokens_by_both_sides() -> None:
    """Every text repeats one token: from any visible one the hidden ones follow, and a short training finds that."""
    torch.manual_seed(0)
    student, teacher = model(layers=1), model(seed=1)
    made = objective({"function": "had", "mask_ratio": 0.4}, student=student, teacher=teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    module, losses = TrainingModule(student, made, torch.float32), []
    for _ in range(60):
        ids = torch.randint(1, 50, (8, 1)).expand(8, 9).contiguous()
        inputs = ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
        loss, _ = module(inputs, 1 / 72)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(
    ("loss", "teacher", "code", "found"),
    [
        ({"function": "tinybert"}, {"layers": 3}, "EW-785", r"student's layer \(0 to 2\) and a teacher's \(0 to 3"),
        ({"function": "tinybert", "layers": [[3, 1]]}, {}, "EW-785", "layers.0, the student's.*from 0 to 2"),
        ({"function": "tinybert", "layers": [[0, 0], [1, 7]]}, {}, "EW-785", "layers.1, the teacher's.*from 0 to 2"),
        ({"function": "minilm", "teacher_layer": 5}, {}, "EW-785", "teacher_layer.*from 1 to 2"),
        ({"function": "minilm", "relation_heads": 5}, {}, "EW-785", r"relation_heads: 1 \| 2 \| 4 \| 8 \| 16"),
        ({"function": "top_k", "k": 5000}, {}, "EW-780", r"losses.0.k: .*k of 1 to \d+\n"),
    ],
)  # fmt: skip
def test_layers_heads_and_tokens_that_do_not_exist_are_refused_with_those_that_do(
    loss: dict[str, object], teacher: dict[str, int], code: str, found: str
) -> None:
    config = DistillConfig.model_validate({"teacher": TEACHER, "losses": [loss]})
    with pytest.raises(RecipeError, match=f"(?s){found}") as error:
        config.check_fit(model().config, model(**teacher).config, "objective")
    assert error.value.code == code


def test_a_family_without_separate_projections_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    fused = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(RecipeError, match="EW-784"):
        projections(fused, 1)


LOSSES = (
    "stages.student.objective.losses=[{function: tinybert, weight: 0.3}, {function: had, weight: 0.2}, "
    "{function: minilm, weight: 0.2}, {function: forward_kl, weight: 0.3}, {function: cross_entropy, weight: 0.1}]"
)
WITHOUT = ["stages.student.objective.kl_weight=null"]
OTHERS = [*WITHOUT, LOSSES]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ternary student of an earlier stage, taught by its hidden states too."""
    folder = tmp_path_factory.mktemp("hidden")
    recipe = write_recipe(folder, ternary=True)
    edgewright.run(recipe, *OTHERS, f"output_dir={folder / 'run'}")
    return recipe, folder / "run"


def test_projections_train_and_are_not_in_the_finished_model(taught: tuple[Path, Path]) -> None:
    stage = taught[1] / "stages/student"
    first, last = (load_file(stage / f"checkpoints/step-{step:08d}/model/model.safetensors") for step in (6, 8))
    name = f"{BESIDE}.tinybert.weight"
    assert first[name].shape == (64, 64) and not torch.equal(first[name], last[name])
    assert f"{BESIDE}.had.decoder.query" in last
    finished = load_file(stage / "model/model.safetensors")
    assert not [name for name in finished if name.startswith(BESIDE)]
    state = json.loads((stage / "done.json").read_text())
    assert state["parameters"] == sum(tensor.numel() for tensor in finished.values())
    assert edgewright.evaluate(stage / "model", max_tokens=200).loss > 0


def test_a_run_with_projections_resumes_with_the_same_bits(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = taught
    copy = shutil.copytree(run, tmp_path / "run")
    stage = copy / "stages/student"
    shutil.rmtree(stage / "model")
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "checkpoints/step-00000008")
    edgewright.run(recipe, *OTHERS, f"output_dir={copy}")
    assert curve(copy, "student") == curve(run, "student")
    assert weights(copy, "student") == weights(run, "student")


def test_a_layer_that_does_not_exist_is_found_before_the_first_stage(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = taught
    layers = "stages.student.objective.losses=[{function: tinybert, layers: [[1, 2]]}]"
    with pytest.raises(RecipeError, match="EW-785"):
        edgewright.run(recipe, OTHERS[0], layers, f"output_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "run").rglob("step-*"))
    report = edgewright.check(recipe, OTHERS[0], layers)
    assert [error.code for error in report.errors] == ["EW-785"]


def test_more_tokens_than_the_teacher_has_are_found_before_the_first_stage(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, _ = taught
    many = "stages.student.objective.losses=[{function: top_k, k: 5000}]"
    with pytest.raises(RecipeError, match="EW-780"):
        edgewright.run(recipe, *WITHOUT, many, f"output_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "run").rglob("step-*"))
    report = edgewright.check(recipe, *WITHOUT, many)
    assert [error.code for error in report.errors] == ["EW-780"]


def test_spans_that_hide_more_than_their_share_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ternary=True)

    def load(span: int) -> None:
        hidden = f"stages.student.objective.losses=[{{function: had, span: {span}, mask_ratio: 0.3}}]"
        load_recipe(recipe, [*WITHOUT, hidden, "data.sequence_length=64"])

    load(19)
    for span in (20, 4000):
        with pytest.raises(RecipeErrors, match="at most 19") as raised:
            load(span)
        assert [error.code for error in raised.value.errors] == ["EW-113"]


@pytest.mark.slow  # two plans, each of which simulates alternatives
def test_the_planner_counts_what_trains_beside_the_student(taught: tuple[Path, Path]) -> None:
    recipe, _ = taught
    plain = edgewright.plan(recipe, *WITHOUT, device="24GB", probe=False).to_json()["memory"]
    inside = edgewright.plan(recipe, *OTHERS, device="24GB", probe=False).to_json()["memory"]
    assert inside["total"] > plain["total"] > 0  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_student_is_looked_into_as_well(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = taught
    compiled = tmp_path / "run"
    fp32 = "stages.student.training.precision=fp32"
    ends = []
    for directory, wish in ((tmp_path / "plain", "off"), (compiled, "on")):
        shutil.copytree(run, directory)
        shutil.rmtree(directory / "stages/student")
        edgewright.run(recipe, *OTHERS, fp32, f"stages.student.training.compile={wish}", f"output_dir={directory}")
        ends.append([float.fromhex(loss) for _, loss in curve(directory, "student")])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
