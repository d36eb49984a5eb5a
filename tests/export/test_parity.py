"""The gate and the export around it: what is broken is caught, and what is refused leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import edgewright
from edgewright.errors import BadInput, GateFailed, RecipeError
from edgewright.export import parity, to_gguf
from edgewright.export.artifact import Written, read_entry
from edgewright.export.gate.compare import Comparison, compare
from edgewright.export.gate.reference import read_reference
from edgewright.export.parity import differences, judge
from edgewright.export.runtimes import open_session
from edgewright.export.source import Source, load_source
from edgewright.export.targets import TARGETS

WAYS = {
    "prefill",
    "short prefill",
    "special tokens",
    "pieces",
    "decoding",
    "after a rewind",
    "full context",
    "full context, decoding",
}


def gguf_export(model: Path, out: Path, quant: str = "tq2_0", **settings: Any) -> Any:
    return edgewright.export(model, to="gguf", quant=quant, out=out, threads=1, **settings)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def certified(ternary_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The ternary model as TQ2_0, through the gate."""
    return gguf_export(ternary_model, tmp_path_factory.mktemp("certified"))


# ---------------------------------------------------------------- files that pass


def test_a_ternary_file_is_certified(certified, ternary_model):
    assert certified.path.name == f"{ternary_model.name}-tq2_0.gguf"
    assert (certified.gate, certified.fallbacks) == ("passed", [])
    assert certified.bytes == certified.path.stat().st_size
    parity = certified.parity
    assert parity["lattice_identity"]
    assert parity["tokenizer_identity"]
    assert parity["kl_ci"][0] <= parity["kl"] <= parity["kl_ci"][1]
    assert 0 < parity["kl"] <= 5e-3
    assert set(parity["kl_by_way"]) == WAYS
    assert parity["tokens"] > 480
    assert parity["kl_weights"] < 1e-6 < parity["kl_runtime"]  # the codes are exact, the embedding is half precision
    assert certified.to_json()["schema_version"] == 1


def test_the_manifest_says_what_the_file_is(certified, ternary_model):
    entry = read_entry(certified.path)
    assert entry is not None
    source = load_source(ternary_model)
    assert entry["made_from"] == {"name": source.name, "sha256": source.sha256}
    assert (entry["to"], entry["quant"], entry["embedding_quant"]) == ("gguf", "tq2_0", "f16")
    assert entry["lattice"] == dict.fromkeys(source.lattice, "exact")
    assert entry["parity"] == json.loads(json.dumps(certified.parity))
    assert str(certified.path.parent) not in (certified.path.parent / "edgewright.json").read_text()


def test_verify_measures_the_same_again(certified, ternary_model):
    parity = edgewright.verify(certified.path.parent, against=ternary_model, threads=1)
    assert parity.gate == "passed"
    assert parity.measured() == certified.parity
    assert {"path", "against", "schema_version"} <= parity.to_json().keys()


def test_a_checkpoint_can_be_verified_too(ternary_model, awkward_model):
    assert edgewright.verify(ternary_model, against=ternary_model, threads=1).gate == "passed"


def test_verify_needs_no_manifest(certified, ternary_model, tmp_path):
    shutil.copy(certified.path, tmp_path / "alone.gguf")
    parity = edgewright.verify(tmp_path / "alone.gguf", against=ternary_model, threads=1)
    assert (parity.gate, parity.kl_limit) == ("passed", 5e-3)


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_the_trained_model_exports_with_its_awkward_sizes(stories, tmp_path, quant):
    artifact = gguf_export(stories, tmp_path, quant)
    assert artifact.gate == "passed"
    assert len(artifact.fallbacks) == (0 if quant == "f32" else 5)
    if quant == "f32":
        assert artifact.parity["max_abs_diff"] <= 1e-3
        assert artifact.parity["top1_agreement"] == 1.0
        assert artifact.parity["greedy_identity"]


def test_files_share_a_manifest(certified, ternary_model, tmp_path):
    shutil.copytree(certified.path.parent, tmp_path / "out")
    other = gguf_export(ternary_model, tmp_path / "out" / "other.gguf", "q8_0", verify=False)
    assert other.path.name == "other.gguf"
    manifest = json.loads((tmp_path / "out" / "edgewright.json").read_text())
    assert sorted(manifest["artifacts"]) == sorted([certified.path.name, "other.gguf"])
    assert entries(tmp_path / "out") == sorted([certified.path.name, "edgewright.json", "other.gguf"])


def test_an_unproven_file_says_so(ternary_model, tmp_path):
    artifact = gguf_export(ternary_model, tmp_path, verify=False)
    entry = read_entry(artifact.path)
    assert entry is not None
    assert (artifact.gate, artifact.parity, entry["gate"], entry["parity"]) == ("skipped", None, "skipped", None)


