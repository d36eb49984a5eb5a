"""What an export is made from: a Hugging Face model directory, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.architecture import Architecture, read_architecture, read_config
from edgewright.export.detection import detect_lattice
from edgewright.export.guard import MAX_INDEX_BYTES, check_model_directory, read_json
from edgewright.export.in_order import in_order
from edgewright.export.lattice import SIDECAR, LatticeTensor, load_sidecar
from edgewright.export.packed_checkpoint import Packing, find_packing
from edgewright.export.tokenizer_files import open_tokenizer, read_tokenizer, write_tokenizer
from edgewright.export.weight_hash import weights_sha256, weights_sha256_meanwhile

if TYPE_CHECKING:
    import torch

__all__ = ["EMBEDDING", "HEAD", "Source", "load_source", "open_tokenizer", "special_ids", "weights_sha256"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
"""What most families call their token embedding and output head; `Source.embedding` and `Source.head` know better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checked model directory. Weights are read on demand; the lattice (one byte a weight) is in memory.

    All names are those of the state dict of the causal language model, whatever the files call them.
    """

    directory: Path
    config: dict[str, Any]
    """config.json with every default of its family filled in."""
    architecture: Architecture
    """The names, shapes and kinds of the weights."""
    tokenizer: dict[str, Any]
    """tokenizer.json, or what it would be."""
    tokenizer_config: dict[str, Any]
    """tokenizer_config.json; empty where there is none."""
    lattice: dict[str, LatticeTensor]
    """The quantized weights by state-dict name, `[out, in]`: the sidecar's, or those of linear layers and the token
    embedding that were found to be on a lattice."""
    files: Mapping[str, Path]
    """The safetensors file of every tensor."""
    stored: Mapping[str, str]
    """The name of a tensor in its file, where it differs from the state dict's."""
    sha256: str
    """Of the weight files, in the order of their names; of the sidecar as well where `restored` is its."""
    restored: frozenset[str] = frozenset()
    """The names whose exact values are the lattice's, because the files round them."""
    calibrated: frozenset[str] = frozenset()
    """The names in `lattice` that come from calibration, not from the checkpoint: rounded, but with care."""
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Mean square of each input column of a linear layer on calibration text, by weight name: float32 `[in]`."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What calibration did, for the manifest; empty without."""

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
        """Whether the output head is the token embedding: the configuration says so, and no other head is there."""
        return bool(self.config["tie_word_embeddings"]) and self.architecture.head not in self.files

    @property
    def embedding(self) -> str:
        """The name of the token embedding."""
        return self.architecture.embedding

    @property
    def head(self) -> str:
        """The name of the output head's weight; a tied head's is the embedding's."""
        return self.embedding if self.tied else self.architecture.head

    @property
    def linears(self) -> list[str]:
        """The names of the weights of all linear layers, the head's among them unless it is tied."""
        return [name for name in self.architecture.linear if name in self.files]

    def matrix(self, name: str) -> np.ndarray:
        """A linear weight as float32 `[out, in]`, whichever way round the checkpoint stores it; errors as `tensor`.

        Lattices, calibration and readers always speak of this orientation.
        """
        value = self.tensor(name)
        return np.ascontiguousarray(value.T) if self.stores_transposed(name) else value

    def stores_transposed(self, name: str) -> bool:
        """Whether the checkpoint stores this linear weight `[in, out]`, as GPT-2's `Conv1D` does."""
        return name in self.architecture.transposed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        self._file(name)
        return self.architecture.shapes[name]

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape of `matrix`, without reading it."""
        return self.shape(name)[:: -1 if self.stores_transposed(name) else 1]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32; f32, f16 and bf16 are exact.

        Raises:
            BadInput: EW-322, there is no such tensor or it is of another type; EW-323, it is not finite.
        """
        if name in self.restored:
            exact = self.lattice[name].dequantize()
            return np.ascontiguousarray(exact.T) if self.stores_transposed(name) else exact
        value = _read(self._file(name), self.stored.get(name, name)).float().numpy()
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

    def write_tokenizer(self, directory: Path) -> None:
        """Put tokenizer.json and what belongs to it into another directory; see `tokenizer_files.write_tokenizer`."""
        write_tokenizer(self.directory, directory)

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
        Unsafe, BadInput: what `check_model_directory` refuses; EW-320 to EW-324, EW-326 and EW-329 for lattice and
            tensors; EW-325 and EW-328 for the tokenizer; EW-327 for the configuration.
    """
    directory = Path(directory)
    check_model_directory(directory)
    with weights_sha256_meanwhile(directory) as sha256:  # while the modules load that know the architecture
        architecture = read_architecture(directory)
        open_tokenizer(directory)
        config = read_config(directory)
        packing = find_packing(directory, config)
        found = _stored_tensors(directory)
        tensors = _named_tensors(directory, architecture, found, packing)
        optional = directory / "tokenizer_config.json"
        plain = Source(
            directory=directory,
            config=config,
            architecture=architecture,
            tokenizer=read_tokenizer(directory),
            tokenizer_config=read_json(optional) if optional.exists() else {},
            lattice={},
            files=tensors.files,
            stored=tensors.stored,
            sha256=sha256.result(),
        )
    if packing is not None:
        paths = {key: path for key, (path, _) in found.items()}
        lattice = {name: _unpacked(plain, packing, paths, name) for name in sorted(tensors.packed)}
        return replace(plain, lattice=lattice, restored=tensors.packed)
    if (directory / SIDECAR).exists():
        lattice, restored = _checked_sidecar(plain)
        exact = weights_sha256(directory, sidecar=True) if restored else plain.sha256
        return replace(plain, lattice=lattice, restored=restored, sha256=exact)
    return replace(plain, lattice=_detected(plain))


def _unpacked(source: Source, packing: Packing, paths: Mapping[str, Path], name: str) -> LatticeTensor:
    """A weight that the files hold packed; they always hold it `[out, in]`."""
    rows, columns = source.matrix_shape(name)
    settings = source.config["quantization_config"]
    return packing.read(paths, source.stored.get(name, name), (rows, columns), settings)


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


def _stored_tensors(directory: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor, by its name in the file."""
    from safetensors import safe_open

    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in _weight_paths(directory):
        with safe_open(path, framework="pt") as file:
            found |= {key: (path, tuple(file.get_slice(key).get_shape())) for key in sorted(file.keys())}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensors:
    """The tensors of a directory under their state-dict names."""

    files: dict[str, Path]
    stored: dict[str, str]
    """Names in the files, where they differ."""
    packed: frozenset[str]


