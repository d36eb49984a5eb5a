"""ONNX Runtime GenAI: a folder that `onnxruntime_genai.Model` opens as it is.

The graph comes from the vendor's builder in fp32 (GroupQueryAttention, shared key-value buffer) where that is right,
else it is traced; `genai/families.FAMILIES` is that choice. Its weights are then laid out by `onnx/packing.Packer`: at
ternary 2 bits and one fp32 scale per 128 weights, 2.25 bits a weight.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.artifact import Written, sync
from edgewright.export.genai.builder import build, check_installed
from edgewright.export.genai.families import builders_family, checkpoint_names
from edgewright.export.genai.traced import write_traced
from edgewright.export.gguf.architecture import windows
from edgewright.export.onnx.decoder_graph import check_positions
from edgewright.export.onnx.packing import Packed, Packer, broken_graph
from edgewright.export.scratch import scratch
from edgewright.export.source import Source
from edgewright.export.to_onnx import write_tokenizer
from edgewright.export.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from edgewright.export.onnx.graph import Graph

QUANTS = ("fp32", "int8", "int4", "ternary")
"""The widths of linear weights."""

EMBEDDING_QUANTS = ("fp32", "int8", "int4")
"""The widths of token embedding and output head."""

FOLDED_BYTES = 1 << 16
"""Constants up to this size may be computed when a folder is opened. The runtime would otherwise keep a reshaped copy
of a packed embedding in memory, which as it is stays in the file but for the rows that are looked up."""


def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write a GenAI folder.

    Args:
        source: the checkpoint, any decoder that transformers knows.
        directory: made if it is not there; the caller swaps it into place.
        quant: one of `QUANTS`.
        embedding_quant: of token embedding and head, one of `EMBEDDING_QUANTS`; None takes
            `onnx/packing.EMBEDDING_DEFAULT`, or the lattice of a head that was trained on one.

    Raises:
        BadInput: EW-603 without onnxruntime-genai; EW-520, its builder refuses the model; EW-522, EW-523, EW-546
            and EW-547, the target cannot hold it.
        GateFailed: EW-521 when a weight of the checkpoint is not in the graph as it should be.
    """
    check_installed()
    check_positions(source)
    written = _written(source, directory, quant=quant, embedding_quant=embedding_quant)
    return replace(written, notes=[*written.notes, *_tokenizer_notes(source)])


def _written(source: Source, directory: Path, *, quant: str, embedding_quant: str | None) -> Written:
    if builders_family(source) is None:
        return write_traced(source, directory, quant=quant, embedding_quant=embedding_quant)
    with scratch(directory) as place:
        built = place / "built"
        build(source.directory, built)
        return pack(built, source, directory, quant=quant, embedding_quant=embedding_quant)


def pack(built: Path, source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Make the final folder of an fp32 folder that `build` wrote. Arguments as in `write`."""
    import onnx

    from edgewright.export.onnx.graph import Graph, join_gate_up

    config = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
    graph = Graph(onnx.load(built / "model.onnx"))
    packer = Packer(source=source, quant=quant, embedding_quant=embedding_quant)
    _mend(graph, source, config["model"]["decoder"])
    _lay_out(graph, source, packer)
    lattice = packer.lattice
    _check_complete(source, packer)
    join_gate_up(graph, "MatMulNBits")
    if any(graph.nodes("GatherBlockQuantized")):
        config["model"]["decoder"]["session_options"] |= _keep_table_in_file()
    _name_start_token(config["model"], source)
    _save(graph.finish(), directory)
    _write_text(directory / "genai_config.json", json.dumps(config, indent=2) + "\n")
    write_tokenizer(source, directory)
    sync(directory)
    return Written(
        fallbacks=packer.fallbacks,
        lattice=lattice,
        digests=packer.digests,
        embedding_quant=packer.embedding_width,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "onnxruntime-genai")},
    )


def _tokenizer_notes(source: Source) -> list[str]:
    """What the runtime's own tokenizer leaves out: the special tokens that the checkpoint's puts around a text."""
    tokenizer = open_tokenizer(source.directory)
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if plain == whole:
        return []
    return [
        f"onnxruntime_genai's tokenizer adds no special tokens, the checkpoint's encodes 'a' as {whole}: "
        "put them around the prompt yourself"
    ]


def _mend(graph: Graph, source: Source, decoder: dict[str, Any]) -> None:
    """Change what the builder gets wrong, or the runtime does not take; see `genai/families`.

    Args:
        graph: in fp32.
        source: the checkpoint.
        decoder: that section of genai_config.json.
    """
    from edgewright.export.onnx.graph import (
        join_gate_up,
        set_embedding_scale,
        set_epsilon,
        set_windows,
        split_rotary,
        use_standard_norm,
    )

    family = builders_family(source)
    assert family is not None
    _check_head_size(source, decoder["head_size"])
    if family.one_gate_up:
        join_gate_up(graph, "MatMul")
    if family.one_more:
        set_embedding_scale(graph, source.config["hidden_size"] ** 0.5)
    use_standard_norm(graph)
    set_epsilon(graph, source.config[family.epsilon])
    decoder.pop("sliding_window", None)
    set_windows(graph, [source.config["sliding_window"] if short else None for short in windows(source.config)])
    if split_rotary(graph, head_size=decoder["head_size"]):
        decoder["inputs"]["position_ids"] = "position_ids"


def _lay_out(graph: Graph, source: Source, packer: Packer) -> None:
    """Store every matrix as the packer says, after comparing it with the checkpoint."""
    from edgewright.export.onnx.graph import embedding_nodes, set_packed_embedding, set_packed_linear

    gather, transpose = embedding_nodes(graph)
    table: Packed | None = None
    for node in graph.nodes("MatMul"):
        weight = node.input[1]
        if weight not in graph.initializers:
            continue  # a product of two activations
        names = checkpoint_names(weight, source)
        if names is None or not source.files.keys() >= set(names):
            raise broken_graph(weight, "a matrix in the graph that has no counterpart")
        packed = _stored(graph, source, packer, names, weight, turned=True)
        if packed is not None:
            set_packed_linear(graph, node, packed)
            table = packed if names == (source.embedding,) else table
    if transpose is None:  # the embedding is not the head's weight
        if source.tied:
            raise broken_graph(source.embedding, "a head of its own, where the checkpoint's is tied")
        table = _stored(graph, source, packer, (source.embedding,), gather.input[0], turned=False)
    if table is not None:
        set_packed_embedding(graph, table)


def _stored(
    graph: Graph, source: Source, packer: Packer, names: Sequence[str], weight: str, *, turned: bool
) -> Packed | None:
    """How one matrix of the graph is stored; None in fp32.

    The builder read the files, so it is compared with what they hold, bit for bit; where the checkpoint's lattice is
    more exact than its files, that is what stays.
    """
    plain = replace(source, restored=frozenset())
    value = graph.array(weight)
    if not np.array_equal(value.T if turned else value, np.concatenate([plain.matrix(name) for name in names])):
        raise broken_graph(", ".join(names), "other values")
    packed = packer.store(names).packed
    if packed is None and source.restored.intersection(names):
        exact = np.concatenate([source.matrix(name) for name in names])
        graph.set(weight, exact.T if turned else exact)
    return packed


def _check_complete(source: Source, packer: Packer) -> None:
    """No silent no-op: every matrix of the checkpoint was met."""
    for name in source.names:
        if len(source.shape(name)) == 2 and name not in packer.met:
            raise broken_graph(name, "no such weight")


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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
