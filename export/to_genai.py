"""ONNX Runtime GenAI: a folder that `onnxruntime_genai.Model` opens as it is.

The graph computes attention with `GroupQueryAttention` and a key-value cache in place where the family is known
(`onnx/decoder.py`), and takes queries, keys and values from one product, gate and up from another: decoding is 1.1
times as fast as with ONNX's own operators after 50 tokens, and 1.2 to 1.3 times after 400. All other decoders get the
graph of `to_onnx.py`. Weights are laid out by `onnx/packing.Packer`: at ternary 2 bits and one fp32 scale per 128
weights, 2.25 bits a weight.

The largest difference of a logit to transformers, with onnxruntime-genai 0.18 on one tiny model of each family and kind
of rotary positions, in fp32 (logits reach 10): 3e-6 to 2e-5, written or traced.

A batch of texts of several lengths must be padded on the right, as the runtime's `Tokenizer.encode_batch` pads:
`GroupQueryAttention` takes the first so many tokens of a row for its text, and answers wrongly behind padding on the
left.

fp16 is no width of this target: onnxruntime 1.31 has no faster kernels for it on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

from edgewright.errors import BadInput
from edgewright.export.artifact import Written, sync
from edgewright.export.genai.config import NO_END, genai_config, special_tokens
from edgewright.export.onnx.decoder_graph import build, build_grouped, check_positions, makers
from edgewright.export.onnx.packing import Packer
from edgewright.export.source import Source
from edgewright.export.to_onnx import write_graph, write_tokenizer
from edgewright.export.tokenizer_files import open_tokenizer

QUANTS = ("fp32", "int8", "int4", "ternary")
"""The widths of linear weights."""

EMBEDDING_QUANTS = ("fp32", "int8", "int4")
"""The widths of token embedding and output head."""


RIGHT_PADDING = (
    "texts of several lengths in one batch must be padded on the right, as onnxruntime_genai's encode_batch does: "
    "behind padding on the left the answers are wrong"
)
"""Said of graphs with `GroupQueryAttention`."""


def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
    """Write a GenAI folder.

    Args:
        source: the checkpoint, any decoder that transformers knows.
        directory: made if it is not there; the caller swaps it into place.
        quant: one of `QUANTS`.
        embedding_quant: of token embedding and head, one of `EMBEDDING_QUANTS`; None takes
            `onnx/packing.EMBEDDING_DEFAULT`, or the lattice of a head that was trained on one.

    Raises:
        BadInput: EW-603 without onnxruntime-genai; EW-523, EW-546 and EW-547, the target cannot hold the model.
        GateFailed: EW-521 when a weight of the checkpoint is not in the graph as it should be.
    """
    check_installed()
    check_positions(source)
    packer = Packer(source=source, quant=quant, embedding_quant=embedding_quant)
    grouped = build_grouped(source)
    model = build(source) if grouped is None else grouped
    config = genai_config(source, model)
    write_graph(model, source, directory, packer, join=True)
    path = directory / "genai_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sync(path)
    write_tokenizer(source, directory)
    sync(directory)
    return Written(
        fallbacks=packer.fallbacks,
        lattice=packer.lattice,
        digests=packer.digests,
        embedding_quant=packer.embedding_width,
        versions={name: version(name) for name in (*makers(source), "onnxruntime", "onnxruntime-genai")},
        notes=[*_tokenizer_notes(source), *_end_notes(source), *([] if grouped is None else [RIGHT_PADDING])],
    )


def _end_notes(source: Source) -> list[str]:
    """What the runtime is told where the checkpoint names no token that ends a text."""
    if special_tokens(source).ends:
        return []
    return [f"the checkpoint names no EOS token: the runtime stops at token {NO_END}; set eos_token_id in config.json"]


def check_installed() -> None:
    """Raises BadInput (EW-603) where onnxruntime-genai is missing."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise BadInput(
            "EW-603",
            "ONNX Runtime GenAI is not installed",
            expected="the packages of the extra `genai`",
            found="no onnxruntime_genai",
            fix='pip install "edgewright[genai]"',
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
