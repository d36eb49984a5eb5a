"""What is known about a model file or folder without opening it: target, width, size, result of its gate."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from edgewright.errors import BadInput
from edgewright.export.runtimes.opening import MARKERS, TARGET_OF

LATTICE_SIDECAR = "lattice.safetensors"
WIDTH_OF_DTYPE = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One artifact or Hugging Face directory, as a table shows it.

    Args:
        path: as it was given.
        to: `gguf`, `genai`, `onnx`, ..., `hf` for a Hugging Face directory.
        quant: width by the target's own name; None for a file that has no manifest.
        bytes: size; of a Hugging Face directory the size of its weights.
        gate: `passed`, `failed`, `skipped`; None where there is no manifest.
    """

    path: Path
    to: str
    quant: str | None
    bytes: int
    gate: str | None


def describe_model(path: str | Path) -> ModelFile:
    """Describe a GGUF file, a folder that an export wrote, or a Hugging Face directory.

    Raises:
        BadInput: EW-390 for nothing or something unknown, EW-391 for a broken manifest, EW-31x for damaged weights.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput("EW-390", "there is no such file or directory", where=path)
    file = _single_gguf(path)
    if file is not None:
        return _from_manifest(path, file) or _plain(path, "gguf", file.stat().st_size)
    described = _from_manifest(path, path) if path.is_dir() else None
    if described is not None:
        return described
    runtime = next((runtime for marker, runtime in MARKERS.items() if (path / marker).is_file()), None)
    if runtime is not None:
        size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        return _plain(path, TARGET_OF[runtime], size)
    weights = _weight_files(path)
    if (path / "config.json").is_file() and weights:
        size = sum(each.stat().st_size for each in weights)
        return ModelFile(path=path, to="hf", quant=_main_dtype(weights), bytes=size, gate=None)
    several = ", ".join(sorted(each.name for each in path.glob("*.gguf")))
    raise BadInput(
        "EW-390",
        "this is no model that can be opened",
        where=path,
        expected=f"a .gguf file, a folder with {', '.join(MARKERS)}, or a Hugging Face directory with safetensors",
        found=f"several GGUF files: {several}" if several else None,
        fix="name one of them" if several else None,
    )


def weight_bytes(path: str | Path) -> int:
    """Bytes of the weights that a model is computed with: what decoding reads for each token. Of a bundle the target's.

    A Hugging Face directory is computed in float32, whatever it is stored in, unless its weights are packed. In all
    other files it is what they hold, without the tokenizers and settings beside them.

    Raises:
        BadInput, Unsafe: what the guard refuses; EW-390, as `describe_model`.
    """
    from edgewright.export.runtimes.opening import runtime_of

    describe_model(path)
    runtime, file = runtime_of(Path(path))
    return _WEIGHT_BYTES[runtime](file)


def _of_directory(path: Path) -> int:
    files = _weight_files(path)
    packed = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config") is not None
    return sum(end - begin if packed else 4 * prod(shape) for _, shape, begin, end in _tensors(files))


def _of_gguf(path: Path) -> int:
    from edgewright.export.gguf.file import open_gguf

    return sum(tensor.data.nbytes for tensor in open_gguf(path).tensors.values())


def _of_files(pattern: str) -> Callable[[Path], int]:
    return lambda path: sum(file.stat().st_size for file in path.glob(pattern))


_WEIGHT_BYTES: Mapping[str, Callable[[Path], int]] = {
    "torch": _of_directory,
    "llamacpp": _of_gguf,
    "genai": _of_files("*.onnx*"),
    "onnx": _of_files("*.onnx*"),
    "openvino": _of_files("openvino_model.bin"),
}
"""By runtime."""


def _single_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one that the folder `path` holds."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _from_manifest(path: Path, artifact: Path) -> ModelFile | None:
    from edgewright.export.artifact import manifest_path, read_entry

    entry = read_entry(artifact)
    if entry is None:
        return None
    try:
        return ModelFile(path=path, to=entry["to"], quant=entry["quant"], bytes=entry["bytes"], gate=entry["gate"])
    except (KeyError, TypeError) as error:
        raise BadInput(
            "EW-391",
            f"the manifest does not say {error} of {artifact.name!r}",
            where=manifest_path(artifact),
            fix="export the model again",
        ) from None


def _plain(path: Path, to: str, size: int) -> ModelFile:
    return ModelFile(path=path, to=to, quant=None, bytes=size, gate=None)


def _weight_files(path: Path) -> list[Path]:
    return sorted(each for each in path.glob("*.safetensors") if each.name != LATTICE_SIDECAR)


def _tensors(weights: list[Path]) -> Iterator[tuple[str, list[int], int, int]]:
    """Type, shape, and where they begin and end, of the tensors of safetensors files."""
    from edgewright.export.guard import check_safetensors

    for file in weights:
        check_safetensors(file)
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        header.pop("__metadata__", None)
        for tensor in header.values():
            yield tensor["dtype"], tensor["shape"], *tensor["data_offsets"]


def _main_dtype(weights: list[Path]) -> str:
    """The width that most bytes of the safetensors files are stored in."""
    stored: Counter[str] = Counter()
    for dtype, _, begin, end in _tensors(weights):
        stored[dtype] += end - begin
    dtype = max(stored, key=lambda each: stored[each]) if stored else "F32"
    return WIDTH_OF_DTYPE.get(dtype, dtype.lower())
