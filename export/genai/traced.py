"""GenAI folders for the families that the vendor's builder does not know or gets wrong: the traced graph, and a
genai_config.json of our own.

The runtime hands the graph positions and a mask of the whole text, and a cache that grows with every token
(`past_present_share_buffer` is false: the graph's own attention does not write in place). Logits are those of
transformers up to 1e-5.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput
from edgewright.export.artifact import Written, sync
from edgewright.export.onnx.packing import Packer
from edgewright.export.source import Source, open_tokenizer, special_ids
from edgewright.export.to_onnx import write_graph, write_tokenizer

KIND = "decoder"
"""`model.type`: the runtime's name for a decoder that needs nothing special."""

SEARCH = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""How the runtime's own loop generates where nobody says otherwise, as the vendor's builder writes it."""


def write_traced(source: Source, directory: Path, *, quant: str, embedding_quant: str | None) -> Written:
    """Write a GenAI folder with `decoder_graph`'s graph. Arguments as `to_genai.write`.

    Raises:
        BadInput: EW-523, the model cannot be traced; EW-546, its layers have caches of several shapes.
        GateFailed: EW-521, a weight of the checkpoint has no place in the graph.
    """
    packer = Packer(source=source, quant=quant, embedding_quant=embedding_quant)
    write_graph(source, directory, packer)
    config = {"model": _model(source, directory), "search": SEARCH | {"max_length": _context_length(source)}}
    path = directory / "genai_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sync(path)
    write_tokenizer(source, directory)
    sync(directory)
    packages = ("onnx", "onnxruntime", "onnxruntime-genai", "onnxscript", "torch", "transformers")
    return Written(
        fallbacks=packer.fallbacks,
        lattice=packer.lattice,
        digests=packer.digests,
        embedding_quant=packer.embedding_width,
        versions={name: version(name) for name in packages},
    )


def _model(source: Source, directory: Path) -> dict[str, Any]:
    """The section that describes the graph."""
    heads, size, layers = _cache(source, directory)
    starts, ends, pads = (_ids(source, kind) for kind in ("bos", "eos", "pad"))
    end = ends or [0]
    return {
        "bos_token_id": (starts or end)[0],  # where a checkpoint has no BOS a text starts with EOS
        "context_length": _context_length(source),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": size,
            "hidden_size": int(source.config["hidden_size"]),
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": int(source.config["num_attention_heads"]),
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
        },
        "eos_token_id": end[0] if len(end) == 1 else end,
        "pad_token_id": (pads or end)[0],
        "type": KIND,
        "vocab_size": int(source.config["vocab_size"]),
    }


def _cache(source: Source, directory: Path) -> tuple[int, int, int]:
    """Heads and head size of the graph's cache, and its layers."""
    import onnx

    inputs = onnx.load(directory / "model.onnx", load_external_data=False).graph.input
    caches = [value for value in inputs if value.name.startswith("past_key_values.")]
    shapes = {tuple(value.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3)) for value in caches}
    if len(shapes) != 1:
        raise BadInput(
            "EW-546",
            "the layers of this model keep caches of several shapes, which the target cannot say",
            where=source.directory.absolute(),
            expected="the same number of heads, and the same head size, in all layers",
            found=", ".join(f"{heads} heads of {size}" for heads, size in sorted(shapes)),
            fix="export to onnx or gguf",
        )
    heads, size = shapes.pop()
    return heads, size, len(caches) // 2


def _context_length(source: Source) -> int:
    return int(source.config["max_position_embeddings"])


def _ids(source: Source, kind: str) -> list[int]:
    tokenizer = open_tokenizer(source.directory)
    tokens = [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]
    return special_ids(source.config, source.tokenizer_config, kind, tokens)