def _named_tensors(
    directory: Path,
    architecture: Architecture,
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    packing: Packing | None,
) -> _Tensors:
    """The tensors of the files, by their names in the state dict.

    Raises:
        BadInput: EW-324, weights are missing or of another shape; EW-329, there are tensors that it does not know, or
            two that are one.
    """
    files: dict[str, Path] = {}
    stored: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    packed: set[str] = set()
    unknown = []
    for key, (path, shape) in found.items():
        if packing is not None and packing.is_companion(key):
            continue
        name = architecture.state_name(key)
        if name is None:
            unknown += [] if architecture.ignores(key) else [key]
            continue
        if name in files:
            raise _stored_twice(directory, name, [stored.get(name, name), key])
        files[name], shapes[name] = path, shape
        if name != key:
            stored[name] = key
        if packing is not None and packing.is_packed(key, found):
            packed.add(name)
            shapes[name] = architecture.shapes[name]  # compared when it is unpacked
    if unknown:
        raise BadInput(
            "EW-329",
            "the files hold tensors that the architecture does not know",
            where=directory.absolute(),
            expected=f"the weights of {architecture.model_type} as config.json describes it",
            found=f"{len(unknown)} others, the first {unknown[0]!r}",
            fix="correct config.json; adapters must be merged, and other heads removed, before the model is exported",
        )
    _untie(architecture, files, stored, shapes)
    _check_complete(directory, architecture, shapes)
    return _Tensors(files=files, stored=stored, packed=frozenset(packed))


def _stored_twice(directory: Path, name: str, keys: list[str]) -> BadInput:
    return BadInput(
        "EW-329",
        f"the files hold the weight {name!r} twice",
        where=directory.absolute(),
        expected="every weight under one name",
        found=" and ".join(map(repr, keys)),
        fix="save the model again with save_pretrained, so that each weight is there once",
    )


