"""`--to best`: what is tried, what is left out and why, and that the fastest certified file is what stays."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import edgewright
from edgewright.errors import EdgewrightError
from edgewright.export import best as module
from edgewright.export.best import Candidate, combinations, estimated_bytes
from edgewright.export.calibration.calibrated import Calibrations
from edgewright.export.source import load_source
from edgewright.export.targets import TARGETS


@pytest.fixture
def only_gguf(monkeypatch):
    """Three widths of one target, so that a test takes seconds."""
    pytest.importorskip("llama_cpp")
    few = replace(TARGETS["gguf"], quants=("q8_0", "q4_0", "tq2_0"), embedding_quants=("f16", "q8_0"))
    monkeypatch.setattr(module, "TARGETS", {"gguf": few})


def test_no_embedding_is_narrower_than_the_weights(ternary_model):
    found = list(combinations(load_source(ternary_model)))
    assert {each.to for each in found} == set(TARGETS) - {"hf"}
    assert {each.quant for each in found if each.to == "gguf"} == set(TARGETS["gguf"].quants)
    assert [each.embedding_quant for each in found if (each.to, each.quant) == ("gguf", "q8_0")] == ["f16", "q8_0"]
    assert len(found) < 80
    assert len({each.name for each in found}) == len(found)


def test_every_width_of_every_target_has_its_bits():
    for target in TARGETS.values():
        assert {*target.quants, *target.embedding_quants} - {"nf4"} <= set(module.BITS)


def test_estimates_are_what_files_weigh(ternary_model, tmp_path):
    pytest.importorskip("llama_cpp")
    source = load_source(ternary_model)
    for quant in ("f16", "q8_0", "tq2_0"):
        made = edgewright.export(
            ternary_model, to="gguf", quant=quant, embedding_quant="f16", out=tmp_path / quant, verify=False
        )
        assert made.bytes == pytest.approx(estimated_bytes(source, quant, "f16"), rel=0.1, abs=15_000)


def test_the_fastest_certified_file_stays(only_gguf, ternary_model, tmp_path, monkeypatch):
    speeds = {"q8_0": 100.0, "q4_0": 300.0, "tq2_0": 200.0}

    def bench(*paths, **settings):
        assert len(paths) <= module.HEAT
        fixed = {"tokens_per_s_sd": 1.0, "prompt_tokens_per_s": 9.0, "ttft_ms": 1.0, "peak_memory": 7}
        return SimpleNamespace(
            artifacts=[SimpleNamespace(tokens_per_s=speeds[widths[path]], **fixed) for path in paths]
        )

    widths = {}
    right = module.make

    def make(source, place, **settings):
        made = right(source, place, **settings)
        widths[place] = settings["quant"]
        return made

    monkeypatch.setattr(module, "make", make)
    monkeypatch.setattr("edgewright.bench.bench", bench)
    lines = []
    artifact = edgewright.export(ternary_model, to="best", out=tmp_path / "out", threads=1, say=lines.append)
    assert (artifact.to, artifact.quant, artifact.gate) == ("gguf", "q4_0", "passed")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {artifact.path.name, "edgewright.json"}
    measured = [each for each in artifact.candidates if each["tokens_per_s"] is not None]
    assert measured[0]["status"] == "won" and measured[0]["quant"] == "q4_0"
    assert [each["tokens_per_s"] for each in measured] == sorted(
        (each["tokens_per_s"] for each in measured), reverse=True
    )
    manifest = json.loads((tmp_path / "out" / "edgewright.json").read_text())
    entry = manifest["artifacts"][artifact.path.name]
    assert entry["candidates"] == artifact.candidates
    assert len(lines) >= len(artifact.candidates)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_real_race(only_gguf, ternary_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    artifact = edgewright.export(ternary_model, to="best", out=tmp_path / "out", threads=1)
    assert artifact.path.is_file() and artifact.gate == "passed"
    assert edgewright.verify(artifact.path, against=ternary_model, threads=1).gate == "passed"


def test_the_budget_leaves_out_what_is_too_large(only_gguf, ternary_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    source = load_source(ternary_model)
    budget = estimated_bytes(source, "q4_0", "q8_0") * 1.15 / 1e6
    artifact = edgewright.export(ternary_model, to="best", out=tmp_path / "out", budget_mb=budget, threads=1)
    assert artifact.bytes <= budget * 1e6
    reasons = {(each["quant"], each["embedding_quant"]): each["reason"] for each in artifact.candidates}
    assert "over the budget" in reasons["q8_0", "f16"]


def test_nothing_within_the_limits_is_an_error_and_leaves_nothing(only_gguf, ternary_model, tmp_path):
    with pytest.raises(EdgewrightError) as caught:
        edgewright.export(ternary_model, to="best", out=tmp_path / "out", budget_mb=0.001, threads=1)
    assert (caught.value.code, caught.value.exit_code) == ("EW-511", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_single_export_keeps_to_the_budget_too(ternary_model, tmp_path):
    with pytest.raises(EdgewrightError) as caught:
        edgewright.export(ternary_model, to="gguf", quant="f32", out=tmp_path / "out", budget_mb=0.1, verify=False)
    assert caught.value.code == "EW-510"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"quant": "q8_0"}, {"embedding_quant": "f16"}, {"verify": False}])
def test_best_chooses_by_itself(ternary_model, tmp_path, settings):
    with pytest.raises(EdgewrightError) as caught:
        edgewright.export(ternary_model, to="best", out=tmp_path, **settings)
    assert (caught.value.code, caught.value.exit_code) == ("EW-512", 2)


def test_dense_weights_are_not_tried_at_ternary_widths(stories):
    source = load_source(stories)
    candidate = Candidate(to="gguf", quant="tq2_0", embedding_quant="f16")
    assert "not trained ternary" in module._unfit(candidate, source, float("inf"))


def test_calibration_serves_every_width_that_can_hold_it(stories):
    calls = []
    source = load_source(stories)

    def calibrate(source, **settings):
        calls.append(settings)
        return replace(source, calibrated=frozenset({str(len(calls))}))

    given = {"files": ["text"], "method": "gptq", "threads": 1, "say": print}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgewright.export.calibration.calibrate.calibrate", calibrate)
        made = Calibrations(source, **given)
        assert made.of("gguf", "f16", "f16") is source
        first = made.of("genai", "int4", "int4")
        assert made.of("onnx", "int4", "int4") is first and len(calls) == 1
        assert (calls[0]["bits"], calls[0]["embedding_bits"], calls[0]["method"]) == (4, 4, "gptq")
        assert made.of("genai", "int4", "int8") is not first
        assert made.of("gguf", "q4_k", "q8_0") is made.of("gguf", "q2_k", "f16")
        assert calls[-1]["method"] == "imatrix" and len(calls) == 3
        assert Calibrations(source, **{**given, "files": None}).of("gguf", "q4_0", "q4_0") is source
    assert len(calls) == 3


def test_a_later_race_replaces_the_winner_of_an_earlier_one(only_gguf, ternary_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(
        module, "TARGETS", {"gguf": replace(TARGETS["gguf"], quants=("q8_0",), embedding_quants=("f16",))}
    )
    for _ in range(2):
        artifact = edgewright.export(ternary_model, to="best", out=tmp_path / "out", threads=1)
    assert len(list((tmp_path / "out").iterdir())) == 2 and artifact.path.is_file()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(EdgewrightError, match="EW-509"):
        edgewright.export(ternary_model, to="best", out=tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "mine.txt").exists()


def test_what_cannot_be_measured_is_refused_by_name(only_gguf, ternary_model, tmp_path, monkeypatch):
    from edgewright.bench import bench as right
    from edgewright.errors import BadInput

    def bench(*paths, **settings):
        if any(path.name.startswith("0") for path in paths):
            raise BadInput("EW-610", "the process that measured this artifact died")
        return right(*paths, **settings)

    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr("edgewright.bench.bench", bench)
    artifact = edgewright.export(ternary_model, to="best", out=tmp_path / "out", threads=1)
    first = next(each for each in artifact.candidates if each["status"] == "refused")
    assert "EW-610" in first["reason"]
    assert artifact.candidates[0]["status"] == "won"


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_a_budget_that_is_none_is_refused(ternary_model, tmp_path, budget):
    with pytest.raises(EdgewrightError, match="EW-513"):
        edgewright.export(ternary_model, to="best", out=tmp_path, budget_mb=budget)
