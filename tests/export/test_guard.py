"""What other people's files must survive before a library opens them: every refusal names the file and is cheap."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to make the files that must be refused
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from hostile import Canary, model_folder
from hostile_weights import F32, ONE, Q8_0, TQ2_0, gguf_file, pair, tensor, text
from safetensors.numpy import save_file

from edgewright.errors import BadInput, EdgewrightError, Unsafe
from edgewright.export import guard
from edgewright.export.guard import gguf as guard_gguf

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A complete model directory, as small as can be."""
    directory = model_folder(tmp_path / "model")
    save_file({"w": np.ones((2, 3), np.float32), "v": np.zeros(4, np.float16)}, directory / "model.safetensors")
    return directory


def refusal(directory: Path) -> EdgewrightError:
    with pytest.raises(EdgewrightError) as caught:
        guard.check_model_directory(directory)
    return caught.value


def test_a_complete_directory_passes(model: Path) -> None:
    guard.check_model_directory(model)
    guard.check_model_directory(model / ".." / "model")


def test_real_models_pass() -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    guard.check_model_directory(SHARED / "stories260K")
    guard.check_gguf(SHARED / "tokenizers/ggml_vocab/ggml-vocab-gpt-2.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    error = refusal(model)
    assert (error.code, error.exit_code) == ("EW-311", 3)
    assert name in error.what and error.where == str(model)


def test_a_tokenizer_is_only_needed_where_it_is_used(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    guard.check_model_directory(model, tokenizer=False)


def test_no_directory_and_a_file_instead(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").code == "EW-310"
    (tmp_path / "file").write_text("x")
    assert "a file" in refusal(tmp_path / "file").what


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoModelForCausalLM": "modeling_x.Model"}),
        ("config.json", "_attn_implementation_internal", "someone/kernel"),
        ("config.json", "_attn_implementation", "someone/kernel"),
        ("config.json", "attn_implementation", "kernels-community/flash-attn"),
        ("config.json", "experts_implementation", {"": "someone/kernel"}),
        ("config.json", "_experts_implementation_internal", "someone/kernel"),
        ("config.json", "trust_remote_code", True),
        ("config.json", "_anything_private", 1),
        ("config.json", "text_config", {"deep": [{"auto_map": {"a": "b"}}]}),
        ("generation_config.json", "custom_generate", "someone/loop"),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["tokenization_x.T", None]}),
        ("adapter_config.json", "auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
    ],
)
def test_keys_that_name_code_are_refused_by_name(model: Path, file: str, key: str, value: object) -> None:
    path = model / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, key: value}))
    error = refusal(model)
    assert isinstance(error, Unsafe) and (error.code, error.exit_code) == ("EW-313", 8)
    assert error.where == str(path)
    assert (key if key != "text_config" else "text_config.deep[0].auto_map") in error.what


@pytest.mark.parametrize(
    "extra",
    [
        {"_name_or_path": "x/y", "_attn_implementation_autoset": True},
        {"_attn_implementation": "sdpa"},
        {"attn_implementation": None},
        {"trust_remote_code": False},
    ],
)
def test_harmless_private_keys_pass(model: Path, extra: dict[str, object]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **extra}))
    guard.check_model_directory(model)


@pytest.mark.parametrize("name", ["modeling_x.py", "native.SO", "cached.pyc"])
def test_code_in_the_directory_is_refused(model: Path, name: str) -> None:
    (model / name).write_text("raise SystemExit\n")
    error = refusal(model)
    assert (error.code, error.exit_code) == ("EW-314", 8) and name in str(error.where)


WEIGHTS = ("pytorch_model.bin", "model.pt", "x.ckpt", "model.safetensors", "x.npy")
# A pickle of protocol 0 or 1 has no magic: under the name of a text it is a text, and nothing would unpickle it.
DISGUISES = [(name, protocol) for name in WEIGHTS for protocol in range(6)] + [("vocab.txt", n) for n in range(2, 6)]


@pytest.mark.parametrize(("name", "protocol"), DISGUISES)
def test_pickles_are_refused_under_any_name(model: Path, tmp_path: Path, name: str, protocol: int) -> None:
    (model / name).write_bytes(pickle.dumps({"w": Canary(tmp_path / "canary")}, protocol))
    error = refusal(model)
    assert isinstance(error, Unsafe) and (error.code, error.exit_code) == ("EW-315", 8)
    assert error.where == str(model / name) and error.fix is not None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "notes.dat"])
def test_zipped_pickles_are_refused(model: Path, name: str) -> None:
    with zipfile.ZipFile(model / name, "w") as archive:
        archive.writestr("padding", os.urandom(5000))
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    assert refusal(model).code == "EW-315"


def test_archives_in_the_place_of_weights_are_refused(model: Path) -> None:
    with tarfile.open(model / "model.pt", "w") as archive:
        archive.add(model / "config.json", "pickle")
    assert refusal(model).code == "EW-315"
    (model / "model.pt").write_bytes(b"\x1f\x8b" + bytes(50))
    assert refusal(model).code == "EW-315"


