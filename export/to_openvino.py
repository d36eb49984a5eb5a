"""OpenVINO: a folder that `openvino_genai.LLMPipeline(folder, "CPU")` runs as it is.

The graph is that of `decoder_graph.py`, read by OpenVINO itself; its cache becomes a state, and its weights
become compressed constants laid out from the codes of the lattice: u2 for ternary, i4 and i8. Scales are stored in half
precision where that holds them exactly, else in float32; the runtime multiplies in float32 either way.

What the CPU plugin of OpenVINO 2026.4 does, and what follows here:

* i8 and i4 without a zero point, and u2 with an integer zero point, are multiplied from codes, with activations rounded
  to 8 bits in groups ("dynamic quantization"); u2 with a float zero point never is, and takes twice as long.
* In bfloat16, which is the default where the processor has it, u2 with rounded activations crashes. A file with u2
  therefore says in its `runtime_options` that activations are not to be rounded, which is what the plugin heeds of a
  model's own wishes (beside the type of the cache; precision and execution mode it ignores there). Who asks for float32
  can switch it on again, as `OpenVinoSession` does: INFERENCE_PRECISION_HINT f32, DYNAMIC_QUANTIZATION_GROUP_SIZE 32.
* Scale groups other than powers of two give wrong products without a word, at all three widths; so do u2 rows that are
  no multiple of four. Such weights are stored wider. One scale a row is right at every length, and the fastest.
* A table of u2 is decompressed to float32 when it is looked up; a ternary embedding is stored as i4.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput, GateFailed
from edgewright.export.artifact import Fallback, Written, digest, sync
from edgewright.export.clean_settings import clean_config
from edgewright.export.guard import read_json
from edgewright.export.lattice import LatticeTensor, round_int, round_q4_0
from edgewright.export.layout.openvino import OpenVinoWeight
from edgewright.export.onnx.decoder import has_windows
from edgewright.export.onnx.decoder_graph import check_positions, makers, save
from edgewright.export.onnx.packing import POSITIONS, UNLIKE_EMBEDDING
from edgewright.export.openvino import graph as openvino_graph
from edgewright.export.openvino.package import load
from edgewright.export.runtimes.openvino import CONTEXT_LENGTH
from edgewright.export.scratch import scratch
from edgewright.export.source import Source

QUANTS = ("fp32", "fp16", "int8", "int4", "ternary")
"""The widths of linear weights."""

EMBEDDING_QUANTS = ("fp32", "fp16", "int8", "int4")
"""The widths of token embedding and output head."""

EMBEDDING_DEFAULT = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int8", "ternary": "fp32"}
"""The width of token embedding and head without a lattice, where none is asked for."""


ELEMENTS = {"ternary": ("u2",), "int4": ("i4", "u4"), "int8": ("i8", "u8")}
"""OpenVINO's types for the packed widths, the fastest first; those without sign hold zero points."""

ROW_MULTIPLE = {"u2": 4}
"""What the columns must be a multiple of for one scale a row."""

WIDER = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "int8": ("int8", "fp32"),
    "int4": ("int4", "int8", "fp32"),
    "ternary": ("ternary", "int4", "int8", "fp32"),
}
"""The widths to try for a lattice, the one asked for first."""

ROUNDED = WIDER | {"ternary": ("ternary", "int8", "fp32")}
"""The same for a weight without one, which 4 bits would hurt where they were not asked for."""

GROUPS = (256, 128, 64, 32, 16)
"""Columns per scale that the CPU plugin multiplies correctly."""

ROUND_GROUPS = (32, 16)
"""Those in which weights are rounded to 4 bits: finer scales cost half a bit, and lose much less."""


