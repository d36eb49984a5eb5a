"""`plan --speculative`: the verdict from programmed costs, real files once, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import save_byte_tokenizer

from edgewright.compress.draft_record import record_for
from edgewright.errors import BadInput, EdgewrightError, RecipeError
from edgewright.export.artifact import write_entry
from edgewright.export.weight_hash import weights_sha256
from edgewright.planner import speculative_files, speculative_plan
from edgewright.planner.speculative import Costs, best_gamma, predict
from edgewright.planner.speculative_files import TargetFile, Wanted
from edgewright.planner.speculative_plan import plan_speculative
from edgewright.planner.speculative_probe import LONGEST
from edgewright.planner.speculative_report import EXPECTED, Draft, Probed, SpeculativePlan, acceptance_of
from edgewright.planner.speculative_text import as_text

# ---------------------------------------------------------------- the verdict


def of(draft: float, *, step: float = 1.0, growth: float = 0.05) -> Costs:
    """A file on which n tokens take 1 + growth (n - 1) steps, with a draft that takes a share of a step."""
    verify = tuple((step * (1 + growth * count),) * 3 for count in range(9))
    return Costs(step=(step,) * 3, verify=verify, draft=(draft * step,) * 3, loop=((0.0,) * 3,) * 8)


def planned(*files: tuple[str, Costs], acceptance: tuple[float, ...] = (), gamma: int | None = None) -> SpeculativePlan:
    kind = "given" if acceptance else "random"
    probed = [
        Probed(
            file=TargetFile(
                path=Path("x"), runtime="genai", to="genai", quant=quant, embedding_quant=quant, bytes=10, read=9,
                config=SimpleNamespace(),  # type: ignore[arg-type]
            ),
            context=256,
            fit=None,
            drafts=(Draft(kind=kind, layers=1, hidden_size=64, parameters=5, read=4, costs=costs),),
        )
        for quant, costs in files
    ]  # fmt: skip
    return SpeculativePlan(
        target=Path("model"), machine={"cpu": "a processor"}, threads=2, repeats=3, files=tuple(probed), skipped=(),
        acceptance=acceptance, source="given" if acceptance else None, gamma=gamma, warnings=(),
    )  # fmt: skip


def test_what_an_acceptance_is_of() -> None:
    """An acceptance that is known is a draft's that there is: random ones beside it get no prediction."""
    plan = planned(("int8", of(0.1)), acceptance=(0.8,))
    other = replace(plan.files[0].drafts[0], kind="random", costs=of(0.01))
    plan = replace(plan, files=(replace(plan.files[0], drafts=(*plan.files[0].drafts, other)),))
    assert plan.verdict.draft.kind == "given"
    drafts = json.loads(json.dumps(plan.section()))["files"][0]["drafts"]
    assert drafts[0]["prediction"] and drafts[1]["prediction"] is None


def answers(plan: SpeculativePlan) -> tuple[str, str]:
    """The answer, and the sentence."""
    section = json.loads(json.dumps(plan.to_json()))["speculative"]
    return section["verdict"]["answer"], as_text(section).splitlines()[-1]


def test_a_cheap_draft_pays() -> None:
    answer, text = answers(planned(("int8", of(0.05))))
    assert answer == "yes" and text.startswith("will it pay? YES: from an acceptance of 0.1")


def test_a_dear_draft_pays_above_an_acceptance() -> None:
    answer, text = answers(planned(("int8", of(0.5))))
    assert answer == "above" and "ONLY ABOVE an acceptance of 0.5" in text


def test_a_draft_as_slow_as_its_target_does_not_pay() -> None:
    answer, text = answers(planned(("int8", of(1.0, growth=0.5))))
    assert answer == "no" and "NO: not even if every drafted token is accepted" in text


def test_an_acceptance_that_no_draft_reaches_is_a_no() -> None:
    answer, text = answers(planned(("int8", of(0.95, growth=0.02))))
    assert answer == "no" and "it would take an acceptance of 0.9" in text