def _untie(
    architecture: Architecture, files: dict[str, Path], stored: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> None:
    """A tied head that is stored all the same: it goes, unless it differs, or is all there is (as in transformers)."""
    head, embedding = architecture.head, architecture.embedding
    if head not in architecture.shared or head not in files:
        return
    key = stored.pop(head, head)
    if embedding not in files:
        files[embedding], stored[embedding], shapes[embedding] = files[head], key, shapes[head]
    elif not _read(files[embedding], stored.get(embedding, embedding)).equal(_read(files[head], key)):
        stored.update({head: key} if key != head else {})
        return
    del files[head], shapes[head]


def _weight_paths(directory: Path) -> list[Path]:
    """The safetensors files, by the index where there is one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path for path in directory.glob("*.safetensors") if path.name != SIDECAR)
    shards = read_json(index, limit=MAX_INDEX_BYTES)["weight_map"]
    assert isinstance(shards, dict)  # checked by the guard
    return sorted({directory / shard for shard in shards.values()})


def _check_complete(directory: Path, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: shape for name, shape in architecture.shapes.items() if name not in architecture.shared}
    wrong = [name for name, shape in wanted.items() if shapes.get(name, ()) != shape]
    if wrong:
        first = wrong[0]
        found = f"of the shape {list(shapes[first])}" if first in shapes else "missing"
        raise BadInput(
            "EW-324",
            "the model's files lack weights of its architecture",
            where=directory.absolute(),
            expected=f"every weight that config.json implies, {first} of the shape {list(wanted[first])}",
            found=f"{len(wrong)} missing or of another shape; {first} is {found}",
            fix="save the whole model again with save_pretrained; adapters must be merged first",
        )


def _read(path: Path, name: str) -> torch.Tensor:
    """A floating-point tensor, through torch, since numpy has no bfloat16."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        value: torch.Tensor = file.get_tensor(name)
    if not value.dtype.is_floating_point or value.dtype.itemsize not in (2, 4):
        raise BadInput(
            "EW-322",
            f"the tensor {name!r} is no plain floating-point tensor",
            where=path,
            expected="float32, float16 or bfloat16",
            found=str(value.dtype),
            fix="save the model in one of these types; packed checkpoints must be unpacked first",
        )
    return value


def _detected(source: Source) -> dict[str, LatticeTensor]:
    """The linear weights and token embeddings whose values turn out to lie on a lattice."""
    names = list(dict.fromkeys([*source.linears, source.embedding]))
    found = in_order(lambda name: detect_lattice(source.matrix(name)), names)
    return {name: lattice for name, lattice in zip(names, found, strict=True) if lattice is not None}


def _checked_sidecar(source: Source) -> tuple[dict[str, LatticeTensor], frozenset[str]]:
    """The sidecar, after comparing each entry with the weights, and the names whose weights are rounded in the files.

    The weights must be codes times scales, bit for bit (-0.0 equals 0.0), in the precision of the file.
    """
    import torch

    lattice, rounded = load_sidecar(source.directory), set()
    for name, tensor in lattice.items():
        if name not in source.files:
            raise _unequal_sidecar(source, name, "no such weight")
        weight = _read(source.files[name], source.stored.get(name, name))
        weight = weight.T if source.stores_transposed(name) else weight
        exact = torch.from_numpy(tensor.dequantize())
        if weight.shape != exact.shape:
            raise _unequal_sidecar(source, name, f"shapes {tuple(weight.shape)} and {tuple(exact.shape)}")
        wrong = int((weight != exact.to(weight.dtype)).sum())
        if wrong:
            raise _unequal_sidecar(source, name, f"{wrong} of {weight.numel()} values differ")
        if not torch.equal(weight.float(), exact):
            rounded.add(name)
    return lattice, frozenset(rounded)


def _unequal_sidecar(source: Source, name: str, found: str) -> BadInput:
    return BadInput(
        "EW-321",
        f"the lattice and the weights of this model differ in {name!r}",
        where=(source.directory / SIDECAR).absolute(),
        expected="codes times scales equal to the weights, bit for bit in the precision of the weights",
        found=found,
        fix=f"if the weights were changed after training, delete {SIDECAR}; else copy the checkpoint again",
    )
