"""What must be true of a model directory before any library opens it.

A model directory is data that somebody else wrote, also when it lies on the local disk: it may hold code, pickles,
broken files and links to elsewhere. Names prove nothing, so files are judged by their content. Nothing here runs,
unpickles or imports what it looks at, and only the first and last bytes and the headers of files are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgewright.errors import BadInput, Unsafe
from edgewright.export.guard_formats import check_gguf, check_safetensors, open_regular, unique_keys

__all__ = ["check_gguf", "check_model_directory", "check_not_pickle", "check_safetensors", "read_json"]

MAX_FILES = 10_000
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 16 * 2**20

CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""Files whose keys decide what a library does."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""A tokenizer is in one of these."""
CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".dylib", ".dll"})
WEIGHT_SUFFIXES = frozenset({
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".safetensors",
})  # fmt: skip

CODE_KEYS = frozenset({"auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "trust_remote_code"})
"""Keys that name a module, a class or a repository to import."""
PRIVATE_KEYS = frozenset({
    "_name_or_path", "_commit_hash", "_from_model_config", "_attn_implementation_autoset", "_sliding_window_pattern",
    "_load_in_4bit", "_load_in_8bit",
})  # fmt: skip
"""The private keys that do nothing; any other `_key` reaches into the library's own attributes and is refused."""
IMPLEMENTATION_KEYS = frozenset({
    "attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation",
})  # fmt: skip
IMPLEMENTATIONS = frozenset({
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm",
})  # fmt: skip
"""What an implementation key may say; anything else is the name of a repository with a kernel to download and run."""

# A pickle of protocol 0 or 1 has no magic; it names what it calls as `c<module>\n<name>\n` or `i<module>\n<name>\n`.
_TEXT_GLOBAL = re.compile(rb"[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")
_PICKLE_OPCODES = frozenset(b"()012FINJKLMPQRSTUVX]abcdeghijlopqrstu}BCG.\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c")
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!", b"\x78\x9c", b"\x78\x01")
_MEMBER = re.compile(rb"\.(?:pkl|pickle|npy|joblib|dill)|data\.pkl|archive/")
_ENDS = 2**20


def check_model_directory(directory: Path, *, tokenizer: bool = True) -> None:
    """Refuse a Hugging Face model directory that is unsafe, incomplete or damaged.

    Args:
        directory: the directory, with `config.json`, `*.safetensors` and, if `tokenizer`, `tokenizer.json`.
        tokenizer: whether a tokenizer must be there.

    Raises:
        Unsafe: code, a key that names code, a pickle, or a link that leaves the directory (EW-313 to EW-316).
        BadInput: something is missing or damaged (EW-310 to EW-312, EW-317, EW-319).
    """
    directory = Path(directory)
    files = _files(directory)
    _require(directory, "config.json", "the shape of the model")
    for path in files:
        _check_file(path)
    for name in CONFIG_FILES:
        if (directory / name).is_file():
            _check_keys(directory / name, read_json(directory / name, limit=MAX_CONFIG_BYTES))
    if tokenizer and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        _require(directory, TOKENIZER_FILES[0], "the tokenizer of the model")
    for path in _weights(directory):
        check_safetensors(path)


def read_json(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """A JSON object from a file of bounded size, without duplicate keys.

    Raises:
        BadInput: EW-312, not such a file; EW-311, there is none.
    """
    size = open_regular(path)
    if size > limit:
        raise _bad_json(path, f"at most {limit} bytes", f"{size} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, "valid JSON in UTF-8", str(error)[:200] or "nested too deeply") from None
    if not isinstance(value, dict):
        raise _bad_json(path, "an object", type(value).__name__)
    return value


def check_not_pickle(path: Path) -> None:
    """Refuse a file that is a pickle or holds one, whatever its name says.

    Raises:
        Unsafe: EW-315.
    """
    with path.open("rb") as file:
        first = file.read(4096)
        file.seek(max(0, path.stat().st_size - _ENDS))
        last = file.read(_ENDS) if first.startswith(b"PK") else b""
    kind = _pickle_kind(first, last, weights=path.suffix.lower() in WEIGHT_SUFFIXES)
    if kind is not None:
        raise Unsafe(
            "EW-315",
            f"this file is {kind}: opening it can run any code",
            where=path.absolute(),
            expected="weights as .safetensors",
            found=kind,
            fix="ask the author for safetensors; or, where nothing can be harmed, load it in a sandbox with the tool "
            "that wrote it, save it as safetensors, and delete this file",
        )


def _pickle_kind(first: bytes, last: bytes, *, weights: bool) -> str | None:
    """What makes a file a pickle; None when nothing does. `weights`: its name says that a loader would try."""
    if first[8:9] == b"{" and first[4:8] == b"\0\0\0\0":
        return None  # the header length of safetensors, whose low bytes may look like anything
    if len(first) > 2 and first[0] == 0x80 and first[1] <= 5 and (first[2] in _PICKLE_OPCODES or first[2] >= 0x80):
        return f"a pickle (protocol {first[1]})"
    if first.startswith(b"PK\x03\x04") and (weights or _MEMBER.search(first + last)):
        return "a zip archive as pickles travel in"
    if first.startswith(b"\x93NUMPY") and b"|O" in first[:256]:
        return "a numpy array of pickled objects"
    if not weights:
        return None
    if first[257:262] == b"ustar" or first.startswith(_ARCHIVES):
        return "an archive in the place of weights"
    return "a pickle (protocol 0 or 1)" if _TEXT_GLOBAL.search(first) else None


def _files(directory: Path) -> list[Path]:
    """The entries of the directory that are files, none of which leads elsewhere."""
    if not directory.is_dir():
        what = "this is a file, not a model directory" if directory.exists() else "there is no such model directory"
        raise BadInput(
            "EW-310",
            what,
            where=directory.absolute(),
            expected="a directory with config.json, *.safetensors and tokenizer.json",
            fix="check the path; a model on a hub must be downloaded first: hf download NAME --local-dir DIR",
        )
    entries = sorted(directory.iterdir())
    if len(entries) > MAX_FILES:
        raise BadInput(
            "EW-310",
            "this directory holds too many entries for a model",
            where=directory.absolute(),
            expected=f"at most {MAX_FILES}",
            found=len(entries),
            fix="check the path",
        )
    root = directory.resolve()
    for path in entries:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise Unsafe(
                "EW-316",
                "this link leads out of the model directory",
                where=path.absolute(),
                expected=f"a file inside {directory}",
                found=path.readlink(),
                fix=f"copy the model with its links resolved: cp -rL {directory} COPY",
            )
    return [path for path in entries if not path.is_dir()]


def _check_file(path: Path) -> None:
    open_regular(path)
    if path.suffix.lower() in CODE_SUFFIXES:
        raise Unsafe(
            "EW-314",
            "this model directory holds code",
            where=path.absolute(),
            expected="data only",
            found=path.name,
            fix="if the architecture is one that transformers knows, delete the file; code from models is never run",
        )
    check_not_pickle(path)


def _check_keys(path: Path, value: object, at: str = "") -> None:
    """Refuse keys that name code, at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_keys(path, item, f"{at}[{index}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        name = f"{at}.{key}" if at else key
        if key in IMPLEMENTATION_KEYS:
            _check_implementation(path, name, item)
        elif (key in CODE_KEYS and item) or (key.startswith("_") and key not in PRIVATE_KEYS):
            raise _names_code(path, name, item)
        _check_keys(path, item, name)


def _check_implementation(path: Path, name: str, value: object) -> None:
    for item in value.values() if isinstance(value, dict) else [value]:
        if item is not None and item not in IMPLEMENTATIONS:
            raise _names_code(path, name, item)


def _names_code(path: Path, key: str, value: object) -> Unsafe:
    return Unsafe(
        "EW-313",
        f"the key {key!r} asks for code that comes with the model",
        where=path.absolute(),
        expected="a model that transformers knows by itself",
        found=f"{key}: {ascii(value)[:120]}",
        fix=f"remove the key {key!r} if the architecture is one that transformers knows; code from models is never run",
    )


def _require(directory: Path, name: str, what: str) -> None:
    if not (directory / name).is_file():
        raise BadInput(
            "EW-311",
            f"this model directory lacks {name}, {what}",
            where=directory.absolute(),
            expected=name,
            found=", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "an empty directory",
            fix="point to the directory that save_pretrained wrote for model and tokenizer",
        )


def _weights(directory: Path) -> list[Path]:
    """The safetensors files of the model: the shards of the index, which must all be there, or what lies there."""
    index = directory / "model.safetensors.index.json"
    found = sorted(path for path in directory.iterdir() if path.suffix.lower() == ".safetensors")
    if not index.exists():
        if not any(path.name != "lattice.safetensors" for path in found):
            _require(directory, "model.safetensors", "the weights of the model")
        return found
    shards = read_json(index, limit=MAX_INDEX_BYTES).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and all(map(_is_name, shards.values())) else set()
    if not names:
        expected = "an object weight_map: tensor name to the name of a file beside it"
        raise BadInput("EW-319", "this index of weights is damaged", where=index.absolute(), expected=expected)
    for name in sorted(names):
        _require(directory, name, "a shard that model.safetensors.index.json names")
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


def _bad_json(path: Path, expected: str, found: str) -> BadInput:
    fix = "copy or write the file again"
    return BadInput(
        "EW-312", "this JSON file cannot be used", where=path.absolute(), expected=expected, found=found, fix=fix
    )
