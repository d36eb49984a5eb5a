"""What other people's files must survive before a library opens them: every refusal names the file and is cheap."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to make the files that must be refused
import random
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from edgewright.errors import BadInput, EdgewrightError, Unsafe
from edgewright.export import guard, guard_gguf, guard_safetensors

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
F32, Q8_0, TQ2_0 = 0, 8, 35


class Canary:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A complete model directory, as small as can be."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
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


def safetensors(path: Path, header: object, data: int = 0, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


MALFORMED: dict[str, tuple[object, int, int | None]] = {
    "length beyond the file": (b"{}", 0, 99),
    "huge length": (b"{}", 0, 2**63),
    "length over the cap": (b"{}", 0, 2**30),
    "no JSON": (b"\x80abc", 0, None),
    "list": (b"[]", 0, None),
    "cut JSON": (b'{"a": ', 0, None),
    "not UTF-8": (b'{"\xff": 1}', 0, None),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, None),
    "NaN": (b'{"a": NaN}', 0, None),
    "duplicate tensor": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4, None),
    "duplicate key inside": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, None),
    "extra key": ({"a": {**entry(0, 4), "x": 1}}, 4, None),
    "missing key": ({"a": {"dtype": "U8", "shape": [4]}}, 4, None),
    "unknown type": ({"a": entry(0, 4, dtype="X8")}, 4, None),
    "type is no text": ({"a": entry(0, 4, dtype=["U8"])}, 4, None),
    "negative offset": ({"a": entry(-4, 0)}, 4, None),
    "reversed offsets": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, 4, None),
    "float shape": ({"a": entry(0, 4, [4.0])}, 4, None),
    "bool shape": ({"a": entry(0, 1, [True])}, 1, None),
    "huge shape": ({"a": entry(0, 4, [2**62, 2**62])}, 4, None),
    "shape and bytes differ": ({"a": entry(0, 4, [5])}, 4, None),
    "hole": ({"a": entry(0, 4), "b": entry(5, 8)}, 8, None),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, None),
    "data cut off": ({"a": entry(0, 400)}, 4, None),
    "data left over": ({"a": entry(0, 4)}, 40, None),
    "metadata with a number": ({"__metadata__": {"a": 1}}, 0, None),
    "metadata is a list": ({"__metadata__": []}, 0, None),
    "too many tensors": (b'{"a":1' + b',"dtype":1' * (guard_safetensors.MAX_TENSORS + 1) + b"}", 0, None),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors_are_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, length = MALFORMED[case]
    path = safetensors(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(BadInput) as caught:
        guard.check_safetensors(path)
    assert caught.value.code == "EW-317" and caught.value.where == str(path)
    assert caught.value.expected is not None and caught.value.found is not None


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


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int = F32, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def gguf_file(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    data: int = 0,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    raw = magic + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)
    return raw + bytes(-len(raw) % alignment + data)


ONE = [tensor("a", [8])]
BAD_GGUF: dict[str, bytes] = {
    "empty": b"",
    "only the magic": b"GGUF",
    "magic": gguf_file(magic=b"GGML"),
    "version 0": gguf_file(version=0),
    "version 1": gguf_file(version=1),
    "version of the future": gguf_file(version=4),
    "big endian": gguf_file(version=3 << 24),
    "pair count": gguf_file(counts=(0, 2**62)),
    "tensor count": gguf_file(counts=(2**62, 0)),
    "tensor count beyond the file": gguf_file(tensors=ONE, counts=(2, 0), data=32),
    "key length": gguf_file([struct.pack("<Q", 2**60) + b"a" * 30]),
    "key cut": gguf_file([struct.pack("<Q", 60_000) + b"a" * 30]),
    "key is not UTF-8": gguf_file([pair(b"\xff\xfe", 4, bytes(4))]),
    "empty key": gguf_file([pair("", 4, bytes(4))]),
    "duplicate key": gguf_file([pair("a", 4, bytes(4))] * 2),
    "value type": gguf_file([pair("a", 13, bytes(8))]),
    "value cut": gguf_file([pair("a", 10, bytes(2))], alignment=1),
    "string length": gguf_file([pair("a", 8, struct.pack("<Q", 2**63))]),
    "string cut": gguf_file([pair("a", 8, struct.pack("<Q", 999))]),
    "array of a billion strings": gguf_file([pair("a", 9, struct.pack("<IQ", 8, 10**9))]),
    "array of strings cut": gguf_file([pair("a", 9, struct.pack("<IQQ", 8, 2, 1) + b"x")]),
    "array of a billion numbers": gguf_file([pair("a", 9, struct.pack("<IQ", 4, 10**9))]),
    "array overflow": gguf_file([pair("a", 9, struct.pack("<IQ", 10, 2**61))]),
    "array of arrays": gguf_file([pair("a", 9, struct.pack("<IQ", 9, 1) + bytes(24))]),
    "array of unknown": gguf_file([pair("a", 9, struct.pack("<IQ", 77, 1) + bytes(24))]),
    "alignment 0": gguf_file([pair("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 24": gguf_file([pair("general.alignment", 4, struct.pack("<I", 24))]),
    "alignment 2^31": gguf_file([pair("general.alignment", 4, struct.pack("<I", 2**31))]),
    "alignment of another type": gguf_file([pair("general.alignment", 10, struct.pack("<Q", 32))]),
    "tensor name length": gguf_file(tensors=[tensor("a" * 64, [8])], data=32),
    "tensor name empty": gguf_file(tensors=[tensor("", [8])], data=32),
    "duplicate tensor": gguf_file(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)], data=64),
    "no dimensions": gguf_file(tensors=[tensor("a", [], dimensions=0)], data=32),
    "five dimensions": gguf_file(tensors=[tensor("a", [1, 1, 1, 1, 1])], data=32),
    "dimension 0": gguf_file(tensors=[tensor("a", [0])], data=32),
    "dimension 2^63": gguf_file(tensors=[tensor("a", [2**63])], data=32),
    "shape overflow": gguf_file(tensors=[tensor("a", [2**32, 2**32, 2**32])], data=32),
    "tensor type": gguf_file(tensors=[tensor("a", [8], kind=4)], data=32),
    "row no multiple of the block": gguf_file(tensors=[tensor("a", [200], kind=TQ2_0)], data=600),
    "offset not aligned": gguf_file(tensors=[tensor("a", [8], offset=8)], data=64),
    "offset into the void": gguf_file(tensors=[tensor("a", [8], offset=2**40)], data=64),
    "gap between tensors": gguf_file(tensors=[tensor("a", [8]), tensor("b", [8], offset=64)], data=128),
    "overlap": gguf_file(tensors=[tensor("a", [8]), tensor("b", [8], offset=0)], data=128),
    "no data": gguf_file(tensors=ONE),
    "data cut": gguf_file(tensors=ONE, data=31),
    "data of a block type cut": gguf_file(tensors=[tensor("a", [256], kind=TQ2_0)], data=65),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_malformed_gguf_is_refused_by_name(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD_GGUF[case])
    with pytest.raises(BadInput) as caught:
        guard.check_gguf(path)
    assert caught.value.code == "EW-318" and caught.value.where == str(path)
    assert caught.value.expected is not None and caught.value.found is not None


GOOD_GGUF = {
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


def test_the_largest_headers_cost_little_memory(tmp_path: Path) -> None:
    """Neither a header at the cap nor a data part of any size is held in memory."""
    many = {f"t{index:05}": entry(index, index + 1) for index in range(20_000)}
    big = safetensors(tmp_path / "x.safetensors", many, 20_000)
    vocabulary = gguf_file([pair("a", 9, struct.pack("<IQ", 8, 150_000) + text("token") * 150_000)])
    (tmp_path / "x.gguf").write_bytes(vocabulary)
    for check, path in ((guard.check_safetensors, big), (guard.check_gguf, tmp_path / "x.gguf")):
        tracemalloc.start()
        check(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * 2**20
