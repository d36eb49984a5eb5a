"""The pre-check of ONNX Runtime GenAI folders: `genai_config.json` may name libraries, files and patterns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from edgewright.errors import BadInput, Unsafe
from edgewright.export.guard.config import check_configs
from edgewright.export.guard.files import printable, read_json
from edgewright.export.guard.folder import check_entries
from edgewright.export.guard.onnx import check_onnx
from edgewright.export.guard.paths import inside

CONFIG = "genai_config.json"
MAX_NUMBER = 2**31 - 1

LIBRARY_KEYS = re.compile(
    r"librar(y|ies)|(^|_)(lib|libs|dll|plugin|plugins)(_|$)|backend_path|custom_op", re.IGNORECASE
)
"""Keys whose value is loaded as code: custom_ops_library, backend_path, trt_extra_plugin_lib_paths, ..."""
ADDRESS_KEYS = re.compile(r"stream$|alloc$|free$|empty_cache$|bytestream|_address$|_ptr$|_handle$", re.IGNORECASE)
"""Provider options that are addresses in memory, written as text."""
WRITING_KEYS = re.compile(r"profil|dump|_log_?(file|dir)|optimized_model|cache_?(dir|path)|context_file", re.IGNORECASE)
"""Options that make a runtime write files, or read them, wherever they say."""
_OFF = ("", "0", "false", "False")
_PATTERN_KEY = re.compile(r"_names$")
_PATTERN = re.compile(r"[^%]*%d[^%]*")
_ELSEWHERE = re.compile(r"^[/\\~]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|://")
FILE_KEYS = re.compile(r"(^|_)filename$|^config_file$|^adapter_path$")


def check_genai_folder(directory: Path) -> None:
    """Refuse a GenAI folder that is unsafe or damaged.

    Checked: the entries of the folder; genai_config.json (keys that load libraries, give addresses or write files,
    patterns of names with anything but one %d, numbers out of range, names of files that are not here); every ONNX file
    in it with its external data; the other JSON files.

    Raises:
        Unsafe: EW-330, an option that loads code, writes files or reads memory; EW-331, a file name that leads
            elsewhere; and what the checks of the parts refuse.
        BadInput: EW-337, genai_config.json holds what no model has; EW-311, a file that it names is missing.
    """
    directory = Path(directory)
    files = check_entries(directory, deep=True)
    path = directory / CONFIG
    config = read_json(path)
    if not isinstance(config.get("model"), dict):
        raise _damaged(path, "the key 'model'", "an object", type(config.get("model")).__name__)
    for keys, value in _leaves(config, ()):
        _check_value(path, keys, value)
    check_configs(directory)
    for file in files:
        if file.suffix.lower() == ".onnx":
            check_onnx(file)


def _leaves(value: object, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every plain value with its keys; items of a list have the keys of the list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*keys, key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, keys)
    else:
        yield keys, value


def _check_value(path: Path, keys: tuple[str, ...], value: object) -> None:
    name, key = ".".join(keys), keys[-1]
    if isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise _damaged(path, f"the key {printable(name)}", f"a number up to {MAX_NUMBER}", value)
    if not isinstance(value, str):
        return
    if LIBRARY_KEYS.search(key) and value:
        raise _asks(path, name, value, "loads a library as code")
    if "provider_options" in keys and ADDRESS_KEYS.search(key) and value not in _OFF:
        raise _asks(path, name, value, "gives an address in memory")
    if WRITING_KEYS.search(key) and value not in _OFF:
        raise _asks(path, name, value, "makes the runtime read or write files")
    if _PATTERN_KEY.search(key) and "%" in value and not _PATTERN.fullmatch(value):
        raise _asks(path, name, value, "is a format that reads memory")
    if FILE_KEYS.search(key) and value:
        inside(path, path.parent, value, f"the key {printable(name)} has its file")
    elif _ELSEWHERE.search(value):
        inside(path, path.parent, value, f"the key {printable(name)} names a file")


def _asks(path: Path, name: str, value: str, what: str) -> Unsafe:
    return Unsafe(
        "EW-330",
        f"the key {printable(name)} {what}",
        where=path.absolute(),
        expected="a model that the runtime computes by itself",
        found=printable(value),
        fix="remove the key, if the model is your own; else do not use it",
    )


def _damaged(path: Path, what: str, expected: str, found: object) -> BadInput:
    return BadInput(
        "EW-337",
        f"this configuration of ONNX Runtime GenAI is damaged: {what}",
        where=path.absolute(),
        expected=expected,
        found=printable(str(found)),
        fix="copy the file again, or export the model again",
    )
