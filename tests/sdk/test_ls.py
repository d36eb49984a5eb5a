"""What `ls` lists is what recipes and exports take."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import edgewright
from edgewright.errors import RecipeError
from edgewright.ls import KINDS, ls


def entries(kind: str) -> dict[str, dict[str, Any]]:
    listing = ls(kind).to_json()
    assert listing.keys() == {"schema_version", kind}
    json.dumps(listing)
    return {entry["name"]: entry for entry in listing[kind]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_entry_has_name_summary_and_paper(kind: str) -> None:
    for entry in entries(kind).values():
        assert {"name", "summary", "paper"} <= entry.keys()
        assert entry["summary"]


def test_methods_have_their_papers_and_the_options_of_the_recipe() -> None:
    ternary = entries("methods")["ternary"]
    assert ternary["paper"] == "arXiv:2402.17764"
    options = {option["name"]: option for option in ternary["options"]}
    granularities = ["tensor", "row", "group"]
    assert options["granularity"] == {
        "name": "granularity", "default": "row", "required": False, "choices": granularities
    }  # fmt: skip
    assert "seq_2bit" in options["quantizer"]["choices"] and options["group"]["choices"] == []
    assert "type" not in options
    teacher = {option["name"]: option for option in entries("losses")["distill"]["options"]}["teacher"]
    assert teacher["required"]


def test_methods_say_what_they_save_and_where_their_result_is_exact() -> None:
    found = entries("methods")
    assert all(entry["saves"] and entry["finished"] for entry in found.values())
    ternary, integer = found["ternary"]["exact_in"], found["integer"]["exact_in"]
    assert ternary["gguf"][:3] == ["tq1_0", "tq2_0", "q2_0"] and "ternary" in ternary["onnx"]
    assert integer["gguf"] == ["q4_0", "q5_0", "q8_0", "q4_1"] and "ternary" not in integer["onnx"]
    assert found["sparse"]["exact_in"] == {} and "plain" in found["sparse"]["finished"]
    assert "factors" in found["lost"]["finished"]


def test_losses_are_objectives_and_functions() -> None:
    found = entries("losses")
    assert {"next_token", "distill"} <= found.keys()
    assert found["forward_kl"]["python"] == "edgewright.compress.losses.forward_kl"
    assert found["forward_kl"]["accepts"] == ["logits"] and found["forward_kl"]["paper"] == "arXiv:1503.02531"
    assert found["rs_kd"]["accepts"] == ["sampled", "logits"] and found["top_k"]["accepts"] == ["top_k", "logits"]
    assert found["cross_entropy"]["accepts"] == []
    assert {option["name"] for option in found["jsd"]["options"]} == {"weight", "schedule", "temperature", "beta"}


def test_every_plain_loss_can_be_used_in_a_recipe() -> None:
    from edgewright.compress import losses

    found = entries("losses")
    assert {name for name, entry in found.items() if entry.get("python")} == set(losses.__all__)
    assert all(found[name]["paper"] for name in losses.__all__)


def test_targets_are_those_of_export_with_what_each_width_holds() -> None:
    from edgewright.export.targets import TARGETS

    found = entries("targets")
    assert list(found) == list(TARGETS)
    for name, target in TARGETS.items():
        assert [width["name"] for width in found[name]["widths"]] == list(target.quants)
        for width in found[name]["widths"]:
            plain = width["name"] in ("fp32", "fp16", "bf16", "f32", "f16")
            assert not (plain and width["exact"])
    widths = {width["name"]: width["exact"] for width in found["hf"]["widths"]}
    assert widths["ternary"] == ["codes -1..1, a scale per tensor in float32, rows a multiple of 4"]
    gguf = {width["name"]: width["exact"] for width in found["gguf"]["widths"]}
    assert "codes -1..1, a scale per tensor, row or multiple of 256 columns" in gguf["tq2_0"][0]


def test_students_are_what_a_recipe_can_start_from() -> None:
    found = entries("students")
    assert list(found) == ["preset", "checkpoint", "stage", "pruned", "grown", "draft", "draft_vocabulary"]
    assert found["pruned"]["paper"] == "arXiv:2407.14679" and found["grown"]["paper"] == "arXiv:2110.07143"
    methods = {option["name"]: option["choices"] for option in found["grown"]["options"]}["method"]
    assert methods == ["function_preserving", "advanced", "stack"]


def test_proposers_are_the_options_of_speculate() -> None:
    found = entries("proposers")
    assert {name: entry["option"] for name, entry in found.items()} == {"draft": "--draft PATH", "ngram": "--ngram N"}
    assert found["draft"]["paper"] == "arXiv:2211.17192"


def test_presets_say_how_large_they_are() -> None:
    smallest = entries("presets")["llama-1m"]
    assert smallest["hidden_size"] == 128
    assert smallest["parameters_beside_embedding"] == 3 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"EW-534.*\n.*methods, optimizers, losses, students, targets, presets"):
        edgewright.ls("widths")


def test_the_verb_prints_a_list_or_an_object() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgewright.cli", "ls", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    as_json = run("targets", "--json")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    assert json.loads(as_json.stdout) == ls("targets").to_json()
    text = run("methods")
    assert "\nternary: Absmean ternary weights" in text.stdout
    assert run("nothing").returncode == 2
