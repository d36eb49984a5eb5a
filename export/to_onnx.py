"""ONNX: a folder that `onnxruntime` runs as it is, and `optimum.onnxruntime.ORTModelForCausalLM` opens.

The graph is `decoder_graph.build`'s, for every family; its weights are then laid out by `onnx/packing.Packer`. What
computes is float32 (activations of packed matrices are rounded to 8 bits per block, `accuracy_level` 4: at 2 and 8
bits level 0 is ten times slower and more). fp16 and bf16 are widths of the file: onnxruntime 1.31 has no half-precision
kernels for decoders on x86 and would convert each activation back and forth, at the same speed and 1000 times the
error. Its bf16 kernels do not exist at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.export.artifact import Written, sync
from edgewright.export.clean_settings import clean_config, clean_tokenizer_config
from edgewright.export.guard import read_json
from edgewright.export.in_order import in_order
from edgewright.export.onnx.decoder_graph import build, check_positions, makers
from edgewright.export.onnx.files import save_graph
from edgewright.export.onnx.fusions import CONTRIB, bias_behind, fuse, replace, unflatten
from edgewright.export.onnx.joining import join_products
from edgewright.export.onnx.packing import HALF, Packed, Packer, Stored, half
from edgewright.export.source import Source, special_ids

if TYPE_CHECKING:
    import onnx_ir as ir

QUANTS = ("fp32", "fp16", "bf16", "int8", "int4", "ternary")
"""The widths of linear weights, and of token embedding and output head."""


def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write an ONNX folder.

    Args:
        source: the checkpoint, any decoder that transformers knows.
        directory: made if it is not there; the caller swaps it into place.
        quant: one of `QUANTS`.
        embedding_quant: of token embedding and head, one of `QUANTS`; None takes `onnx/packing.EMBEDDING_DEFAULT`, or
            the lattice of a ternary head.

    Raises:
        BadInput: EW-523, the model cannot be traced; EW-547, its positions depend on the length of the text.
        GateFailed: EW-521, a weight of the checkpoint has no place in the graph.
    """
    check_positions(source)
    packer = Packer(source=source, quant=quant, embedding_quant=embedding_quant)
    write_graph(build(source), source, directory, packer)
    _write_settings(source, directory)
    sync(directory)
    return Written(
        fallbacks=packer.fallbacks,
        lattice=packer.lattice,
        digests=packer.digests,
        embedding_quant=packer.embedding_width,
        versions={name: version(name) for name in (*makers(source), "onnxruntime")},
    )


def write_graph(model: ir.Model, source: Source, directory: Path, packer: Packer, *, join: bool = False) -> None:
    """Write model.onnx and model.onnx.data alone, with the weights as `packer` lays them out.

    Args:
        model: as `decoder_graph` gives it; changed in place.
        source: the checkpoint.
        directory: made if it is not there.
        packer: gets the record of what was stored.
        join: whether products that read the same become one.
    """
    writing = _Writing(model=model, source=source, packer=packer)
    writing.run()
    if join:
        join_products(model)
    save_graph(model, directory, aliases=writing.aliases)


