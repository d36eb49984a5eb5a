"""Hostile ONNX files, written byte by byte in the wire format, and hostile GenAI and OpenVINO folders."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

FLOAT, INT32, INT64, STRING, INT4 = 1, 6, 7, 8, 22


def varint(value: int) -> bytes:
    raw = bytearray()
    value &= 2**64 - 1
    while value > 127:
        raw.append(value & 127 | 128)
        value >>= 7
    return bytes([*raw, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(body)) + body


def tensor(name: str = "w", dims: tuple[int, ...] = (2,), kind: int = FLOAT, *parts: bytes, raw: bytes = b"") -> bytes:
    """A TensorProto: raw bytes, or whatever `parts` say."""
    shape = b"".join(number(1, size) for size in dims)
    return shape + number(2, kind) + message(8, name.encode()) + (message(9, raw) if raw else b"") + b"".join(parts)


def external(dims: tuple[int, ...] = (2,), name: str = "w", kind: int = FLOAT, **entries: object) -> bytes:
    """A TensorProto with external data; `location` is `data` unless given."""
    values = {"location": "data", **entries}
    pairs = [message(13, message(1, key.encode()), message(2, str(value).encode())) for key, value in values.items()]
    return tensor(name, dims, kind, *pairs, number(14, 1))


def node(operator: str = "Add", domain: str = "", inputs: tuple[str, ...] = ("w",), *attributes: bytes) -> bytes:
    parts = [message(1, name.encode()) for name in inputs] + [message(2, b"y"), message(4, operator.encode())]
    return b"".join([*parts, message(7, domain.encode()), *(message(5, each) for each in attributes)])


def graph(*initializers: bytes, nodes: tuple[bytes, ...] = (node(),), extra: bytes = b"") -> bytes:
    body = [message(1, each) for each in nodes] + [message(5, each) for each in initializers]
    return b"".join(body) + extra + message(12, message(1, b"y"))


def model(body: bytes | None = None, extra: bytes = b"") -> bytes:
    return number(1, 8) + message(8, number(2, 17)) + message(7, graph() if body is None else body) + extra


def function(name: str, *calls: str, domain: str = "local") -> bytes:
    nodes = [message(7, node(call, domain)) for call in calls]
    return message(25, message(1, name.encode()), message(10, domain.encode()), *nodes)


def nested(depth: int) -> bytes:
    body = graph()
    for _ in range(depth):
        body = graph(nodes=(node("If", "", ("c",), message(1, b"then_branch") + message(6, body) + number(20, 5)),))
    return body


GOOD = struct.pack("<2f", 1, 2)
NAN = struct.pack("<2f", 1, float("nan"))
INFINITE = struct.pack("<2f", 1, float("inf"))
_EXPLODING = b"".join(function(f"f{index}", *[f"f{index + 1}"] * 10) for index in range(12)) + function("f12")

ONNX: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "EW-332"),
    "garbage": (b"\x7f\x45\x4c\x46" * 100, "EW-332"),
    "cut": (model(graph(tensor(raw=GOOD)))[:-9], "EW-332"),
    "text": (b"this is no model", "EW-332"),
    "no graph": (number(1, 8) + message(8, number(2, 17)), "EW-332"),
    "two graphs": (model(extra=message(7, graph())), "EW-332"),
    "no version": (message(8, number(2, 17)) + message(7, graph()), "EW-332"),
    "no operator sets": (number(1, 8) + message(7, graph()), "EW-332"),
    "graph without nodes": (model(graph(nodes=())), "EW-332"),
    "length beyond the message": (model(graph() + varint(5 << 3 | 2) + varint(2**40)), "EW-332"),
    "length of ten bytes": (model(graph() + varint(5 << 3 | 2) + b"\xff" * 10), "EW-332"),
    "field number 0": (model(b"\x02\x00" + graph()), "EW-332"),
    "group": (model(graph() + b"\x2b"), "EW-332"),
    "graph as a number": (number(1, 8) + message(8, number(2, 17)) + number(7, 3), "EW-332"),
    "unknown type": (model(graph(tensor(kind=99, raw=GOOD))), "EW-332"),
    "no type": (model(graph(message(8, b"w") + message(9, GOOD))), "EW-332"),
    "negative dimension": (model(graph(tensor(dims=(-1,), raw=GOOD))), "EW-332"),
    "shape overflow": (model(graph(tensor(dims=(2**32, 2**32), raw=GOOD))), "EW-332"),
    "too many dimensions": (model(graph(tensor(dims=(1,) * 33, raw=GOOD[:4]))), "EW-332"),
    "raw bytes too short": (model(graph(tensor(dims=(3,), raw=GOOD))), "EW-332"),
    "raw bytes too long": (model(graph(tensor(dims=(1,), raw=GOOD))), "EW-332"),
    "no values": (model(graph(tensor())), "EW-332"),
    "too few values": (model(graph(tensor("w", (3,), INT64, message(7, b"\1\2")))), "EW-332"),
    "values of another type": (model(graph(tensor("w", (2,), FLOAT, message(7, b"\1\2")))), "EW-332"),
    "values twice": (model(graph(tensor("w", (2,), FLOAT, message(4, GOOD), raw=GOOD))), "EW-332"),
    "float values cut": (model(graph(tensor("w", (2,), FLOAT, message(4, GOOD[:-1])))), "EW-332"),
    "type twice": (model(graph(tensor(raw=GOOD) + number(2, FLOAT))), "EW-332"),
    "segment": (model(graph(tensor(raw=GOOD) + message(3, number(1, 0)))), "EW-332"),
    "two initializers of one name": (model(graph(tensor(raw=GOOD), tensor(raw=GOOD))), "EW-332"),
    "initializer without a name": (model(graph(tensor("", raw=GOOD))), "EW-332"),
    "sparse bomb": (model(graph(extra=message(15, number(3, 2**40)))), "EW-332"),
    "graphs inside each other": (model(nested(40)), "EW-332"),
    "function calls itself": (model(extra=function("f", "g") + function("g", "f")), "EW-332"),
    "functions explode": (model(graph(nodes=(node("f0", "local"),)), _EXPLODING), "EW-332"),
    "half a million fields": (model(graph(extra=message(13, b"") * 450_000)), "EW-332"),
    "megabytes of names": (model(graph(nodes=(node("MatMul", "", ("n" * 4000,) * 50),) * 60)), "EW-332"),
    "custom operator": (model(graph(nodes=(node("Evil", "com.evil"),))), "EW-333"),
    "custom operator in a branch": (
        model(graph(nodes=(node("If", "", ("c",), message(6, graph(nodes=(node("X", "ai.onnx.contrib"),)))),))),
        "EW-333",
    ),
    "custom operator in a function": (model(extra=message(25, message(1, b"f"), message(7, node("X", "x")))), "EW-333"),
    "Python operator": (model(graph(nodes=(node("PythonOp", "com.microsoft"),))), "EW-333"),
    "compiled for an accelerator": (model(graph(nodes=(node("EPContext", "com.microsoft"),))), "EW-333"),
    "data above the folder": (model(graph(external(location="../secret"))), "EW-331"),
    "data at an absolute path": (model(graph(external(location="/etc/passwd"))), "EW-331"),
    "data at a Windows path": (model(graph(external(location="C:\\secret"))), "EW-331"),
    "data in memory": (model(graph(external(location="*/_ORT_MEM_ADDR_/*", offset=1234))), "EW-331"),
    "data climbs out inside": (model(graph(external(location="sub/../../secret"))), "EW-331"),
    "data through a link": (model(graph(external(location="link"))), "EW-331"),
    "data through a linked folder": (model(graph(external(location="folder/secret"))), "EW-331"),
    "data is a hard link": (model(graph(external(location="hard"))), "EW-331"),
    "data with a control character": (model(graph(external(location="da\nta"))), "EW-331"),
    "no data file": (model(graph(external(location="missing"))), "EW-311"),
    "data is a folder": (model(graph(external(location="sub"))), "EW-311"),
    "data is a pipe": (model(graph(external(location="pipe"))), "EW-311"),
    "negative offset": (model(graph(external(offset=-4))), "EW-332"),
    "offset is no number": (model(graph(external(offset="4 "))), "EW-332"),
    "offset beyond the file": (model(graph(external(offset=2**60))), "EW-332"),
    "length of 1e15": (model(graph(external(length=10**15))), "EW-332"),
    "length is not the shape's": (model(graph(external(length=4))), "EW-332"),
    "data file too short": (model(graph(external((300,)))), "EW-332"),
    "unknown key": (model(graph(external(__class__="x"))), "EW-332"),
    "key twice": (model(graph(external() + message(13, message(1, b"location"), message(2, b"x")))), "EW-332"),
    "data and values": (model(graph(external() + message(9, GOOD))), "EW-332"),
    "texts outside": (model(graph(external(kind=STRING))), "EW-332"),
    "data overlaps": (model(graph(external(name="v"), external(offset=4))), "EW-332"),
    "one byte many times": (model(graph(*(external((256,), f"w{index}") for index in range(1200)))), "EW-332"),
    "data in an attribute": (
        model(graph(nodes=(node("Constant", "", (), message(5, external(location="../x"))),))),
        "EW-331",
    ),
    "NaN": (model(graph(tensor(raw=NAN))), "EW-323"),
    "NaN outside": (model(graph(external(location="nan"))), "EW-323"),
    "infinite weight": (model(graph(tensor(raw=INFINITE), nodes=(node("MatMul"),))), "EW-323"),
}
"""By kind the bytes of `model.onnx` and the code of the refusal; `onnx_folder` makes what lies around it."""

GOOD_ONNX: dict[str, bytes] = {
    "raw": model(graph(tensor(raw=GOOD))),
    "typed": model(
        graph(tensor("w", (2,), FLOAT, message(4, GOOD)), tensor("v", (3,), INT64, message(7, b"\1\x80\1\2")))
    ),
    "one number a field": model(graph(tensor("w", (2,), INT32, number(5, 7), number(5, -7)))),
    "texts": model(graph(tensor("w", (2,), STRING, message(6, b"a"), message(6, b"")))),
    "four bits": model(graph(tensor("w", (3,), INT4, raw=b"\1\2"))),
    "scalar": model(graph(tensor("w", (), FLOAT, raw=GOOD[:4]))),
    "nothing": model(graph(tensor("w", (0, 5)))),
    "outside": model(graph(external(), external(name="v", offset=8, length=8))),
    "tied": model(graph(external(), external(name="v"))),
    "in a folder": model(graph(external(location="sub/data"))),
    "mask": model(graph(tensor(raw=INFINITE))),
    "function": model(graph(nodes=(node("f", "local"),)), function("f", "g") + function("g")),
    "branches": model(nested(3)),
}


def onnx_folder(folder: Path, raw: bytes) -> Path:
    """`model.onnx` with the data files, links and pipes that the cases name."""
    secret, shared = folder.parent / "secret", folder.parent / "shared"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(raw)
    for path in (folder / "data", folder / "sub" / "data"):
        path.write_bytes(struct.pack("<256f", *range(256)))
    for path in (secret, shared):
        path.write_bytes(GOOD)
    (folder / "nan").write_bytes(NAN)
    (folder / "link").symlink_to(secret)
    (folder / "folder").symlink_to(folder.parent)
    os.link(shared, folder / "hard")
    os.mkfifo(folder / "pipe")
    return folder / "model.onnx"


def genai_config(**changes: object) -> dict[str, object]:
    """A genai_config.json as the runtime wants it; dotted names with `__` for the dots change a value."""
    decoder: dict[str, object] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "inputs": {"past_key_names": "past_key_values.%d.key"},
        "outputs": {"logits": "logits"},
        "num_hidden_layers": 1,
    }
    config: dict[str, object] = {"model": {"type": "llama", "decoder": decoder, "vocab_size": 4, "context_length": 8}}
    for dotted, value in changes.items():
        place, keys = config, dotted.split("__")
        for key in keys[:-1]:
            inner = place.setdefault(key, {})
            assert isinstance(inner, dict)
            place = inner
        place[keys[-1]] = value
    return config


_OPTIONS = "model__decoder__session_options__"


def _provider(name: str, **options: str) -> dict[str, object]:
    return genai_config(**{_OPTIONS + "provider_options": [{name: options}]})


GENAI: dict[str, tuple[dict[str, object], str]] = {
    "no model": ({"search": {}}, "EW-337"),
    "model is a list": ({"model": []}, "EW-337"),
    "a number beyond all": (genai_config(model__context_length=10**300), "EW-337"),
    "custom operators": (genai_config(**{_OPTIONS + "custom_ops_library": "evil.so"}), "EW-330"),
    "profiling": (genai_config(**{_OPTIONS + "enable_profiling": "/tmp/x"}), "EW-330"),
    "context of an accelerator": (genai_config(**{_OPTIONS + "ep.context_file_path": "x"}), "EW-330"),
    "library of a provider": (_provider("QNN", backend_path="libevil.so"), "EW-330"),
    "plug-in of a provider": (_provider("NvTensorRtRtx", trt_extra_plugin_lib_paths="evil.so"), "EW-330"),
    "address of a stream": (_provider("cuda", user_compute_stream="140737488355328"), "EW-330"),
    "address of an allocator": (_provider("cuda", gpu_external_alloc="140737488355328"), "EW-330"),
    "cache somewhere": (_provider("OpenVINO", cache_dir="x"), "EW-330"),
    "pattern reads memory": (genai_config(model__decoder__inputs__past_key_names="%s%s%n"), "EW-330"),
    "pattern with two numbers": (genai_config(model__decoder__inputs__past_key_names="a.%d.%d"), "EW-330"),
    "graph above the folder": (genai_config(model__decoder__filename="../model.onnx"), "EW-331"),
    "graph at an absolute path": (genai_config(model__decoder__filename="/etc/passwd"), "EW-331"),
    "file of another part": (genai_config(model__vision__filename="../x.onnx"), "EW-331"),
    "adapter above the folder": (genai_config(model__speech__adapter_filename="../x"), "EW-331"),
    "folder elsewhere": (genai_config(model__tokenizer_dir="../../etc"), "EW-331"),
    "address of a site": (genai_config(model__anything="https://example.org/x"), "EW-331"),
    "missing graph": (genai_config(model__decoder__filename="other.onnx"), "EW-311"),
}


def genai_folder(folder: Path, config: dict[str, object], raw: bytes | None = None) -> Path:
    """A GenAI folder with a graph that is good unless given."""
    folder.mkdir(parents=True)
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "model.onnx").write_bytes(model(graph(tensor(raw=GOOD))) if raw is None else raw)
    return folder


def constant(kind: str = "f32", shape: str = "2", offset: str = "0", size: str = "8") -> str:
    data = f'<data element_type="{kind}" shape="{shape}" offset="{offset}" size="{size}"/>'
    return f'<layer id="0" name="w" type="Const" version="opset1">{data}</layer>'


def net(*layers: str) -> str:
    return f'<?xml version="1.0"?><net name="a" version="11"><layers>{"".join(layers)}</layers><edges/></net>'


_BOMB = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>' + net(constant())
_FILE = '<!DOCTYPE net [<!ENTITY a SYSTEM "file:///etc/passwd">]><net><layers>&a;</layers></net>'
OPENVINO: dict[str, tuple[str, str]] = {
    "empty": ("", "EW-334"),
    "no XML": ("\x7fELF", "EW-334"),
    "cut": (net(constant())[:-12], "EW-334"),
    "not closed": ("<net><layers></net>", "EW-334"),
    "another document": ("<html></html>", "EW-334"),
    "no layers": ("<net/>", "EW-334"),
    "entities that explode": (_BOMB, "EW-335"),
    "entity that reads a file": (_FILE, "EW-335"),
    "deep": ("<net>" + "<layers>" * 100 + "</layers>" * 100 + "</net>", "EW-334"),
    "half a million elements": ("<net>" + "<a/>" * 450_000 + "</net>", "EW-334"),
    "one attribute of megabytes": (net(f'<layer type="{"x" * 5_000_000}" version="opset1"/>'), "EW-334"),
    "custom operation": (net('<layer id="0" type="Evil" version="extension"/>'), "EW-335"),
    "operation of an unknown set": (net('<layer id="0" type="Add" version="evil"/>'), "EW-335"),
    "unknown type": (net(constant(kind="x32")), "EW-334"),
    "negative offset": (net(constant(offset="-8")), "EW-334"),
    "no size": (net('<layer type="Const" version="opset1"><data element_type="f32" offset="0"/></layer>'), "EW-334"),
    "offset beyond the file": (net(constant(offset="999999")), "EW-334"),
    "size is not the shape's": (net(constant(shape="3")), "EW-334"),
    "shape overflow": (net(constant(shape=",".join(["4294967296"] * 8))), "EW-334"),
    "too many constants": (net(constant() * 50_001), "EW-334"),
    "NaN": (net(constant(offset="1024")), "EW-323"),
}


def openvino_folder(folder: Path, content: str) -> Path:
    """`openvino_model.xml` and a `.bin` of 256 floats and a pair with a NaN."""
    folder.mkdir(parents=True)
    (folder / "openvino_model.xml").write_bytes(content.encode())
    (folder / "openvino_model.bin").write_bytes(struct.pack("<256f", *range(256)) + NAN)
    return folder