def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write an OpenVINO folder.

    Args:
        source: the checkpoint, any decoder that `decoder_graph.build` takes.
        directory: made if it is not there; the caller swaps it into place.
        quant: one of `QUANTS`.
        embedding_quant: of token embedding and head, one of `EMBEDDING_QUANTS`; None takes their lattice where they
            have one, else `EMBEDDING_DEFAULT`.

    Raises:
        BadInput: EW-603 without OpenVINO; EW-523, EW-541, EW-547, the model, its tokenizer or its positions
            cannot be converted.
        GateFailed: EW-521, EW-540 when the graph does not hold the checkpoint's weights as it should.
    """
    ov = load()
    check_positions(source)
    directory.mkdir(parents=True, exist_ok=True)
    with scratch(directory) as place:
        model = _read(ov, save(source, place), source)
        packing = _Packing(source=source, quant=quant, embedding_quant=embedding_quant)
        packing.run(model)
        openvino_graph.make_stateful(model)
        if has_windows(source):  # which the pipeline's paged attention does not see in the mask: it would give them all
            openvino_graph.keep_from_paging(model)
        _set_runtime_options(model, packing.elements)
        model.set_rt_info(str(source.config["max_position_embeddings"]), CONTEXT_LENGTH)
        ov.save_model(model, directory / "openvino_model.xml", compress_to_fp16=False)
    _write_tokenizer(ov, source, directory)
    _write_configs(source, directory)
    for file in sorted(directory.iterdir()):
        sync(file)
    sync(directory)
    return Written(
        fallbacks=packing.fallbacks,
        lattice={name: packing.stored.get(name, "not stored") for name in source.lattice},
        digests=packing.digests,
        embedding_quant=packing.embedding_width,
        versions={name: version(name) for name in (*makers(source), "openvino", "openvino-tokenizers")},
    )


# ---------------------------------------------------------------- weights


@dataclass(slots=True, kw_only=True)
class _Packing:
    """The state of one packing: which weights were met, and how they are stored."""

    source: Source
    quant: str
    embedding_quant: str | None
    fallbacks: list[Fallback] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)
    """For each weight met: `exact`, or what was lost."""
    digests: dict[str, str] = field(default_factory=dict)
    elements: set[str] = field(default_factory=set)
    """The types in which codes are stored."""

    @property
    def embedding_width(self) -> str:
        """The width that the token embedding should have; a head of another width is among the fallbacks."""
        return self._width_of(self.source.embedding)

    def run(self, model: Any) -> None:
        """Put every tensor of the checkpoint into the graph as it is to be stored."""
        released = openvino_graph.release(model, self.source.names)
        missing = sorted({*self.source.names, *self.source.lattice} - released.keys())
        if missing:
            raise _broken_graph(missing[0], "no such weight")
        openvino_graph.simplify(model)
        for name, weight in released.items():
            if len(self.source.shape(name)) == 2:
                self._replace(name, list(openvino_graph.readers(weight)))
            else:
                vector = openvino_graph.dense(self.source.tensor(name), name)
                weight.output(0).replace(vector.output(0))
            model.remove_parameter(weight)
        model.validate_nodes_and_infer_types()

    def _replace(self, name: str, readers: list[tuple[str, Any]]) -> None:
        uses = {use for use, _ in readers}
        if not uses or "other" in uses:
            raise _broken_graph(name, "a use that is neither a product nor a lookup")
        weight = self._stored(name, *self._asked(name, table="table" in uses))
        for use, node in readers:
            if use == "table":
                openvino_graph.set_table(node, weight)
            else:
                openvino_graph.set_linear(node, weight)

    def _asked(self, name: str, *, table: bool) -> tuple[str, str]:
        """The width to try first; and why that one, where it is another than the manifest names for such a weight."""
        if name in (self.source.embedding, self.source.head):
            width = self._width_of(name)
            return width, "" if width == self.embedding_width else UNLIKE_EMBEDDING
        return ("fp32", POSITIONS) if table and self.quant in ELEMENTS else (self.quant, "")

    def _width_of(self, name: str) -> str:
        """The width of embedding or head: as asked for, else its own, else the default."""
        if self.embedding_quant is not None:
            return self.embedding_quant
        if name not in self.source.lattice or self.quant not in ELEMENTS:
            return EMBEDDING_DEFAULT[self.quant]
        return "int4" if name == self.source.embedding and self.quant == "ternary" else self.quant  # no table of u2

    def _stored(self, name: str, asked: str, lost: str) -> Any:
        """The node that gives a weight, at the narrowest width that holds it; `lost` is why it is not the usual one."""
        values, lattice = self.source.matrix(name), self.source.lattice.get(name)
        for width in (ROUNDED if lattice is None else WIDER)[asked]:
            found, reason = _at(width, values, lattice)
            if not reason:
                break
            lost = lost or reason
        if lost:
            self.fallbacks.append(Fallback(name, width, lost))
        if isinstance(found, np.ndarray):
            kept = found.astype(np.float32)
            node = openvino_graph.dense(found, name)
        else:
            layout, packed = found
            self.elements.add(layout.element)
            kept = packed.dequantize()
            node = openvino_graph.compressed(layout, packed, name)
        self.digests[name] = digest(kept)
        right = values if lattice is None else lattice.dequantize()
        self.stored[name] = "exact" if np.array_equal(kept, right) else f"rounded to {width}"
        return node


def _at(
    width: str, values: np.ndarray, lattice: LatticeTensor | None
) -> tuple[np.ndarray | tuple[OpenVinoWeight, LatticeTensor], str]:
    """A weight at a width, as values or as a lattice and its layout, or why not; float32 always works."""
    right = values if lattice is None else lattice.dequantize()
    if width == "fp32":
        return right, ""
    if width == "fp16":
        with np.errstate(over="ignore"):
            half = right.astype(np.float16)
        if not np.isfinite(half).all():
            return right, "a value is too large for float16"
        exact = lattice is None or np.array_equal(half.astype(np.float32), right)
        return half, "" if exact else "its lattice is not exact in float16"
    if lattice is None:
        lattice, reason = _rounded(values, width)
        if lattice is None:
            return values, reason
    layout, reason = _layout(lattice, width)
    return (right, reason) if layout is None else ((layout, lattice), "")


def _rounded(values: np.ndarray, width: str) -> tuple[LatticeTensor | None, str]:
    """A weight without a lattice, rounded to nearest; a ternary weight must have been trained.

    8 bits have one scale a row. 4 bits take the rule of ggml's Q4_0, whose signed scale uses all 16 codes, where rows
    are made of its blocks, else 15 symmetric codes.
    """
    columns = values.shape[1]
    if width == "ternary":
        return None, "it is not ternary"
    if width == "int8":
        return round_int(values, bits=8, group=None, scale_dtype=np.float16), ""
    group = next((group for group in ROUND_GROUPS if columns % group == 0), None)
    if group is None:
        return None, f"{columns} columns are no multiple of {ROUND_GROUPS[-1]}"
    if group == 32:
        return round_q4_0(values), ""
    return round_int(values, bits=4, group=group, scale_dtype=np.float16), ""


def _layout(lattice: LatticeTensor, width: str) -> tuple[OpenVinoWeight | None, str]:
    """How a width holds a lattice, with as few scales as it takes; or why it does not."""
    columns = lattice.codes.shape[1]
    reason = ""
    for element in ELEMENTS[width]:
        by_row = [None] if columns % ROW_MULTIPLE.get(element, 1) == 0 else []
        for group in [*by_row, *(group for group in GROUPS if columns % group == 0)]:
            for scale in (np.float16, np.float32):
                layout = OpenVinoWeight(element=element, group=group, scale=scale)
                why_not = layout.holds_exactly(lattice)
                if why_not is None:
                    return layout, ""
                reason = why_not
    return None, reason or f"{columns} columns are no multiple of {min(ROW_MULTIPLE.values())}"


def _broken_graph(name: str, found: str) -> GateFailed:
    return GateFailed(
        "EW-540",
        f"the graph and the checkpoint differ in the weight {name!r}",
        expected="every matrix of the checkpoint, in products and lookups alone",
        found=found,
        fix="this architecture is laid out in a way that is not known here: export to another target",
    )


# ---------------------------------------------------------------- the folder


def _read(ov: Any, path: Path, source: Source) -> Any:
    """The graph as an OpenVINO model."""
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise BadInput(
            "EW-542",
            "OpenVINO cannot read the graph of this model",
            where=source.directory.absolute(),
            expected="operators that its ONNX reader knows",
            found=str(error).strip().splitlines()[-1][:300],
            fix="export to onnx, genai or gguf; or install a newer openvino",
        ) from error


def _set_runtime_options(model: Any, elements: set[str]) -> None:
    """What every pipeline that opens this model shall do, see the head of this file."""
    options = {"KV_CACHE_PRECISION": "f16"}  # the default, 8 bits, costs more than all other rounding
    if "u2" in elements:
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    for name, value in options.items():
        model.set_rt_info(value, ["runtime_options", name])


_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError)
"""What transformers and openvino_tokenizers raise for a tokenizer that they cannot take, each step its own."""


def _write_tokenizer(ov: Any, source: Source, directory: Path) -> None:
    """tokenizer.json with its settings, and both tokenizer models made from them."""
    source.write_tokenizer(directory)
    from transformers import PreTrainedTokenizerFast

    convert_tokenizer = load("openvino_tokenizers").convert_tokenizer
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except _REFUSALS as error:
        raise BadInput(
            "EW-541",
            "OpenVINO cannot express this tokenizer",
            where=source.directory.absolute(),
            expected="a tokenizer whose steps openvino_tokenizers knows",
            found=f"{type(error).__name__}: {str(error).strip()[:200]}",
            fix="export to genai or onnx",
        ) from error
    for model, name in zip(models, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        ov.save_model(model, directory / f"{name}.xml", compress_to_fp16=False)


def _write_configs(source: Source, directory: Path) -> None:
    """config.json, and a generation_config.json that names the special tokens."""
    config = clean_config(read_json(source.directory / "config.json"))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    given = source.directory / "generation_config.json"
    if given.is_file():
        shutil.copyfile(given, directory / given.name)
        return
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {key: source.config[key] for key in keys if source.config.get(key) is not None}
    (directory / given.name).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
