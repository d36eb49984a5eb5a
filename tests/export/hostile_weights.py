"""Files as somebody hostile or careless would write them: every kind that the guard must refuse, built on demand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from edgewright.export.guard import safetensors as guard_safetensors

F32, F16, Q8_0, TQ2_0, I8, I64 = 0, 1, 8, 35, 24, 27

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
    "millions of objects": (b'{"a":[' + b"{}," * 2_000_000 + b"{}]}", 0, None),
    "millions of numbers": (b'{"a":[' + b"1," * 2_000_000 + b"1]}", 0, None),
    "millions of texts": (b'{"__metadata__":{' + b'"":"",' * 500_000 + b'"":""}}', 0, None),
    "an entry in the place of the header": (entry(0, 4), 4, None),
    "too many tensors": (b'{"a":1' + b',"dtype":1' * (guard_safetensors.MAX_TENSORS + 1) + b"}", 0, None),
}


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


def data(pairs: list[bytes] | None = None, tensors: list[bytes] | None = None, body: bytes = b"") -> bytes:
    """A GGUF file whose data part is `body`."""
    return gguf_file(pairs, tensors) + body


_CUSTOM = pair("general.alignment", 4, struct.pack("<I", 13))
_SIGNED = pair("general.alignment", 5, struct.pack("<I", 13))
_TWO = [tensor("a", [8], offset=0), tensor("b", [3], offset=32)]
_PACKED = [tensor("a", [3], offset=0), tensor("b", [3], offset=12)]  # as if the alignment were 1
_HUGE = 0x7FFF_FFFF_FFFF_FFC0
LLAMA_CPP: dict[str, bytes] = {
    "HEADER_BAD_MAGIC": gguf_file(magic=b"FUGG"),
    "HEADER_BAD_VERSION_0": gguf_file(version=0),
    "HEADER_BAD_VERSION_1": gguf_file(version=1),
    "HEADER_BAD_VERSION_FUTURE": gguf_file(version=4),
    "HEADER_BAD_N_TENSORS": gguf_file(counts=(2**64 - 1, 0)),
    "HEADER_BAD_N_KV": gguf_file(counts=(0, 2**64 - 1)),
    "KV_BAD_KEY_SIZE": gguf_file([struct.pack("<Q", 2**64 - 1) + b"my_key_0" + struct.pack("<II", 4, 0)]),
    "KV_EMPTY_KEY": gguf_file([pair("", 4, bytes(4))]),
    "KV_BAD_TYPE": gguf_file([pair("my_key_0", 13, bytes(1))]),
    "KV_DUPLICATE_KEY": gguf_file([pair(f"my_key_{index // 2}", 4, bytes(4)) for index in range(8)]),
    "KV_BAD_ALIGN": gguf_file([_CUSTOM]),
    "KV_WRONG_TYPE_ALIGN": gguf_file([_SIGNED]),
    "TENSORS_BAD_NAME_SIZE": gguf_file(tensors=[tensor("my_tensor_0" + "_long" * 12, [8])], data=32),
    "TENSORS_BAD_N_DIMS": gguf_file(tensors=[tensor("a", [8], dimensions=5)], data=64),
    "TENSORS_BAD_SHAPE": gguf_file(tensors=[tensor("a", [2**64 - 1])], data=64),
    "TENSORS_ZERO_DIM": gguf_file(tensors=[tensor("a", [8, 0])], data=64),
    "TENSORS_NE_TOO_BIG": gguf_file(tensors=[tensor("a", [4 * (2**31 - 1)] * 2)], data=64),
    "TENSORS_NBYTES_TOO_BIG": gguf_file(tensors=[tensor("a", [int(1.01 * 2**30.5)] * 2, kind=I64)], data=64),
    "TENSORS_BAD_TYPE": gguf_file(tensors=[tensor("a", [8], kind=43)], data=32),
    "TENSORS_BAD_OFFSET": gguf_file(tensors=[tensor("a", [8], offset=2**64 - 1)], data=32),
    "TENSORS_DUPLICATE_NAME": gguf_file(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)], data=64),
    "TENSORS_BAD_ALIGN": gguf_file([_CUSTOM], _TWO, alignment=13),
    "TENSORS_INCONSISTENT_ALIGN": gguf_file(tensors=_PACKED),
    "DATA_NOT_ENOUGH_DATA": gguf_file(tensors=_TWO, data=32 + 12 - 1),
    "DATA_BAD_ALIGN": gguf_file([_CUSTOM], _TWO, data=64, alignment=13),
    "DATA_INCONSISTENT_ALIGN": gguf_file(tensors=_PACKED, data=24),
    "DATA_MEM_SIZE_OVERFLOW": gguf_file(
        tensors=[tensor("a", [_HUGE], kind=I8), tensor("b", [_HUGE], kind=I8, offset=_HUGE)], data=32
    ),
}
"""The kinds that llama.cpp's own tests/test-gguf.cpp makes by hand, by their names there.

An empty dimension is the one that newer versions of llama.cpp take; no model has a weight of nothing, so it is refused.
"""

TOKENS = pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + text("a") * 3)
NOT_FINITE_GGUF: dict[str, bytes] = {
    "NaN": data(tensors=[tensor("a", [2])], body=struct.pack("<2f", 1, float("nan"))),
    "infinite f16": data(tensors=[tensor("a", [2], kind=F16)], body=struct.pack("<2e", 1, float("inf"))),
    "scale of a ternary block": data(
        tensors=[tensor("a", [512], kind=TQ2_0)],
        body=bytes(64) + struct.pack("<e", 1) + bytes(64) + struct.pack("<e", float("nan")),
    ),
    "scale of an 8-bit block": data(
        tensors=[tensor("a", [64], kind=Q8_0)], body=bytes(34) + struct.pack("<e", float("-inf")) + bytes(32)
    ),
}
TRICKS_GGUF: dict[str, bytes] = {
    "part of a split model": gguf_file([pair("split.count", 2, struct.pack("<H", 2))]),
    "fewer scores than tokens": gguf_file([TOKENS, pair("tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, 0))]),
    "scores without tokens": gguf_file([pair("tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, 0))]),
    "token types as bytes": gguf_file(
        [TOKENS, pair("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 0, 3) + b"123")]
    ),
    "megabytes of keys": gguf_file([pair("k" * 60_000 + str(index), 4, bytes(4)) for index in range(20)]),
}
TEMPLATES = {
    "include": "{%- include '/etc/passwd' %}",
    "import": "{% from 'x' import y %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "huge": "x" * (2**20 + 1),
}

NAN, INFINITY = float("nan"), float("inf")
NOT_FINITE_SAFETENSORS: dict[str, tuple[str, bytes]] = {
    "F32 NaN": ("F32", struct.pack("<2f", 0, NAN)),
    "F32 infinite": ("F32", struct.pack("<2f", -INFINITY, 0)),
    "F16 NaN": ("F16", struct.pack("<2e", 0, NAN)),
    "BF16 infinite": ("BF16", b"\0\0\x80\x7f"),
    "BF16 NaN": ("BF16", b"\xc0\xff\0\0"),
    "F64 NaN": ("F64", struct.pack("<2d", NAN, 0)),
}


def not_finite(path: Path, case: str, name: str = "w.weight") -> Path:
    """A safetensors file with one weight of two numbers, one of which is not finite."""
    dtype, raw = NOT_FINITE_SAFETENSORS[case]
    header = json.dumps({name: {"dtype": dtype, "shape": [2], "data_offsets": [0, len(raw)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    return path