def test_a_draft_for_a_slow_file_is_held_against_the_fastest() -> None:
    """fp32 with a good draft is twice as fast as fp32 alone, and int4 alone is three times as fast."""
    good, alone = of(0.1), of(0.99, step=0.3, growth=1.0)
    assert planned(("fp32", good), acceptance=(0.8,)).verdict.answer == "yes"
    both = planned(("fp32", good), ("int4", alone), acceptance=(0.8,))
    assert both.fastest.file.quant == "int4"
    answer, text = answers(both)
    assert answer == "no" and "against genai int4 without a draft" in text
    fp32 = json.loads(json.dumps(both.section()))["files"][0]["drafts"][0]["prediction"]
    assert fp32["speedup"] > 2 > 1 > fp32["against_fastest"]["speedup"]


def test_a_known_acceptance_is_a_prediction() -> None:
    found = planned(("int8", of(0.1)), acceptance=(0.9, 0.8, 0.7))
    prediction = found.verdict.prediction
    assert prediction is not None
    by_hand = best_gamma(of(0.1), [0.9, 0.8, *[0.7] * 6])  # the last one holds for all that follow
    assert prediction == by_hand
    fixed = planned(("int8", of(0.1)), acceptance=(0.9, 0.8, 0.7), gamma=2).verdict.prediction
    assert fixed == predict(of(0.1), [0.9, 0.8], 2)
    low = planned(("int8", of(0.6)), acceptance=(0.2,))
    answer, text = answers(low)
    assert answer == "no" and "gamma 1" in text


def test_what_draft_json_says(tmp_path: Path) -> None:
    said = partial(acceptance_of, tmp_path, tmp_path / "target")
    assert said() == ((), None)
    (tmp_path / "draft.json").write_text(json.dumps({"agreement": 0.62}))
    assert said() == ((0.62,), None)
    (tmp_path / "draft.json").write_text(json.dumps({"agreement": None}))
    assert said() == ((), None)
    for wrong in ('{"agreement": 62}', '{"agreement": 0.5, "prompts": [["a"]]}', "{}", "no", "[]"):
        (tmp_path / "draft.json").write_text(wrong)
        with pytest.raises(BadInput) as caught:
            said()
        assert caught.value.code == "EW-864"


def test_an_acceptance_by_another_target_is_not_taken(tmp_path: Path) -> None:
    """Whatever it is that is planned for: a directory, or a file that was made from one."""
    ours, other, draft = (tmp_path / name for name in ("ours", "other", "draft"))
    for place in (ours, other, draft):
        place.mkdir()
        (place / "model.safetensors").write_bytes(place.name.encode())
    sha256 = weights_sha256(ours)
    (draft / "draft.json").write_text(json.dumps({"agreement": 0.62, "target_sha256": sha256}))
    assert acceptance_of(draft, ours) == ((0.62,), None)
    taken, doubt = acceptance_of(draft, other)
    assert taken == () and doubt is not None and "0.620" in doubt and "--acceptance" in doubt
    for name, made_from, lattice, expected in (
        ("same.gguf", sha256, {}, (0.62,)),
        ("other.gguf", weights_sha256(other), {}, ()),
        ("codes.gguf", weights_sha256(other), {"model.norm.weight": "int4"}, (0.62,)),
    ):
        write_entry(tmp_path / name, {"made_from": {"sha256": made_from}, "lattice": lattice})
        assert acceptance_of(draft, tmp_path / name)[0] == expected, name
        assert (record_for(draft, tmp_path / name) is not None) == bool(expected), "pairs are judged by the same rule"
    assert acceptance_of(draft, tmp_path / "strange.gguf") == ((0.62,), None)