@dataclass(slots=True, kw_only=True)
class _Writing:
    """A graph whose weights are being laid out."""

    model: ir.Model
    source: Source
    packer: Packer
    aliases: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        graph = self.model.graph
        unflatten(self.model)
        weights = [value for value in graph.initializers.values() if value.name in self.source.files]
        matrices = [weight for weight in weights if len(weight.shape or ()) == 2]
        asked = [(str(weight.name), self._is_packable(weight)) for weight in matrices]
        prepared = in_order(lambda each: self.packer.prepare([each[0]], packable=each[1]), asked)
        for weight, stored in zip(matrices, prepared, strict=True):
            self._lay_out(weight, self.packer.keep(stored))
        fuse(self.model)

    def _is_packable(self, weight: ir.Value) -> bool:
        return all(_is_linear(node, index) or self._is_embedding(weight, node) for node, index in weight.uses())

    def _lay_out(self, weight: ir.Value, stored: Stored) -> None:
        """Make the readers of one matrix read it as it is stored."""
        readers = [node for node, _ in weight.uses()]
        if stored.packed is not None:
            for node in readers:
                for reader in _through_transpose(node):
                    if node.op_type == "Gather":
                        self._look_up(reader, weight, stored.packed)
                    else:
                        self._multiply(reader, weight, stored.packed)
        elif stored.width in HALF:
            self._halve(weight, stored.width, readers)

    def _is_embedding(self, weight: ir.Value, node: ir.Node) -> bool:
        return node.op_type == "Gather" and weight.name == self.source.embedding

    def _multiply(self, node: ir.Node, weight: ir.Value, packed: Packed) -> None:
        """Put a `MatMulNBits` in the place of a `MatMul` or `Gemm`, and of the addition of a bias behind it."""
        import onnx_ir as ir

        bias, last = node.inputs[2] if node.op_type == "Gemm" else None, node
        if bias is None:
            bias, last = bias_behind(node)
        layout = packed.layout
        inputs = [node.inputs[0], self._codes(weight, packed), *self._scaling(weight, packed)]
        new = ir.node(
            "MatMulNBits",
            inputs if bias is None else [*inputs, *[None] * (5 - len(inputs)), bias],
            {
                "K": packed.columns,
                "N": len(packed.codes),
                "bits": layout.bits,
                "block_size": layout.block,
                "accuracy_level": 4,
            },
            domain=CONTRIB,
            name=f"{node.name}_Q{layout.bits}",
        )
        replace(last, [new])

    def _look_up(self, node: ir.Node, weight: ir.Value, packed: Packed) -> None:
        """Put a `GatherBlockQuantized` in the place of a `Gather`. A tied head reads the same bytes of the file."""
        import onnx_ir as ir

        layout = packed.layout
        rows, blocks, width = packed.codes.shape
        name = f"{weight.name}_Q{layout.bits}"
        table = self._add(f"{name}_rows", packed.codes.reshape(rows, blocks * width))
        if self.source.tied:
            self.aliases[str(table.name)] = name
        found = ir.node(
            "GatherBlockQuantized",
            [table, node.inputs[1], *self._scaling(weight, packed)],
            {"bits": layout.bits, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
            name=f"{node.name}_Q{layout.bits}",
        )
        new = [found]
        if blocks * layout.block != packed.columns:  # the last block is padded
            ends = [("start", 0), ("end", packed.columns), ("axis", -1)]
            bounds = [self._add(f"embedding_{word}", np.array([at], np.int64)) for word, at in ends]
            new.append(ir.node("Slice", [found.outputs[0], *bounds], name=f"{node.name}_slice"))
        replace(node, new)

    def _halve(self, weight: ir.Value, width: str, readers: list[ir.Node]) -> None:
        """Store the weight in half precision. What is looked up is widened after that, what is multiplied before."""
        import onnx_ir as ir

        wide = weight.const_value
        assert wide is not None
        kind = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[width]
        weight.const_value = ir.LazyTensor(
            lambda: ir.Tensor(half(wide.numpy(), width), dtype=kind, name=weight.name),
            kind,
            ir.Shape(wide.shape.numpy()),
            name=weight.name,
        )
        weight.type = ir.TensorType(kind)
        for node in readers:
            cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{node.name}_widened")
            if node.op_type == "Gather":
                looked_up = ir.node("Gather", list(node.inputs), dict(node.attributes), name=node.name)
                cast.replace_input_with(0, looked_up.outputs[0])
                replace(node, [looked_up, cast])
            else:
                self.model.graph.insert_before(node, cast)
                node.replace_input_with(list(node.inputs).index(weight), cast.outputs[0])

    def _codes(self, weight: ir.Value, packed: Packed) -> ir.Value:
        return self._add(f"{weight.name}_Q{packed.layout.bits}", packed.codes)

    def _scaling(self, weight: ir.Value, packed: Packed) -> list[ir.Value]:
        """The scales, and the zero points where they are not the operator's own."""
        scales = self._add(f"{weight.name}_scales", packed.scales)
        return [scales] if packed.zeros is None else [scales, self._add(f"{weight.name}_zeros", packed.zeros)]

    def _add(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer; the same name twice is the same value."""
        import onnx_ir as ir

        initializers = self.model.graph.initializers
        if name not in initializers:
            initializers[name] = ir.Value(
                name=name,
                const_value=ir.Tensor(value, name=name),
                shape=ir.Shape(value.shape),
                type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
            )
        return initializers[name]


def _is_linear(node: ir.Node, index: int) -> bool:
    """Whether a weight that is this input of the node is multiplied with, perhaps behind a transposition."""
    if node.op_type == "Transpose":
        return all(user.op_type == "MatMul" and place == 1 for user, place in node.outputs[0].uses())
    return node.op_type in ("MatMul", "Gemm") and index == 1


def _through_transpose(node: ir.Node) -> list[ir.Node]:
    return [user for user, _ in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]


# ---------------------------------------------------------------- what lies beside the graph


def _write_settings(source: Source, directory: Path) -> None:
    """config.json, generation_config.json and the tokenizer, as transformers 4 and 5 read them."""
    config = read_json(source.directory / "config.json")
    _write_json(directory / "config.json", _for_older_readers(clean_config(config)))
    kept = source.directory / "generation_config.json"
    _write_json(directory / "generation_config.json", read_json(kept) if kept.is_file() else _generation(source))
    write_tokenizer(source, directory)


def write_tokenizer(source: Source, directory: Path) -> None:
    """The tokenizer as transformers 4 and 5 and other readers take it, without the traces of this machine."""
    source.write_tokenizer(directory)
    settings = clean_tokenizer_config(source.tokenizer_config)
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # a name that transformers 4 does not know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    _write_json(directory / "tokenizer_config.json", settings)


def _for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """With the rotary settings also where transformers 4 looks for them: it would take its defaults in silence."""
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict):
        return config
    plain = rotary.get("full_attention", rotary)
    older = {name: plain[name] for name in ("rope_theta", "partial_rotary_factor") if name in plain}
    if "sliding_attention" in rotary:
        older["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
    if plain.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in plain.items() if name not in older}
    return older | config


def _generation(source: Source) -> dict[str, Any]:
    tokens = list(_vocabulary(source))
    kinds = {kind: special_ids(source.config, source.tokenizer_config, kind, tokens) for kind in ("bos", "eos", "pad")}
    return {f"{kind}_token_id": found[0] if len(found) == 1 else found for kind, found in kinds.items() if found}


def _vocabulary(source: Source) -> list[str]:
    from edgewright.export.source import open_tokenizer

    tokenizer = open_tokenizer(source.directory)
    return [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)
