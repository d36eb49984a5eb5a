"""ONNX Runtime GenAI: a folder that `onnxruntime_genai.Model` opens as it is.

The graph (GroupQueryAttention, shared key-value buffer) comes from the vendor's builder in fp32. Its weights are then
replaced by `MatMulNBits` whose codes and scales are those of the lattice: at ternary 2 bits and one fp32 scale per 128
weights, 2.25 bits a weight. The stock quantizers would round ternary weights to something else.

A weight that its width cannot hold exactly goes to the next wider one of `WIDER`, and that is counted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput, GateFailed
from edgewright.export.artifact import Fallback, Written, digest, sync
from edgewright.export.lattice import LatticeTensor, Levels, ceil_div, grouped, round_int, round_q4_0
from edgewright.export.layout import MatMulNBits
from edgewright.export.source import EMBEDDING, HEAD, Source

QUANTS = ("fp32", "int8", "int4", "ternary")
"""The widths of linear weights."""

EMBEDDING_QUANTS = ("fp32", "int8", "int4")
"""The widths of token embedding and output head."""

EMBEDDING_DEFAULT = {"fp32": "fp32", "int8": "int8", "int4": "int8", "ternary": "fp32"}
"""The width of token embedding and head where none is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How weights of one width are stored."""

    bits: int
    levels: tuple[Levels, ...]
    """The lattices that may be stored at this width."""
    rounds: bool
    """Whether a weight without a lattice is rounded to nearest; a ternary weight must have been trained."""
    blocks: tuple[int, ...]
    """Block sizes to choose from; 2 bits has fast kernels for these alone."""


Q4_BLOCK = 32
"""Weights per scale at 4 bits: what is rounded there loses less with more scales."""
HEAD_Q4_BLOCK = 128
"""The same for a head of its own, which is read whole for every token: 5 % fewer bytes a token at 200M ternary
parameters, and the kernel for large blocks is the faster one. A tied head keeps the blocks of the embedding."""
SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of the scale that just reaches the extreme of a block: a smaller one may lose less of all the rest."""
FOLDED_BYTES = 1 << 16
"""Constants up to this size may be computed when a folder is opened. The runtime would otherwise keep a reshaped copy
of a packed embedding in memory, which as it is stays in the file but for the rows that are looked up."""

WIDTHS: dict[str, Width] = {
    "ternary": Width(bits=2, levels=("ternary",), rounds=False, blocks=(128, 64, 32)),
    "int4": Width(bits=4, levels=("ternary", "int4"), rounds=True, blocks=(Q4_BLOCK,)),
    "int8": Width(bits=8, levels=("ternary", "int4", "int8"), rounds=True, blocks=(128, 64, 32)),
}
"""The packed widths."""

WIDER: dict[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "int8": ("int8", "fp32"),
    "int4": ("int4", "int8", "fp32"),
    "ternary": ("ternary", "int8", "fp32"),
}
"""The widths to try for a weight, the one asked for first."""

ROWS_AT_ONCE = 4096
"""Rows of a head that are rounded at a time, which bounds the memory that it takes."""

BUILDER_PACKAGES = ("onnxruntime_genai", "onnx_ir")
"""What the vendor's builder imports; onnxruntime-genai does not declare the second one."""