# ---------------------------------------------------------------- real files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks of 128, with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny")
    vocabulary = save_byte_tokenizer(directory, bos=True)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plans(tiny: Path) -> dict[str, Any]:
    """`plan --speculative` of it, in two runtimes."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("onnxruntime_genai")
    wanted = Wanted(target=tiny, runtimes=("gguf", "genai"), quants=("q8_0", "int4"))
    return json.loads(json.dumps(plan_speculative(wanted, threads=1, seconds=0.01).to_json()))["speculative"]


def test_every_file_and_size_is_measured(plans: dict[str, Any]) -> None:
    assert [(file["to"], file["quant"]) for file in plans["files"]] == [("gguf", "q8_0"), ("genai", "int4")]
    assert sum(file["fastest"] for file in plans["files"]) == 1 and plans["skipped"] == []
    for file in plans["files"]:
        assert len(file["verify"]) == LONGEST + 1 and file["verify"][0] == 1.0
        assert min(file["step_ms"], *(draft["step_ms"] for draft in file["drafts"])) > 0
        sizes = {(draft["layers"], draft["hidden_size"]) for draft in file["drafts"]}
        assert {(1, 32), (2, 32), (1, 64), (2, 64)} <= sizes
        assert all(draft["parameters"] < 400_000 for draft in file["drafts"])
        assert {each["acceptance"] for each in file["drafts"][0]["expected"]} == set(EXPECTED)
    assert "will it pay?" in as_text(plans)


def test_bytes_a_token_reads_are_those_of_the_file(plans: dict[str, Any]) -> None:
    """Tied, so that a step reads all of the weights; the rest of the file is the tokenizer and settings."""
    cache = 2 * 2 * 2 * 32 * 128 * 4  # of half the context
    for file in plans["files"]:
        assert file["context"] == 128
        assert file["bytes_per_token"] - cache < file["bytes"]
    gguf = plans["files"][0]
    assert gguf["bytes_per_token"] - cache == pytest.approx(gguf["bytes"], rel=0.1)


def test_a_draft_that_is_its_target_is_refused(tiny: Path) -> None:
    with pytest.raises(BadInput, match="no smaller") as caught:
        plan_speculative(Wanted(target=tiny, runtimes=("gguf",), quants=("q8_0",), draft=tiny), threads=1)
    assert caught.value.code == "EW-862"


def test_a_draft_with_the_tokens_in_another_order_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits have the target's width, and every token of it would be taken for another text."""
    shutil.copytree(tiny, tmp_path / "draft")
    tokenizer = json.loads((tmp_path / "draft/tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = (next(text for text, number in vocabulary.items() if number == wanted) for wanted in (70, 71))
    vocabulary[one], vocabulary[other] = 71, 70
    (tmp_path / "draft/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    monkeypatch.setattr(speculative_files, "_exported", lambda *arguments: pytest.fail("it exports"))
    with pytest.raises(RecipeError, match="token 70") as caught:
        plan_speculative(Wanted(target=tiny, runtimes=("gguf",), quants=("q8_0",), draft=tmp_path / "draft"), threads=1)
    assert caught.value.code == "EW-800"


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        ({"runtimes": ("tensorrt",)}, {}, "EW-863"),
        ({"quants": ("int3",)}, {}, "EW-502"),
        ({"runtimes": ("genai",), "quants": ("q4_0",)}, {}, "EW-502"),
        ({}, {"gamma": 9}, "EW-860"),
        ({"draft": Path("x")}, {"acceptance": (1.1,)}, "EW-861"),
        ({}, {"acceptance": (0.7,)}, "EW-868"),
        ({"target": Path("nowhere")}, {}, "EW-390"),
    ],
)
def test_bad_requests_are_named_before_anything_is_measured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], options: dict[str, Any], code: str
) -> None:
    monkeypatch.setattr(speculative_plan, "_measure", lambda *arguments: pytest.fail("it measures"))
    with pytest.raises(EdgewrightError) as caught:
        plan_speculative(replace(Wanted(target=tiny), **changes), **options)
    assert caught.value.code == code


def test_a_file_is_taken_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """A GGUF file, with drafts of its sizes; asking for another width contradicts it."""
    import edgewright

    pytest.importorskip("llama_cpp")
    file = edgewright.export(tiny, to="gguf", quant="q8_0", out=tmp_path, verify=False).path
    plan = plan_speculative(Wanted(target=file), threads=1, seconds=0.01)
    assert [(probed.file.to, probed.file.quant) for probed in plan.files] == [("gguf", "q8_0")]
    assert {(draft.layers, draft.hidden_size) for draft in plan.files[0].drafts} >= {(1, 32), (2, 64)}
    with pytest.raises(EdgewrightError) as caught:
        plan_speculative(Wanted(target=file, quants=("q4_0",)))
    assert caught.value.code == "EW-868"


