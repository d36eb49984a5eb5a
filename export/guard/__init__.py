"""What must be true of a model before any library opens it.

A model is data that somebody else wrote, also when it lies on the local disk: it may hold code, pickles, broken files
and links to elsewhere. Names prove nothing, so files are judged by their content. Nothing here runs, unpickles, unpacks
or imports what it looks at. Every check takes less than a second and 64 MB, whatever the file, and names the file and
the place in it. One module for each format: `guard/safetensors`, `guard/gguf`, `guard/onnx`, `guard/genai`,
`guard/openvino`, `guard/archive`; `guard/folder` and `guard/config` for what lies around the weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgewright.errors import BadInput
from edgewright.export.guard.archive import check_not_archive
from edgewright.export.guard.config import TOKENIZER_FILES, check_configs
from edgewright.export.guard.files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, read_json
from edgewright.export.guard.folder import check_entries, check_not_pickle
from edgewright.export.guard.genai import check_genai_folder
from edgewright.export.guard.gguf import check_gguf
from edgewright.export.guard.onnx import check_onnx
from edgewright.export.guard.openvino import check_openvino_folder
from edgewright.export.guard.safetensors import Span, check_safetensors
from edgewright.export.guard.values import BUDGET

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_INDEX_BYTES",
    "check_genai_folder",
    "check_gguf",
    "check_model_directory",
    "check_not_archive",
    "check_not_pickle",
    "check_onnx",
    "check_onnx_folder",
    "check_openvino_folder",
    "check_safetensors",
    "read_json",
]

INDEX = "model.safetensors.index.json"
SIDECARS = frozenset({"lattice.safetensors"})
"""Files of this package beside the weights."""
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def check_model_directory(directory: Path, *, tokenizer: bool = True) -> None:
    """Refuse a Hugging Face model directory that is unsafe, incomplete or damaged.

    Args:
        directory: the directory, with `config.json`, `*.safetensors` and, if `tokenizer`, `tokenizer.json`.
        tokenizer: whether a tokenizer must be there.

    Raises:
        Unsafe: code, a key that names code, a pickle, a link that leaves the directory, an archive, a tricky name or
            template (EW-313 to EW-316, EW-336, EW-338, EW-339).
        BadInput: something is missing or damaged (EW-310 to EW-312, EW-317, EW-319), or not finite (EW-323).
    """
    directory = Path(directory)
    check_not_archive(directory)
    files = check_entries(directory)
    _require(directory, "config.json", "the shape of the model")
    check_configs(directory)
    if tokenizer and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        _require(directory, TOKENIZER_FILES[0], "the tokenizer of the model")
    _check_weights(directory, [path for path in files if path.suffix.lower() == ".safetensors"])


def check_onnx_folder(directory: Path) -> None:
    """Refuse a folder with ONNX files that is unsafe or damaged.

    Raises:
        Unsafe, BadInput: what `check_onnx` refuses, and of the folder what `check_model_directory` does.
    """
    directory = Path(directory)
    for path in check_entries(directory, deep=True):
        if path.suffix.lower() == ".onnx":
            check_onnx(path)
    check_configs(directory)


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


def _check_weights(directory: Path, found: list[Path]) -> None:
    """The safetensors files of the model: the shards of the index, which must all be there, or what lies there."""
    index = directory / INDEX
    shards: dict[str, str] = {}
    if index.exists():
        shards = _weight_map(index)
        for name in sorted(set(shards.values())):
            _require(directory, name, f"a shard that {INDEX} names")
        stray = [path.name for path in found if _SHARD.fullmatch(path.name) and path.name not in shards.values()]
        if stray:
            raise _bad_index(index, "every shard in this folder", f"no word of {', '.join(stray[:3])}")
    elif not any(path.name not in SIDECARS for path in found):
        _require(directory, "model.safetensors", "the weights of the model")
    budget = BUDGET // max(len(found), 1)  # of the whole directory, however many shards it has
    _check_shards(index, shards, {path.name: check_safetensors(path, budget=budget) for path in found})


def _check_shards(index: Path, shards: dict[str, str], tensors: dict[str, dict[str, Span]]) -> None:
    """Every tensor lies in the shard that the index names, and in no other."""
    for name, shard in shards.items():
        if name not in tensors[shard]:
            raise _bad_index(index, f"tensors that are in their shards: {name!r} in {shard}", "no such tensor there")
    holders: dict[str, str] = {}
    for shard in sorted(set(shards.values())):
        for name in tensors[shard]:
            other = holders.setdefault(name, shard)
            if other != shard:
                raise _bad_index(index, f"the tensor {name!r} once", f"it is in {other} and in {shard}")


def _weight_map(index: Path) -> dict[str, str]:
    shards = read_json(index, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_name, shards.values())):
        raise _bad_index(index, "an object weight_map: tensor name to the name of a file beside it", ascii(shards)[:80])
    return shards


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


def _bad_index(index: Path, expected: str, found: str) -> BadInput:
    return BadInput(
        "EW-319",
        "this index of weights is damaged",
        where=index.absolute(),
        expected=expected,
        found=found,
        fix="copy the whole model again, or save it again with save_pretrained",
    )