def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write a GenAI folder.

    Args:
        source: the checkpoint, a Llama-family causal language model.
        directory: made if it is not there; the caller swaps it into place.
        quant: one of `QUANTS`.
        embedding_quant: of token embedding and head, one of `EMBEDDING_QUANTS`; None takes `EMBEDDING_DEFAULT`, or the
            lattice of a head that was trained on one.

    Raises:
        BadInput: EW-603 without onnxruntime-genai, EW-520 when the builder refuses the model.
        GateFailed: EW-521 when a weight of the checkpoint is not in the builder's graph as it should be.
    """
    with tempfile.TemporaryDirectory(prefix="edgewright-genai-") as scratch:
        built = Path(scratch) / "built"
        build(source.directory, built)
        return pack(built, source, directory, quant=quant, embedding_quant=embedding_quant)


def build(model: Path, directory: Path) -> None:
    """Run the vendor's builder: a Hugging Face directory becomes an fp32 folder for the CPU.

    It runs as a process of its own, offline: it prints a lot, and keeps the model in memory.
    """
    missing = [package for package in BUILDER_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInput(
            "EW-603",
            "ONNX Runtime GenAI, or what its model builder needs, is not installed",
            expected="the packages of the extra `genai`",
            found=f"no {' and no '.join(missing)}",
            fix='pip install "edgewright[genai]"',
        )
    with tempfile.TemporaryDirectory(prefix="edgewright-builder-") as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model.resolve())]
        command += ["-o", str(directory.resolve()), "-p", "fp32", "-e", "cpu", "-c", scratch]
        result = subprocess.run(
            command,
            env=_builder_environment(scratch),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    if result.returncode or not (directory / "model.onnx").is_file() or not (directory / "genai_config.json").is_file():
        raise BadInput(
            "EW-520",
            "the GenAI model builder cannot turn this model into a graph",
            where=model.absolute(),
            expected="a Llama-family causal language model with its tokenizer",
            found=(result.stdout.strip().splitlines() or ["no output"])[-1],
            fix="export to gguf, or save the model and its tokenizer again with save_pretrained",
        )


def _builder_environment(scratch: str) -> dict[str, str]:
    """The caller's environment without what could make the builder reach out, warn, or find the caller's caches."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "TOKENIZERS_PARALLELISM": "false"}


