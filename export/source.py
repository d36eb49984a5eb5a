"""What an export is made from: a Hugging Face model directory, read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.guard import MAX_INDEX_BYTES, check_model_directory, read_json
from edgewright.export.lattice import SIDECAR, LatticeTensor, detect_ternary, load_sidecar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 256 * 2**20
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
EMBEDDINGS = (EMBEDDING, "transformer.wte.weight", "model.decoder.embed_tokens.weight", "gpt_neox.embed_in.weight")
"""What the families call their token embedding."""
HEADS = (HEAD, "embed_out.weight")
TRANSPOSED = {"gpt2": (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")}
"""By `model_type`, the ends of the names of linear weights that are stored `[in, out]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checked model directory. Weights are read on demand; the lattice (one byte a weight) is in memory."""

    directory: Path
    config: dict[str, Any]
    """config.json."""
    tokenizer: dict[str, Any]
    """tokenizer.json."""
    tokenizer_config: dict[str, Any]
    """tokenizer_config.json; empty where there is none."""
    lattice: dict[str, LatticeTensor]
    """The quantized weights by state-dict name: the sidecar's, or those of linear layers found to be ternary."""
    files: Mapping[str, Path]
    """The safetensors file of every tensor."""
    sha256: str
    """Of the weight files, in the order of their names."""
    calibrated: frozenset[str] = frozenset()
    """The names in `lattice` that come from calibration, not from the checkpoint: rounded, but with care."""
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Mean square of each input column of a linear layer on calibration text, by weight name: float32 `[in]`."""

    @property
    def name(self) -> str:
        """What the model is called: its directory; for `<run>/stages/<stage>/model` the stage."""
        directory = self.directory.resolve()
        return directory.parent.name if directory.name == "model" else directory.name

    @property
    def names(self) -> list[str]:
        """The state-dict names of all tensors in the files, sorted."""
        return sorted(self.files)

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def embedding(self) -> str:
        """The name of the token embedding."""
        return next((name for name in EMBEDDINGS if name in self.files), EMBEDDING)

    @property
    def head(self) -> str:
        """The name of the output head's weight; a tied head's is the embedding's."""
        return self.embedding if self.tied else next((name for name in HEADS if name in self.files), HEAD)

    def matrix(self, name: str) -> np.ndarray:
        """A linear weight as float32 `[out, in]`, whichever way round the checkpoint stores it; errors as `tensor`.

        Lattices, calibration and readers always speak of this orientation.
        """
        value = self.tensor(name)
        return np.ascontiguousarray(value.T) if self.stores_transposed(name) else value

    def stores_transposed(self, name: str) -> bool:
        """Whether the checkpoint stores this linear weight `[in, out]`, as GPT-2's `Conv1D` does."""
        return name.endswith(TRANSPOSED.get(str(self.config.get("model_type")), ()))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        from safetensors import safe_open

        with safe_open(self._file(name), framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32; f32, f16 and bf16 are exact.

        Raises:
            BadInput: EW-322, there is no such tensor or it is of another type; EW-323, it is not finite.
        """
        value = _read(self._file(name), name)
        if not np.isfinite(value).all():
            raise BadInput(
                "EW-323",
                f"the tensor {name!r} holds values that are not finite",
                where=self._file(name),
                expected="finite numbers",
                found=f"{np.count_nonzero(~np.isfinite(value))} NaN or infinite values",
                fix="export an earlier checkpoint of this model",
            )
        return value

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise BadInput(
                "EW-322",
                f"the model lacks the tensor {name!r}",
                where=self.directory.absolute(),
                expected="all weights of the architecture that config.json names",
                found=f"{len(self.files)} tensors, among them {', '.join(self.names[:3])}",
                fix="save the whole model with save_pretrained; adapters must be merged first",
            )
        return self.files[name]


def load_source(directory: Path | str) -> Source:
    """Open a model directory for export.

    Raises:
        Unsafe, BadInput: what `check_model_directory` refuses; EW-320 to EW-323 for lattice and tensors; EW-325
            for the tokenizer.
    """
    directory = Path(directory)
    check_model_directory(directory)
    open_tokenizer(directory)
    files = _tensor_files(directory)
    optional = directory / "tokenizer_config.json"
    return Source(
        directory=directory,
        config=read_json(directory / "config.json"),
        tokenizer=read_json(directory / "tokenizer.json", limit=MAX_TOKENIZER_BYTES),
        tokenizer_config=read_json(optional) if optional.exists() else {},
        lattice=_checked_sidecar(directory, files) if (directory / SIDECAR).exists() else _detected(files),
        files=files,
        sha256=weights_sha256(directory),
    )


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checked model directory; special tokens in a text are plain text to it.

    Raises:
        BadInput: EW-325, tokenizer.json is not what the library `tokenizers` reads.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise BadInput(
            "EW-325",
            "the tokenizer of this model cannot be read",
            where=path.absolute(),
            expected="a tokenizer.json of the library tokenizers",
            found=str(error)[:200],
            fix="save the tokenizer again with save_pretrained",
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def weights_sha256(directory: Path) -> str:
    """sha256 over the safetensors files of a model, in the order of their names; the lattice's file is not one."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        if path.name != SIDECAR:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def special_ids(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], kind: str, tokens: Sequence[str]
) -> list[int]:
    """The ids of a kind of special token (`bos`, `eos`, `pad`), the first being the main one; empty when there is none.

    What config.json says counts; else the text that tokenizer_config.json names, looked up in `tokens` (text by id).
    """
    found = config.get(f"{kind}_token_id")
    if found is not None:
        return [int(index) for index in (found if isinstance(found, list) else [found])]
    text = tokenizer_config.get(f"{kind}_token")
    text = text.get("content") if isinstance(text, dict) else text
    return [tokens.index(text)] if text in tokens else []


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor, by the index where there is one."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index, limit=MAX_INDEX_BYTES)["weight_map"]
        assert isinstance(shards, dict)  # checked by the guard
        paths = {directory / shard for shard in shards.values()}
    else:
        paths = {path for path in directory.glob("*.safetensors") if path.name != SIDECAR}
    files: dict[str, Path] = {}
    for path in sorted(paths):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files


def _read(path: Path, name: str) -> np.ndarray:
    """Through torch, since numpy has no bfloat16."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        value = file.get_tensor(name)
    if not value.dtype.is_floating_point or value.dtype.itemsize not in (2, 4):
        raise BadInput(
            "EW-322",
            f"the tensor {name!r} is no plain floating-point tensor",
            where=path,
            expected="float32, float16 or bfloat16",
            found=str(value.dtype),
            fix="save the model in one of these types; packed checkpoints must be unpacked first",
        )
    return value.float().numpy()


def _detected(files: Mapping[str, Path]) -> dict[str, LatticeTensor]:
    """The linear weights whose values turn out to be ternary."""
    lattice = {}
    for name, path in files.items():
        if name == EMBEDDING or not name.endswith(".weight"):
            continue
        weight = _read(path, name)
        found = detect_ternary(weight) if weight.ndim == 2 else None
        if found is not None:
            lattice[name] = found
    return lattice


def _checked_sidecar(directory: Path, files: Mapping[str, Path]) -> dict[str, LatticeTensor]:
    """The sidecar, after comparing each of its entries with the weights: equal bit for bit (-0.0 equals 0.0)."""
    lattice = load_sidecar(directory)
    for name, tensor in lattice.items():
        weight = _read(files[name], name) if name in files else None
        if weight is None or not np.array_equal(weight, tensor.dequantize()):
            raise BadInput(
                "EW-321",
                f"the lattice and the weights of this model differ in {name!r}",
                where=(directory / SIDECAR).absolute(),
                expected="codes times scales equal to the weights, bit for bit",
                found="no such weight" if weight is None else _difference(weight, tensor.dequantize()),
                fix=f"if the weights were changed after training, delete {SIDECAR}; else copy the checkpoint again",
            )
    return lattice


def _difference(weight: np.ndarray, other: np.ndarray) -> str:
    if weight.shape != other.shape:
        return f"shapes {weight.shape} and {other.shape}"
    return f"{np.count_nonzero(weight != other)} of {weight.size} values differ"
