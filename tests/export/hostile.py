"""All kinds of hostile models in one list, for the tests and for benchmarks/guard.py: each is built on demand."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle  # noqa: TID251 - to make the files that must be refused
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hostile_graphs as graphs
import hostile_weights as weights

CHECKS = {
    "safetensors": "check_safetensors",
    "gguf": "check_gguf",
    "onnx": "check_onnx",
    "genai": "check_genai_folder",
    "openvino": "check_openvino_folder",
    "archive": "check_not_archive",
    "folder": "check_model_directory",
}
"""For each kind of model the function of `edgewright.export.guard` that refuses it."""


class Case(NamedTuple):
    """One hostile model."""

    kind: str
    name: str
    code: str
    build: Callable[[Path], Path]
    """Makes it in an empty folder and gives the path to check."""


class Canary:
    """A pickle of this makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def model_folder(path: Path) -> Path:
    """A complete model directory, as small as can be."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    shard(path / "model.safetensors", "w.weight", "v.weight")
    return path


def shard(path: Path, *names: str) -> Path:
    """A safetensors file with tensors of four bytes."""
    entries = {name: weights.entry(4 * at, 4 * at + 4) for at, name in enumerate(names)}
    return weights.safetensors(path, entries, 4 * len(names))


def cases() -> list[Case]:
    """Every kind, in the order of `CHECKS`."""
    return [*_safetensors(), *_gguf(), *_graphs(), *_archives(), *_folders()]


def _written(name: str, raw: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(raw)
        return folder / name

    return build


def _safetensors() -> list[Case]:
    def build(name: str) -> Callable[[Path], Path]:
        return lambda folder: weights.safetensors(folder / "bad.safetensors", *weights.MALFORMED[name])

    def not_finite(name: str) -> Callable[[Path], Path]:
        return lambda folder: weights.not_finite(folder / "bad.safetensors", name)

    found = [Case("safetensors", name, "EW-317", build(name)) for name in weights.MALFORMED]
    return found + [Case("safetensors", name, "EW-323", not_finite(name)) for name in weights.NOT_FINITE_SAFETENSORS]


def _gguf() -> list[Case]:
    tables = ((weights.BAD_GGUF, "EW-318"), (weights.LLAMA_CPP, "EW-318"), (weights.TRICKS_GGUF, "EW-318"),
              (weights.NOT_FINITE_GGUF, "EW-323"))  # fmt: skip
    found = [
        Case("gguf", name, code, _written("bad.gguf", raw)) for table, code in tables for name, raw in table.items()
    ]
    for name, template in weights.TEMPLATES.items():
        raw = weights.gguf_file([weights.pair("tokenizer.chat_template", 8, weights.text(template))])
        found.append(Case("gguf", f"template: {name}", "EW-339", _written("bad.gguf", raw)))
    return found


def _graphs() -> list[Case]:
    def onnx(raw: bytes) -> Callable[[Path], Path]:
        return lambda folder: graphs.onnx_folder(folder / "model", raw)

    def genai(config: dict[str, object], raw: bytes | None = None) -> Callable[[Path], Path]:
        return lambda folder: graphs.genai_folder(folder / "model", config, raw)

    def openvino(content: str) -> Callable[[Path], Path]:
        return lambda folder: graphs.openvino_folder(folder / "model", content)

    evil = graphs.ONNX["custom operator"][0]
    return [
        *(Case("onnx", name, code, onnx(raw)) for name, (raw, code) in graphs.ONNX.items()),
        *(Case("genai", name, code, genai(config)) for name, (config, code) in graphs.GENAI.items()),
        Case("genai", "graph with a custom operator", "EW-333", genai(graphs.genai_config(), evil)),
        *(Case("openvino", name, code, openvino(content)) for name, (content, code) in graphs.OPENVINO.items()),
        Case("openvino", "no weights", "EW-311", _openvino_without_weights),
        Case("openvino", "weights are a hard link", "EW-331", _openvino_hard_link),
    ]


def _openvino_without_weights(folder: Path) -> Path:
    path = graphs.openvino_folder(folder / "model", graphs.net(graphs.constant()))
    (path / "openvino_model.bin").unlink()
    return path


def _openvino_hard_link(folder: Path) -> Path:
    path = graphs.openvino_folder(folder / "model", graphs.net(graphs.constant()))
    os.link(path / "openvino_model.bin", folder / "secret")
    return path


def _zip(name: str, content: bytes = b"x", mode: int = 0o644) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return raw.getvalue()


def _tar(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: str = "w") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return raw.getvalue()


def _archives() -> list[Case]:
    files = {
        "zip with a path above": ("model.zip", _zip("../../evil")),
        "zip with an absolute path": ("model.zip", _zip("/etc/evil")),
        "zip with a link": ("model.zip", _zip("link", b"/etc/passwd", 0o120777)),
        "zip bomb": ("model.zip", _zip("zeros", bytes(20_000_000))),
        "empty zip": ("model.zip", b"PK\x05\x06" + bytes(18)),
        "zip by another name": ("model.gguf.txt", _zip("a")),
        "tar with a path above": ("model.tar", _tar("../../evil")),
        "tar with a link": ("model.tar", _tar("link", tarfile.SYMTYPE, "/etc/passwd")),
        "tar with a hard link": ("model.tar", _tar("link", tarfile.LNKTYPE, "../secret")),
        "tar with a device": ("model.tar", _tar("device", tarfile.CHRTYPE)),
        "tar without magic": ("model.tar", bytes(1024)),
        "tar.gz": ("model.tar.gz", _tar("../evil", mode="w:gz")),
        "tar.xz": ("model.tar.xz", _tar("../evil", mode="w:xz")),
        "tar.bz2": ("model.tar.bz2", _tar("../evil", mode="w:bz2")),
        "gzip bomb": ("model", gzip.compress(bytes(20_000_000))),
        "xz": ("model", lzma.compress(b"x")),
        "bzip2": ("model", bz2.compress(b"x")),
        "zstandard": ("model", b"\x28\xb5\x2f\xfd" + bytes(50)),
        "7z": ("model.7z", b"7z\xbc\xaf\x27\x1c" + bytes(50)),
        "rar": ("model", b"Rar!\x1a\x07\x01\x00" + bytes(50)),
        "nemo": ("model.nemo", _tar("weights")),
    }
    return [Case("archive", name, "EW-336", _written(file, raw)) for name, (file, raw) in files.items()]


def _folders() -> list[Case]:
    changes: dict[str, tuple[Callable[[Path], object], str]] = {
        "link that leads out": (lambda path: (path / "x.txt").symlink_to(path.parent), "EW-316"),
        "weights are a link": (_weights_linked, "EW-316"),
        "pipe": (lambda path: os.mkfifo(path / "model-x.safetensors"), "EW-311"),
        "socket": (_socket, "EW-311"),
        "code": (lambda path: (path / "modeling_x.py").write_text("raise SystemExit"), "EW-314"),
        "library": (lambda path: (path / "x.so").write_bytes(b"\x7fELF"), "EW-314"),
        "pickle": (lambda path: (path / "x.bin").write_bytes(pickle.dumps(Canary(path / "canary"))), "EW-315"),
        "control characters": (lambda path: (path / "a\x1b[2Jb").write_text("x"), "EW-338"),
        "name that is no UTF-8": (lambda path: Path(os.fsdecode(bytes(path) + b"/a\xff")).write_text("x"), "EW-338"),
        "backslashes": (lambda path: (path / "..\\evil").write_text("x"), "EW-338"),
        "names alike": (lambda path: (path / "Config.json").write_text("{}"), "EW-338"),
        "thousands of entries": (_many_entries, "EW-310"),
        "huge config": (lambda path: (path / "config.json").write_text('{"a": "%s"}' % ("x" * 2**23)), "EW-312"),
        "deep config": (lambda path: (path / "config.json").write_text('{"a":' + "[" * 10**6), "EW-312"),
        "dense config": (lambda path: (path / "config.json").write_text('{"a":[%s[]]}' % ("[]," * 10**6)), "EW-312"),
        "key twice": (lambda path: (path / "config.json").write_text('{"a": 1, "a": 2}'), "EW-312"),
        "a billion layers": (lambda path: _config(path, num_hidden_layers=10**9), "EW-312"),
        "negative size": (lambda path: _config(path, text_config={"hidden_size": -1}), "EW-312"),
        "code key": (lambda path: _config(path, auto_map={"AutoModel": "x.Y"}), "EW-313"),
        "kernel to download": (lambda path: _config(path, _attn_implementation_internal="a/b"), "EW-313"),
        "shard elsewhere": (lambda path: _index(path, {"w.weight": "../a.safetensors"}), "EW-319"),
        "shard at an absolute path": (lambda path: _index(path, {"w.weight": "/a.safetensors"}), "EW-319"),
        "shard missing": (lambda path: _index(path, {"w.weight": "a.safetensors"}), "EW-311"),
        "tensor not in its shard": (lambda path: _index(path, {"x.weight": "model.safetensors"}), "EW-319"),
        "tensor in two shards": (_tensor_twice, "EW-319"),
        "shard not listed": (_stray_shard, "EW-319"),
        "sparse tokenizer of gigabytes": (lambda path: os.truncate(path / "tokenizer.json", 2**32), "EW-312"),
        "template of gigabytes": (_huge_template, "EW-339"),
        "NaN": (lambda path: weights.not_finite(path / "model.safetensors", "F32 NaN"), "EW-323"),
        "shards that together are too many": (_many_shards, "EW-317"),
    }
    for name, template in weights.TEMPLATES.items():
        changes[f"template: {name}"] = (_template(template), "EW-339")

    def build(change: Callable[[Path], object]) -> Callable[[Path], Path]:
        def made(folder: Path) -> Path:
            path = model_folder(folder / "model")
            change(path)
            return path

        return made

    return [Case("folder", name, code, build(change)) for name, (change, code) in changes.items()]


def _weights_linked(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "outside")
    (path / "model.safetensors").symlink_to("../outside")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path)  # names of sockets must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("model.bin")
    os.chdir(here)


def _many_entries(path: Path) -> None:
    for index in range(4_001):
        (path / str(index)).touch()


def _many_shards(path: Path) -> None:
    for index in range(30):
        weights.safetensors(path / f"x{index}.safetensors", {}, length=2**40)


def _config(path: Path, **values: object) -> None:
    (path / "config.json").write_text(json.dumps(values))


def _index(path: Path, shards: dict[str, str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _tensor_twice(path: Path) -> None:
    shard(path / "b.safetensors", "w.weight", "u.weight")
    _index(path, {"w.weight": "model.safetensors", "v.weight": "model.safetensors", "u.weight": "b.safetensors"})


def _stray_shard(path: Path) -> None:
    shard(path / "model-00001-of-00002.safetensors", "u.weight")
    _index(path, {"w.weight": "model.safetensors", "v.weight": "model.safetensors"})


def _huge_template(path: Path) -> None:
    (path / "chat_template.jinja").touch()
    os.truncate(path / "chat_template.jinja", 2**32)


def _template(template: str) -> Callable[[Path], object]:
    return lambda path: (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def peak_and_time(kind: str, path: Path) -> dict[str, Any]:
    """Check a model in this process: the code of the refusal, CPU seconds, bytes by which the peak of memory grew.

    Linux only: the peak is `VmHWM`, which holds mapped files too.
    """
    import time

    from edgewright.errors import EdgewrightError
    from edgewright.export import guard

    check, code, where = vars(guard)[CHECKS[kind]], None, ""
    before, started = _peak(), time.process_time()
    try:
        check(path)
    except EdgewrightError as error:
        code, where = error.code, str(error)
    return {"code": code, "message": where, "seconds": time.process_time() - started, "peak": _peak() - before}


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell the peak of memory")


def heavy(folder: Path) -> dict[str, Path]:
    """Files at the caps: the largest and densest that the checks look at before they refuse or pass them, by kind."""
    folder.mkdir()
    entry = b'"model.layers.000000.mlp.weight":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    many = b"{%s}" % b",".join(_numbered(entry % (4 * at, 4 * at + 4), at) for at in range(49_000))
    row = weights.tensor("blk.000000.weight", [8])[:-8]
    tensors = [_numbered(row, at) + struct.pack("<Q", 32 * at) for at in range(65_000)]
    value = graphs.message(1, b"v") + graphs.message(5, graphs.tensor("", (1,), raw=bytes(4))) + graphs.number(20, 4)
    nodes = graphs.message(1, graphs.node("Constant", "", (), value)) * 30_000
    initializer = graphs.message(5, graphs.tensor("000000", (1,), raw=bytes(4)))
    names = b"".join(_numbered(initializer, at) for at in range(90_000))
    strings = weights.pair("a", 9, struct.pack("<IQ", 8, 1_999_999) + weights.text("token") * 1_999_999)
    built = {
        "safetensors": weights.safetensors(folder / "tensors.safetensors", many, 4 * 49_000),
        "gguf": _written("tensors.gguf", weights.gguf_file(tensors=tensors, data=32 * 65_000))(folder),
        "gguf strings": _written("strings.gguf", weights.gguf_file([strings]))(folder),
        "gguf far apart": _sparse_strings(folder / "sparse.gguf"),
        "onnx": _written("nodes.onnx", graphs.model(graphs.graph(extra=nodes)))(folder),
        "onnx tensors": _written("tensors.onnx", graphs.model(graphs.graph(extra=names)))(folder),
        "openvino": graphs.openvino_folder(folder / "ir", graphs.net(*[graphs.constant()] * 49_000)),
        "folder": model_folder(folder / "model"),
    }
    dense = '{"weight_map":{' + ",".join(f'"layer.{at:07}.weight":"model.safetensors"' for at in range(140_000)) + "}}"
    (built["folder"] / "model.safetensors.index.json").write_text(dense)
    return built


def _numbered(template: bytes, number: int) -> bytes:
    return template.replace(b"000000", b"%06d" % number, 1)


def _sparse_strings(path: Path) -> Path:
    """A file of 4 GB, nearly all of it holes: 100,000 strings, each on a page of its own."""
    with path.open("wb") as file:
        file.write(weights.gguf_file([weights.pair("a", 9, struct.pack("<IQ", 8, 100_000))])[: 24 + 8 + 1 + 4 + 12])
        for _ in range(100_000):
            file.write(struct.pack("<Q", 40_000))
            file.seek(40_000, os.SEEK_CUR)
        file.write(b"x")
    return path