def test_a_folder_without_its_architecture_takes_the_draft_that_is_given(tiny: Path, tmp_path: Path) -> None:
    """GenAI's folders have no config.json: no draft is shaped after them, and bytes are compared."""
    from transformers import AutoModelForCausalLM

    import edgewright

    pytest.importorskip("onnxruntime_genai")
    shutil.copytree(tiny, tmp_path / "draft")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "draft")
    folders = [
        edgewright.export(source, to="genai", quant="fp32", out=tmp_path / f"{source.name}-genai", verify=False).path
        for source in (tiny, tmp_path / "draft")
    ]
    for draft in (tmp_path / "draft", folders[1]):
        plan = plan_speculative(Wanted(target=folders[0], draft=draft), threads=1, seconds=0.01)
        assert [each.kind for each in plan.files[0].drafts] == ["given"]
        assert "will it pay?" in as_text(json.loads(json.dumps(plan.to_json()))["speculative"])
    for wanted, code in ((Wanted(target=folders[0]), "EW-866"), (Wanted(target=folders[1], draft=tiny), "EW-862")):
        with pytest.raises(BadInput) as caught:
            plan_speculative(wanted, threads=1, seconds=0.01)
        assert caught.value.code == code


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line."""
    from edgewright.cli import main

    with pytest.raises(SystemExit) as stop:
        main([*words])
    written = capsys.readouterr()
    return int(stop.value.code or 0), written.out, written.err


def test_the_command_line(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[Wanted, dict[str, Any]]] = []

    def fake(wanted: Wanted, **options: Any) -> SpeculativePlan:
        asked.append((wanted, options))
        return planned(("int8", of(0.1)), acceptance=options["acceptance"])

    monkeypatch.setattr(speculative_plan, "plan_speculative", fake)
    words = ["plan", str(tiny), "--speculative", "--runtime", "genai", "--runtime", "gguf", "--quant", "int8"]
    words += ["--draft", "d", "--acceptance", "0.8,0.7", "--gamma", "3", "--threads", "2"]
    code, out, _ = command(capsys, *words)
    assert code == 0 and out.splitlines()[-1].startswith("will it pay? YES")
    wanted, options = asked[0]
    assert wanted == Wanted(target=tiny, runtimes=("genai", "gguf"), quants=("int8",), draft=Path("d"))
    assert (options["acceptance"], options["gamma"], options["threads"]) == ((0.8, 0.7), 3, 2)
    code, out, _ = command(capsys, *words, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["schema_version"] == 1 and result["speculative"]["verdict"]["answer"] == "yes"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--speculative", "--acceptance", "most"], "EW-100"),
        (["--speculative", "data.files=x"], "EW-868"),
        (["--speculative", "--no-probe"], "EW-868"),
        (["--speculative", "--device", "cpu"], "EW-868"),
        (["--gamma", "3"], "EW-868"),
        (["--draft", "x"], "EW-868"),
    ],
)
def test_options_that_contradict_each_other(
    tiny: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: str
) -> None:
    exit_code, out, err = command(capsys, "plan", str(tiny), *words, "--json")
    assert exit_code == 2 and json.loads(out)["error"]["code"] == code and code in err


def test_a_recipe_must_name_its_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_run import write_recipe

    exit_code, out, _ = command(capsys, "plan", str(write_recipe(tmp_path)), "--speculative", "--json")
    assert exit_code == 2 and json.loads(out)["error"]["code"] == "EW-868"


def test_of_a_recipe_the_draft_that_it_trains_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from edgewright.plan import plan

    asked: list[Wanted] = []

    def fake(wanted: Wanted, **options: Any) -> SpeculativePlan:
        asked.append(wanted)
        return planned(("int8", of(0.1)))

    monkeypatch.setattr(speculative_plan, "plan_speculative", fake)
    monkeypatch.setattr(sys.modules["edgewright.plan"], "_plan_recipe", lambda *arguments: None)
    examples = Path(__file__).resolve().parents[2] / "examples"
    plan(examples / "draft.yaml", speculative=True)
    shape = asked[0].shape
    assert asked[0].target == examples / "teacher" and shape is not None
    assert (shape.vocab_size, shape.model_type) == (4096, "llama") and 0 < shape.hidden_size < 256