def pack(built: Path, source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Make the final folder of an fp32 folder that `build` wrote. Arguments as in `write`."""
    import onnx

    from edgewright.export.onnx_graph import Graph, join_gate_up, split_rotary, use_standard_norm

    config = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
    graph = Graph(onnx.load(built / "model.onnx"))
    packing = _Packing(graph=graph, source=source, quant=quant, embedding_quant=embedding_quant)
    packing.linears()
    packing.embedding()
    packing.check_complete()
    join_gate_up(graph)
    use_standard_norm(graph)
    decoder = config["model"]["decoder"]
    _check_head_size(source, decoder["head_size"])
    if split_rotary(graph, head_size=decoder["head_size"]):
        decoder["inputs"]["position_ids"] = "position_ids"
    if any(graph.nodes("GatherBlockQuantized")):
        decoder["session_options"] |= _keep_table_in_file()
    _name_start_token(config["model"], source)
    _save(graph.finish(), directory)
    _write_text(directory / "genai_config.json", json.dumps(config, indent=2) + "\n")
    _copy_tokenizer(built, source, directory)
    sync(directory)
    return Written(
        fallbacks=packing.fallbacks,
        lattice={name: packing.stored.get(name, "not stored") for name in source.lattice},
        digests=packing.digests,
        embedding_quant=packing.embedding_width,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "onnxruntime-genai")},
    )


@dataclass(slots=True, kw_only=True)
class _Part:
    """One weight of the checkpoint, as a part of a matrix of the graph."""

    name: str
    weight: np.ndarray
    """float32 `[rows, columns]`."""
    lattice: LatticeTensor | None


@dataclass(slots=True, kw_only=True)
class _Packed:
    """A matrix in the layout of MatMulNBits."""

    codes: np.ndarray
    """uint8 `[rows, blocks, block * bits / 8]`."""
    scales: np.ndarray
    """float32 `[rows, blocks]`."""
    layout: MatMulNBits
    columns: int
    lattices: list[LatticeTensor]
    """What was packed, part by part."""


@dataclass(slots=True, kw_only=True)
class _Packing:
    """The state of one packing: which weights were met, and how they are stored."""

    graph: Any
    """`onnx_graph.Graph`."""
    source: Source
    quant: str
    embedding_quant: str | None
    fallbacks: list[Fallback] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)
    """For each weight met: `exact`, or what was lost."""
    digests: dict[str, str] = field(default_factory=dict)
    embedding_width: str = "fp32"
    table: _Packed | None = None
    """The head, when it is packed."""

    @property
    def head_name(self) -> str:
        return EMBEDDING if self.source.tied else HEAD

    def linears(self) -> None:
        """Pack the weights of all linear layers and of the head."""
        from edgewright.export.onnx_graph import checkpoint_names, set_packed_linear

        for node in self.graph.nodes("MatMul"):
            if node.input[1] not in self.graph.initializers:
                continue  # a product of two activations
            names = checkpoint_names(node.input[1], head=self.head_name)
            if names is None:
                raise _broken_graph(node.input[1], "a matrix in the graph that has no counterpart")
            parts = [self._part(name) for name in names]
            self._compare(parts, self.graph.array(node.input[1]).T)
            asked = self._asked(parts[0]) if names == (self.head_name,) else self.quant
            packed = self._packed(parts, asked)
            if names == (self.head_name,):
                self.table = packed
            if packed is not None:
                set_packed_linear(
                    self.graph,
                    node,
                    packed.codes,
                    packed.scales,
                    columns=packed.columns,
                    bits=packed.layout.bits,
                    block=packed.layout.block,
                )

    def embedding(self) -> None:
        """Pack the token embedding; a tied one shares the bytes of the head."""
        from edgewright.export.onnx_graph import embedding_nodes, set_packed_embedding

        gather, transpose = embedding_nodes(self.graph)
        packed = self.table
        if not self.source.tied:
            assert transpose is None
            part = self._part(EMBEDDING)
            self._compare([part], self.graph.array(gather.input[0]))
            packed = self._packed([part], self._asked(part))
        if packed is not None:
            layout = packed.layout
            set_packed_embedding(
                self.graph,
                packed.codes,
                packed.scales,
                columns=packed.columns,
                bits=layout.bits,
                block=layout.block,
            )

    def check_complete(self) -> None:
        """No silent no-op: every quantized weight of the checkpoint was met."""
        for name in self.source.lattice:
            if name not in self.stored:
                raise _broken_graph(name, "no such weight")

    def _asked(self, part: _Part) -> str:
        """The width of embedding or head: as asked for, else ternary when it was trained so, else the default."""
        width = self.embedding_quant
        if width is None:
            trained = part.lattice is not None and self.quant == "ternary"
            width = "ternary" if trained else EMBEDDING_DEFAULT[self.quant]
        self.embedding_width = width
        return width

    def _part(self, name: str) -> _Part:
        return _Part(name=name, weight=self.source.tensor(name), lattice=self.source.lattice.get(name))

    def _compare(self, parts: list[_Part], matrix: np.ndarray) -> None:
        """The builder's matrix `[rows, columns]` must be these weights, bit for bit."""
        expected = np.concatenate([part.weight for part in parts])
        if not np.array_equal(matrix, expected):
            raise _broken_graph(", ".join(part.name for part in parts), "other values")

    def _packed(self, parts: list[_Part], asked: str) -> _Packed | None:
        """The parts joined by rows, at the narrowest width that holds all of them; None for fp32."""
        lost = ""
        for width in WIDER[asked]:
            packed, reason = _pack_at(parts, width)
            if not reason:
                break
            lost = lost or reason
        for index, part in enumerate(parts):
            values = part.weight if packed is None else packed.lattices[index].dequantize()
            self.digests[part.name] = digest(values)
            exact = packed is None or part.lattice is not None
            self.stored[part.name] = "exact" if exact else f"rounded to {width}"
            if lost:
                self.fallbacks.append(Fallback(part.name, width, lost))
        return packed


def _pack_at(parts: list[_Part], width: str) -> tuple[_Packed | None, str]:
    """The parts at one width, or the reason why not. fp32 always works, and packs nothing."""
    if width == "fp32":
        return None, ""
    rule = WIDTHS[width]
    if width == "int4" and parts[0].name == HEAD:
        rule = replace(rule, blocks=(HEAD_Q4_BLOCK, *rule.blocks))
    for part in parts:
        if part.lattice is None and not rule.rounds:
            return None, f"{part.name} is not {width}"
        if part.lattice is not None and part.lattice.levels not in rule.levels:
            return None, f"{part.name} holds {part.lattice.levels} codes"
    columns = parts[0].weight.shape[1]
    reason = ""
    for layout in _layouts(rule, columns):
        lattices = [part.lattice or _rounded(part.weight, layout) for part in parts]
        reason = next(filter(None, map(layout.holds_exactly, lattices)), "")
        if not reason:
            codes, scales = zip(*map(layout.pack, lattices), strict=True)
            joined = (np.concatenate(codes), np.concatenate(scales))
            packed = _Packed(codes=joined[0], scales=joined[1], layout=layout, columns=columns, lattices=lattices)
            return packed, ""
    return None, reason


def _rounded(weight: np.ndarray, layout: MatMulNBits) -> LatticeTensor:
    """A weight without a lattice, rounded to nearest.

    4 bits take the rule of ggml's Q4_0: its signed scale uses all 16 codes, which here loses an eighth less than 15
    symmetric ones, and in blocks of 32 the lattice is the same as in a GGUF file.
    """
    if layout.bits == 8:
        return round_int(weight, bits=8, group=layout.block)
    if layout.block != Q4_BLOCK:
        rows = range(0, len(weight), ROWS_AT_ONCE)
        parts = [_least_squares(weight[row : row + ROWS_AT_ONCE], layout.block) for row in rows]
        codes, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return LatticeTensor(codes=codes, scales=scales, group=layout.block, bits=4, levels="int4")
    columns = weight.shape[1]
    whole = round_q4_0(np.pad(weight, ((0, 0), (0, -columns % Q4_BLOCK))))
    return replace(whole, codes=np.ascontiguousarray(whole.codes[:, :columns]))


def _least_squares(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """4-bit codes and scales of some rows: the signed scale of Q4_0, times the factor that loses least."""
    blocks = grouped(weight, block)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    codes, scales = np.zeros(blocks.shape, np.int8), np.ones_like(extreme)
    lowest = np.full_like(extreme, np.inf)
    for factor in SCALE_FACTORS:
        tried = np.where(extreme == 0, np.float32(1), extreme * np.float32(factor / -8))
        found = np.clip(np.rint(blocks / tried), -8, 7)
        error = np.square(found * tried - blocks).sum(axis=2, keepdims=True)
        better = error < lowest
        codes, scales = np.where(better, found.astype(np.int8), codes), np.where(better, tried, scales)
        lowest = np.minimum(error, lowest)
    return np.ascontiguousarray(codes.reshape(len(weight), -1)[:, : weight.shape[1]]), scales[..., 0]


def _layouts(rule: Width, columns: int) -> Iterable[MatMulNBits]:
    """The layouts of a width, the one first that stores a row in the fewest bytes; of equals, the largest block."""

    def row_bytes(block: int) -> float:
        return ceil_div(columns, block) * (block * rule.bits / 8 + 4)

    for block in sorted(rule.blocks, key=lambda block: (row_bytes(block), -block)):
        yield MatMulNBits(bits=rule.bits, block=block)


def _broken_graph(name: str, found: str) -> GateFailed:
    return GateFailed(
        "EW-521",
        f"the graph and the checkpoint differ in the weight {name!r}",
        expected="every weight of the checkpoint, bit for bit, and no other",
        found=found,
        fix="this architecture is laid out in a way that is not known here: export to another target",
    )


def _check_head_size(source: Source, size: int) -> None:
    if size % 8:
        raise BadInput(
            "EW-522",
            "the attention heads of this model do not fit the target",
            where=source.directory.absolute(),
            expected="a head size that is a multiple of 8",
            found=size,
            fix="export to gguf",
        )


def _keep_table_in_file() -> dict[str, object]:
    """Session options that leave a packed embedding where it is; the runtime warns about each, below level 3."""
    return {"optimization.constant_folding_max_output_size_in_bytes": str(FOLDED_BYTES), "log_severity_level": 3}


def _name_start_token(model: dict[str, Any], source: Source) -> None:
    """Where a checkpoint has no BOS a text starts with EOS; the builder would write id 1."""
    bos = source.config.get("bos_token_id")
    if bos is None and source.tokenizer_config.get("bos_token") is None:
        end = source.config.get("eos_token_id")
        end = model["eos_token_id"] if end is None else end
        model["bos_token_id"] = end[0] if isinstance(end, list) else end


def _save(model: Any, directory: Path) -> None:
    """Write `model.onnx` and `model.onnx.data`, and check what was written.

    The checker knows all standard operators; those of `com.microsoft` are checked by the runtime, in the gate.
    """
    import onnx

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    onnx.checker.check_model(str(path))
    data = directory / "model.onnx.data"
    data.chmod(path.stat().st_mode)  # onnx makes it readable by its owner alone
    for file in (path, data):
        sync(file)


def _copy_tokenizer(built: Path, source: Source, directory: Path) -> None:
    """The checkpoint's own tokenizer.json, and what the builder wrote beside it, less the traces of this machine."""
    shutil.copyfile(source.directory / "tokenizer.json", directory / "tokenizer.json")
    sync(directory / "tokenizer.json")
    settings = json.loads((built / "tokenizer_config.json").read_text(encoding="utf-8"))
    for trace in ("is_local", "local_files_only"):
        settings.pop(trace, None)
    _write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        if (built / name).is_file():
            _write_text(directory / name, (built / name).read_text(encoding="utf-8"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
