"""One ONNX graph of any decoder, with its cache as inputs and outputs: written down where the family is known, else
traced. That choice is made here.

Inputs: `input_ids` int64 `[batch, sequence]`, `attention_mask` int64 `[batch, past + sequence]`, `position_ids` int64
`[batch, sequence]`, `past_key_values.{layer}.key|value` float32 `[batch, heads, past, size]`. Outputs: `logits` float32
`[batch, sequence, vocabulary]` and `present.{layer}.key|value`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.errors import BadInput
from edgewright.export.onnx import traced_graph
from edgewright.export.onnx.attention import GroupQueryAttention, StandardAttention
from edgewright.export.onnx.decoder import describe
from edgewright.export.onnx.files import save_graph
from edgewright.export.onnx.written_graph import write_graph
from edgewright.export.source import Source

if TYPE_CHECKING:
    import onnx_ir as ir


def build(source: Source) -> ir.Model:
    """The graph in ONNX's own operators; its weights are read when their bytes are asked for.

    Every tensor of the checkpoint is an initializer with its own name, once; a tied head is the embedding's, behind a
    `Transpose`. The weight of a linear layer is the second input of a `MatMul` or `Gemm` and lies `[in, out]`, also
    where the checkpoint holds `[out, in]`.

    Raises:
        BadInput: EW-523, transformers or torch's exporter cannot turn this model into a graph with a cache.
        GateFailed: EW-521, the graph lacks a weight of the checkpoint or has one too many.
    """
    decoder = describe(source)
    return traced_graph.build(source) if decoder is None else write_graph(decoder, source, StandardAttention)


def build_grouped(source: Source) -> ir.Model | None:
    """The graph in ONNX Runtime's `GroupQueryAttention`; None where that cannot be written. Errors as `build`."""
    decoder = describe(source)
    if decoder is None or not GroupQueryAttention.takes(decoder):
        return None
    return write_graph(decoder, source, GroupQueryAttention)


def makers(source: Source) -> tuple[str, ...]:
    """The packages that make the graph of a checkpoint."""
    return ("onnx", *traced_graph.PACKAGES) if describe(source) is None else ("onnx",)


def save(source: Source, directory: Path) -> Path:
    """Write `build`'s graph as `model.onnx` and `model.onnx.data` and return the path of the first; errors as `build`.

    Args:
        source: the checkpoint.
        directory: made if it is not there.
    """
    return save_graph(build(source), directory)


def check_positions(source: Source) -> None:
    """Refuse rotary positions whose angles change when a text grows beyond the length of training.

    What is in the cache then has the angles of the short text, or not, by how it came there; transformers itself gives
    different logits for one prompt and for the same tokens one by one.

    Raises:
        BadInput: EW-547.
    """
    config = source.config
    rotary = config.get("rope_parameters") or {}
    trained = rotary.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if rotary.get("rope_type") == "longrope" and trained and trained < config["max_position_embeddings"]:
        raise BadInput(
            "EW-547",
            "the rotary positions of this model change with the length of the text, which the target cannot say",
            where=(source.directory / "config.json").absolute(),
            expected=f"angles that are the same for every text; max_position_embeddings of at most {trained}",
            found=f"longrope, and max_position_embeddings of {config['max_position_embeddings']}",
            fix="export to hf",
        )
