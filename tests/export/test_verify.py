"""`verify` on files that nobody vouches for: without a manifest, built by others, or with a manifest that lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgewright
from edgewright.errors import BadInput, RecipeError
from edgewright.export.gate.claims import read_claims
from edgewright.export.parity import Parity


@pytest.fixture(scope="module")
def int8(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as Q8_0, through the gate; some rows are too short for it and stay wider."""
    out = tmp_path_factory.mktemp("verify")
    return edgewright.export(stories, to="gguf", quant="q8_0", out=out, threads=1).path


def verified(path: Path, against: Path, **settings: Any) -> Parity:
    return edgewright.verify(path, against=against, threads=1, **settings)


def with_entry(artifact: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a file and its manifest, whose entry says something else."""
    copy = shutil.copy(artifact, place / artifact.name)
    manifest = json.loads((artifact.parent / "edgewright.json").read_text())
    change(manifest["artifacts"][artifact.name])
    (place / "edgewright.json").write_text(json.dumps(manifest))
    return Path(copy)


# ---------------------------------------------------------------- without a manifest


def test_the_widths_of_a_file_without_a_manifest_are_its_own(int8, stories, tmp_path):
    alone = Path(shutil.copy(int8, tmp_path / "alone.gguf"))
    claims = read_claims(alone, "gguf")
    assert (claims.kept, claims.digests, claims.contradictions) == (None, None, [])
    assert {"q8_0"} <= claims.widths
    parity = verified(alone, stories)
    assert (parity.gate, parity.lattice_identity, parity.reasons) == ("passed", True, [])


def test_a_folder_of_the_vendors_builder_is_certified(ternary_built, ternary_model):
    """No manifest, no lattice, other names for everything."""
    parity = verified(ternary_built, ternary_model)
    assert (parity.gate, parity.lattice_identity, parity.reasons) == ("passed", True, [])
    assert parity.kl is not None and parity.kl < 1e-5


def test_a_folder_of_the_vendors_builder_for_another_model_is_refused(ternary_built, ternary_model, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(ternary_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    parity = verified(ternary_built, other)
    assert (parity.gate, parity.lattice_identity) == ("failed", False)
    assert "model.embed_tokens.weight is another weight" in parity.reasons[0]


# ---------------------------------------------------------------- with a manifest that lies


def test_a_true_manifest_contradicts_nothing(int8, stories):
    claims = read_claims(int8, "gguf")
    assert claims.contradictions == [] and claims.digests
    assert verified(int8, stories).gate == "passed"


def test_a_manifest_cannot_lower_the_bar(int8, stories, tmp_path):
    """A width with looser limits than the file's own is a lie, whatever the measurements say."""
    path = with_entry(int8, tmp_path, lambda entry: entry.update(quant="q2_k"))
    parity = verified(path, stories)
    assert parity.gate == "failed" and parity.kl_limit == pytest.approx(1e-2)
    assert "the manifest names the widths" in parity.reasons[0] and "q8_0" in parity.reasons[0]


def test_a_manifest_may_name_a_coarse_width_only_for_what_fell_back(int8, stories, tmp_path):
    """One fallback to the true width does not excuse the rest."""

    def lie(entry: dict[str, Any]) -> None:
        entry["fallbacks"].append({"tensor": "model.layers.0.mlp.up_proj.weight", "quant": "q8_0", "reason": "?"})
        entry["quant"] = "q2_k"

    claims = read_claims(with_entry(int8, tmp_path, lie), "gguf")
    assert "q2_k" not in claims.widths


def test_a_manifest_cannot_lower_the_bar_of_a_lossless_file(stories, tmp_path):
    """No tensor and no digest vouches for the width that it adds."""
    exact = edgewright.export(stories, to="gguf", quant="f32", out=tmp_path / "exact", verify=False).path
    path = with_entry(exact, tmp_path, lambda entry: entry.update(embedding_quant="q2_k", digests={}, quant="f32"))
    parity = verified(path, stories)
    assert (parity.gate, parity.kl_limit) == ("passed", 1e-5)


def test_a_manifest_for_another_target_is_named(int8, stories, tmp_path):
    parity = verified(with_entry(int8, tmp_path, lambda entry: entry.update(to="genai")), stories)
    assert parity.gate == "failed"
    assert "the manifest says genai, but this is gguf" in parity.reasons[0]


def test_a_manifest_of_another_file_is_found_by_its_digests(int8, stories, tmp_path):
    def lie(entry: dict[str, Any]) -> None:
        entry["digests"]["model.layers.0.mlp.up_proj.weight"] = "0" * 64

    parity = verified(with_entry(int8, tmp_path, lie), stories)
    assert (parity.gate, parity.lattice_identity) == ("failed", False)
    assert "model.layers.0.mlp.up_proj.weight is not what was laid out" in parity.reasons[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda entry: entry.pop("quant"), "quant"),
        (lambda entry: entry.update(embedding_quant=8), "embedding_quant"),
        (lambda entry: entry.update(fallbacks={"a": "b"}), "fallbacks"),
        (lambda entry: entry.update(fallbacks=[{"tensor": "a"}]), "fallbacks"),
        (lambda entry: entry.update(digests={"a": 1}), "digests"),
        (lambda entry: entry.update(lattice=[]), "lattice"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_an_error(int8, stories, tmp_path, change, named):
    with pytest.raises(BadInput, match="EW-559") as error:
        verified(with_entry(int8, tmp_path, change), stories)
    assert f"{named} missing or of another type" in str(error.value)


# ---------------------------------------------------------------- other text, other limits


def test_a_users_own_text_takes_the_place_of_the_built_in_ones(int8, stories, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a little girl named Lily. " * 20)
    own = verified(int8, stories, data=tmp_path / "*.txt")
    built_in = verified(int8, stories)
    assert own.gate == "passed"
    assert own.kl is not None and built_in.kl is not None
    assert own.kl < built_in.kl  # what the model was trained on, where it is sure
    assert own.perplexity_ratio != built_in.perplexity_ratio


def test_text_that_is_not_there_is_named(int8, stories, tmp_path):
    with pytest.raises(BadInput, match="EW-203"):
        verified(int8, stories, data=tmp_path / "nothing.txt")


def test_a_width_without_limits_is_refused_whatever_the_user_allows(int8, stories, monkeypatch):
    from edgewright.export.gate import limits

    monkeypatch.delitem(limits.LIMITS, "q8_0")
    with pytest.raises(BadInput, match="EW-557"):
        verified(int8, stories)
    with pytest.raises(BadInput, match="EW-557"):
        verified(int8, stories, max_kl=0.1)


def test_a_limit_that_is_none_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(RecipeError, match="EW-560"):
        verified(tmp_path / "nothing", tmp_path, max_kl=float("nan"))


def test_a_users_limit_replaces_only_that_of_the_mean_kl(int8, stories, monkeypatch):
    """A wrong computation stays one, and so does worse text, however much KL the user allows."""
    from edgewright.export import parity

    right = parity.compare
    monkeypatch.setattr(
        parity, "compare", lambda *given: replace(right(*given), kl_runtime=0.5, perplexity_ratio=2.0, top1_regret=9.0)
    )
    found = verified(int8, stories, max_kl=1e9)
    assert (found.gate, found.kl_limit, len(found.reasons)) == ("failed", 1e9, 3)