def test_the_same_checkpoint_gives_the_same_bytes(certified, ternary_model, tmp_path):
    again = gguf_export(ternary_model, tmp_path, verify=False)
    assert again.path.read_bytes() == certified.path.read_bytes()


# ---------------------------------------------------------------- files that must not pass


def flip_a_code(path: Path) -> None:
    """One weight of one block becomes another."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    position = int(tensor.data_offset) + 5
    data[position] ^= 1 if data[position] & 3 != 1 else 3  # 1 -> 2, 0 <-> 1, 2 <-> 3: another legal code but for 3
    path.write_bytes(data)


def change_a_scale(path: Path) -> None:
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_v.weight")
    data = bytearray(path.read_bytes())
    data[int(tensor.data_offset) + 64] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"), [(flip_a_code, "model.layers.1.mlp.up_proj"), (change_a_scale, "layers.0.self_attn.v_proj")]
)
def test_one_wrong_bit_is_found(certified, ternary_model, tmp_path, damage, named):
    broken = tmp_path / "broken.gguf"
    shutil.copy(certified.path, broken)
    assert differences(broken, "gguf", load_source(ternary_model)) == []
    damage(broken)
    parity = edgewright.verify(broken, against=ternary_model, threads=1)
    assert (parity.gate, parity.lattice_identity) == ("failed", False)
    assert named in parity.reasons[0]


def test_another_checkpoint_is_not_this_one(certified, ternary_model, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(ternary_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    parity = edgewright.verify(certified.path, against=other, threads=1)
    assert parity.gate == "failed"
    assert "input_layernorm" in parity.reasons[0]


def unpermuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_gguf, "_row_order", lambda config, name: None)


def wrong_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    right = to_gguf.rope_settings
    monkeypatch.setattr(to_gguf, "rope_settings", lambda s, f: {**right(s, f), "rope.freq_base": 500000.0})


def shifted_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.export.gguf.vocabulary import Vocabulary

    right = Vocabulary.write

    def write(self: Vocabulary, writer: gguf.GGUFWriter) -> None:
        self.tokens[300], self.tokens[301] = self.tokens[301], self.tokens[300]
        right(self, writer)

    monkeypatch.setattr(Vocabulary, "write", write)


@pytest.mark.parametrize(
    ("breaking", "quant", "said"),
    [
        (unpermuted, "f32", "lattice"),
        (unpermuted, "q8_0", "lattice"),
        (wrong_theta, "f32", "logits differ"),
        (wrong_theta, "q8_0", "mean KL"),
        (shifted_vocabulary, "f32", "splits text"),
    ],
)
def test_a_broken_export_is_caught_and_leaves_nothing(stories, tmp_path, monkeypatch, breaking, quant, said):
    breaking(monkeypatch)
    with pytest.raises(GateFailed, match="EW-504") as error:
        gguf_export(stories, tmp_path / "out", quant)
    assert said in str(error.value)
    assert error.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_the_runtime_alone_sees_a_missing_permutation(stories, tmp_path, monkeypatch):
    """Logits and weights are two guards: without the second the first still refuses."""
    unpermuted(monkeypatch)
    monkeypatch.setattr("edgewright.export.parity.differences", lambda *arguments, **settings: [])
    with pytest.raises(GateFailed, match="mean KL"):
        gguf_export(stories, tmp_path, "f32")


def test_rounding_to_ternary_after_training_is_refused_with_advice(stories, ternary_model, tmp_path):
    from safetensors.torch import load_file, save_file

    dense = tmp_path / "dense"
    shutil.copytree(ternary_model, dense)
    weights = load_file(dense / "model.safetensors")
    generator = np.random.default_rng(0)
    for name, value in weights.items():
        if "_proj" in name:
            value.copy_(value.new_tensor(generator.standard_normal(value.shape) / 8))
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateFailed, match="train with the ternary method, or choose q8_0"):
        gguf_export(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_limit_can_be_set(certified, ternary_model):
    parity = edgewright.verify(certified.path, against=ternary_model, max_kl=1e-12, threads=1)
    assert (parity.gate, parity.kl_limit, parity.lattice_identity) == ("failed", 1e-12, True)
    assert "mean KL" in parity.reasons[0]


def test_a_failed_export_keeps_the_file_that_was_there(stories, tmp_path, monkeypatch):
    good = gguf_export(stories, tmp_path, "f32")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    unpermuted(monkeypatch)
    with pytest.raises(GateFailed):
        gguf_export(stories, tmp_path, "f32")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert good.path.name in before


# ---------------------------------------------------------------- all or nothing


def test_an_interrupted_export_leaves_nothing(ternary_model, tmp_path, monkeypatch):
    def interrupted(source: Source, path: Path, **settings: Any) -> Written:
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(to_gguf, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf_export(ternary_model, tmp_path)
    assert entries(tmp_path) == []


def test_a_full_disk_is_named(ternary_model, tmp_path, monkeypatch):
    import errno

    from edgewright.errors import OutOfResources

    def full(source: Source, path: Path, **settings: Any) -> Written:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(to_gguf, "write", full)
    with pytest.raises(OutOfResources, match="EW-401"):
        gguf_export(ternary_model, tmp_path)
    assert entries(tmp_path) == []


def test_what_a_killed_run_left_is_removed(ternary_model, tmp_path):
    import subprocess
    import sys

    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    name = f"{ternary_model.name}-tq2_0"
    left = tmp_path / f".{name}.{int(dead.stdout)}.staged.gguf"
    alive = tmp_path / f".{name}.{os.getppid()}.staged.gguf"
    for path in (left, alive):
        path.write_bytes(b"")
    gguf_export(ternary_model, tmp_path, verify=False)
    assert entries(tmp_path) == sorted([alive.name, f"{name}.gguf", "edgewright.json"])


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"to": "coreml", "quant": "f32"}, "EW-501", tuple(TARGETS)),
        ({"to": "gguf", "quant": "int4"}, "EW-502", TARGETS["gguf"].quants),
        ({"to": "genai", "quant": "tq2_0"}, "EW-502", TARGETS["genai"].quants),
        ({"to": "gguf", "quant": "f32", "embedding_quant": "int8"}, "EW-503", TARGETS["gguf"].embedding_quants),
    ],
)
def test_unknown_names_are_answered_with_the_legal_ones(ternary_model, tmp_path, settings, code, named):
    with pytest.raises(RecipeError, match=code) as error:
        edgewright.export(ternary_model, out=tmp_path / "out", **settings)
    assert ", ".join(named) in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_overwritten(ternary_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="EW-509"):
        edgewright.export(ternary_model, to="genai", quant="fp32", out=tmp_path)
    with pytest.raises(RecipeError, match="EW-509"):
        edgewright.export(ternary_model, to="gguf", quant="f32", out=tmp_path / "notes.txt")
    assert entries(tmp_path) == ["notes.txt"]


# ---------------------------------------------------------------- compare


def test_a_session_is_itself(ternary_model):
    with open_session(ternary_model, threads=1) as session:
        reference = read_reference(session)
        found = compare(reference, session, reference.readings)
    assert found.max_abs_diff is not None and found.max_abs_diff < 1e-4
    assert found.kl is not None and found.kl < 1e-9
    assert (found.kl_weights, found.greedy_agreement, found.tokenizer_identity) == (0.0, 1.0, True)
    assert (found.top1_agreement, found.top1_regret, found.greedy_identity) == (1.0, 0.0, True)
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert set(found.kl_by_way) == WAYS - {"special tokens", "full context", "full context, decoding"}


def test_different_vocabularies_cannot_be_compared(ternary_model, awkward_model):
    with open_session(ternary_model, threads=1) as one:
        reference = read_reference(one)
    with open_session(awkward_model, threads=1) as other, pytest.raises(BadInput, match="EW-607"):
        compare(reference, other)


def test_a_ternary_file_in_a_runtime_of_full_precision_has_the_tight_limit(ternary_model, tmp_path):
    """Stored as f32 the ternary weights are computed in f32: the limit is the one for exact arithmetic."""
    source = load_source(ternary_model)
    to_gguf.write(source, tmp_path / "m.gguf", quant="f32")
    parity = judge(tmp_path / "m.gguf", "gguf", {"ternary", "f32"}, source, threads=1)
    assert (parity.gate, parity.kl_limit) == ("passed", 1e-4)
    assert isinstance(parity.kl, float) and parity.kl < 1e-6
    assert set(Comparison.__slots__) <= parity.to_json().keys()


def test_the_longest_text_is_bounded_by_work_and_by_masks(ternary_model, monkeypatch):
    """However small the model: masks grow with the square of the text."""
    source = load_source(ternary_model)
    parameters = sum(int(np.prod(source.shape(name))) for name in source.names)
    monkeypatch.setattr(parity, "FULL_CONTEXT_WORK", 300 * parameters)
    assert parity._affordable_context(source) == 300
    monkeypatch.setattr(parity, "FULL_CONTEXT_WORK", 1e6 * parameters)
    assert parity._affordable_context(source) == parity.FULL_CONTEXT == 16384