def test_object_arrays_are_refused_and_plain_arrays_pass(model: Path, tmp_path: Path) -> None:
    np.save(model / "x.npy", np.ones(3))
    guard.check_model_directory(model)
    np.save(model / "x.npy", np.array([Canary(tmp_path / "canary")], dtype=object), allow_pickle=True)
    assert refusal(model).code == "EW-315" and not (tmp_path / "canary").exists()


def test_a_safetensors_header_that_begins_like_a_pickle_passes(tmp_path: Path) -> None:
    """A header of 0x0280 bytes starts with the magic of a pickle of protocol 2."""
    path = tmp_path / "x.safetensors"
    header = b'{"__metadata__":{"a":"%s"}}'
    header = header % (b"x" * (0x0280 - len(header) + 2))
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert path.read_bytes()[:2] == b"\x80\x02"
    guard.check_not_pickle(path)
    guard.check_safetensors(path)


def test_links_out_of_the_directory_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "inside.json").symlink_to("config.json")
    guard.check_model_directory(model)
    (tmp_path / "secret").write_text("x")
    (model / "outside.txt").symlink_to(tmp_path / "secret")
    error = refusal(model)
    assert (error.code, error.exit_code) == ("EW-316", 8) and "outside.txt" in str(error.where)


def test_a_pipe_is_refused_and_does_not_block(model: Path) -> None:
    os.mkfifo(model / "weights.bin")
    assert refusal(model).code == "EW-311"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000, " " * (guard.MAX_CONFIG_BYTES + 1)]
)
def test_broken_config_is_named(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    error = refusal(model)
    assert isinstance(error, BadInput) and error.code == "EW-312" and error.where == str(model / "config.json")


@pytest.mark.parametrize(
    ("index", "code"),
    [
        ({"weight_map": {"w": "a.safetensors"}}, "EW-311"),
        ({"weight_map": {"w": "../model.safetensors"}}, "EW-319"),
        ({"weight_map": {"w": 3}}, "EW-319"),
        ({"weight_map": {}}, "EW-319"),
        ({}, "EW-319"),
    ],
)
def test_a_broken_shard_index(model: Path, index: object, code: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(model).code == code


# --- safetensors ---------------------------------------------------------------------------------------------------


def test_every_truncation_of_a_safetensors_file_is_refused(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    guard.check_safetensors(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(BadInput):
            guard.check_safetensors(path)


def test_all_types_of_the_library_pass(tmp_path: Path) -> None:
    types = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
    types += [np.float16, np.float32, np.float64]
    tensors = {str(index): np.zeros((index, 3), dtype) for index, dtype in enumerate(types)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    guard.check_safetensors(tmp_path / "x.safetensors")


# --- GGUF ----------------------------------------------------------------------------------------------------------


GOOD_GGUF = {
    "alignment 1": gguf_file([pair("general.alignment", 4, struct.pack("<I", 1))], ONE, data=32, alignment=1),
    "empty": gguf_file(),
    "one tensor": gguf_file(tensors=ONE, data=32),
    "version 2": gguf_file(tensors=ONE, data=32, version=2),
    "alignment 64": gguf_file(
        [pair("general.alignment", 4, struct.pack("<I", 64))],
        [tensor("a", [8]), tensor("b", [32], kind=Q8_0, offset=64)],
        data=64 + 34,
        alignment=64,
    ),
    "strings": gguf_file([pair("a", 9, struct.pack("<IQ", 8, 2) + text("x") + text("")), pair("b", 8, text("y"))]),
    "every scalar": gguf_file([pair(str(kind), kind, bytes(size)) for kind, size in guard_gguf.SCALARS.items()]),
}


@pytest.mark.parametrize("case", GOOD_GGUF)
def test_wellformed_gguf_passes(tmp_path: Path, case: str) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD_GGUF[case])
    guard.check_gguf(path)


def test_block_sizes_are_those_of_the_reference() -> None:
    reference = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    known = {kind: size for kind, size in guard_gguf.GGML_BLOCKS.items() if kind in reference}
    assert known.items() <= reference.items() and {F32, Q8_0, TQ2_0} <= known.keys()


def written_gguf(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {index}" for index in range(300)])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("a", np.ones((3, 8), np.float32))
    writer.add_tensor("b", np.ones((3, 7), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_what_the_reference_writes_passes_and_no_truncation_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    whole = written_gguf(path)
    guard.check_gguf(path)
    needed = len(whole) - (-3 * 7 * 2 % 32)  # the padding after the last tensor may be missing
    for size in range(0, needed, 61):
        path.write_bytes(whole[:size])
        with pytest.raises(BadInput):
            guard.check_gguf(path)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_damaged_headers_end_in_a_refusal_or_pass_but_never_in_a_crash(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "gguf":
        whole, check = written_gguf(path), guard.check_gguf
    else:
        save_file({"w": np.ones((2, 3), np.float32), "v": np.zeros(4, np.float16)}, path)
        whole, check = path.read_bytes(), guard.check_safetensors
    chance = random.Random(7)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(min(len(damaged), 400))] = chance.choice([0, 1, 127, 128, 255])
        path.write_bytes(damaged)
        try:
            check(path)
        except BadInput as error:
            refused += 1
            assert error.where == str(path)
    assert refused > 100
