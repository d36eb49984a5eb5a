"""genai_config.json: what ONNX Runtime GenAI must know of a graph, and how its own loop generates.

The keys and the defaults are those that the vendor's builder writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgewright.errors import BadInput
from edgewright.export.guard import read_json
from edgewright.export.source import Source, open_tokenizer, special_ids

if TYPE_CHECKING:
    import onnx_ir as ir

KIND = "decoder"
"""`model.type`: the runtime's name for a decoder that needs nothing special."""

KIND_OF = {"ministral": "mistral"}
"""The runtime's name of a family where that is not `model_type`."""

IN_PLACE = "GroupQueryAttention"
"""The attention that writes keys and values into the cache that it is given."""

NO_END = 0
"""The token at which the runtime, which needs one, stops where a checkpoint names no EOS."""

SEARCH = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""How the runtime generates where nobody says otherwise."""

_GENERATION = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")
"""What the checkpoint's generation_config.json says otherwise."""


def genai_config(source: Source, model: ir.Model) -> dict[str, Any]:
    """The content of genai_config.json.

    A graph whose attention does not write in place gets a cache that grows with every token
    (`past_present_share_buffer` is false).

    Raises:
        BadInput: EW-546, the layers have caches of several shapes.
    """
    generation = _generation(source)
    return {
        "model": _model(source, model),
        "search": SEARCH
        | {name: generation[name] for name in _GENERATION if generation.get(name) is not None}
        | {"max_length": _context_length(source), "past_present_share_buffer": _writes_in_place(model)},
    }


@dataclass(frozen=True, slots=True)
class Specials:
    """The special tokens that a checkpoint names: ids of its vocabulary, none twice, the main one first."""

    starts: list[int]
    ends: list[int]
    pads: list[int]
    turn_ends: list[int]
    """The tokenizer's ends that are not among `ends`; they come before those."""


def special_tokens(source: Source) -> Specials:
    """Those of generation_config.json, else of config.json, else of the tokenizer. The tokenizer's end is one in any
    case: it ends a turn of a chat, and config.json may lack it."""
    tokens = _vocabulary(source)
    given = source.config | {name: value for name, value in _generation(source).items() if value is not None}
    known = range(int(source.config["vocab_size"]))

    def ids(kind: str, settings: Mapping[str, Any]) -> list[int]:
        found = special_ids(settings, source.tokenizer_config, kind, tokens)
        return [token for token in dict.fromkeys(found) if token in known]

    ends = ids("eos", given)
    turn_ends = [token for token in ids("eos", {}) if token not in ends]
    if not ends:
        ends, turn_ends = turn_ends, []
    return Specials(starts=ids("bos", given), ends=ends, pads=ids("pad", given), turn_ends=turn_ends)


def _generation(source: Source) -> dict[str, Any]:
    path = source.directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _model(source: Source, model: ir.Model) -> dict[str, Any]:
    """The section that describes the graph."""
    heads, size, layers = _cache(source, model)
    specials = special_tokens(source)
    ends, family = specials.ends or [NO_END], str(source.config["model_type"])
    all_ends = [*specials.turn_ends, *ends]
    inputs = [name for name in ("input_ids", "attention_mask", "position_ids") if name in _inputs(model)]
    return {
        "bos_token_id": (specials.starts or ends)[0],  # where a checkpoint has no BOS a text starts with EOS
        "context_length": _context_length(source),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": size,
            "hidden_size": int(source.config["hidden_size"]),
            "inputs": {
                **{name: name for name in inputs},
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
        "eos_token_id": all_ends[0] if len(all_ends) == 1 else all_ends,
        "pad_token_id": (specials.pads or ends)[0],
        "type": KIND_OF.get(family, family) if _writes_in_place(model) else KIND,
        "vocab_size": int(source.config["vocab_size"]),
    }


def _writes_in_place(model: ir.Model) -> bool:
    return any(node.op_type == IN_PLACE for node in model.graph)


def _inputs(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for value in model.graph.inputs}


def _cache(source: Source, model: ir.Model) -> tuple[int, int, int]:
    """Heads and head size of the graph's cache, and its layers."""
    caches = [value.shape for name, value in _inputs(model).items() if name.startswith("past_key_values.")]
    shapes = {(shape[1], shape[3]) for shape in caches if shape is not None}
    if len(shapes) != 1:
        raise BadInput(
            "EW-546",
            "the layers of this model keep caches of several shapes, which the target cannot say",
            where=source.directory.absolute(),
            expected="the same number of heads, and the same head size, in all layers",
            found=", ".join(f"{heads} heads of {size}" for heads, size in sorted(shapes, key=str)),
            fix="export to onnx or gguf",
        )
    heads, size = shapes.pop()
    assert isinstance(heads, int)
    assert isinstance(size, int)
    return heads, size, len(caches) // 2


def _context_length(source: Source) -> int:
    return int(source.config["max_position_embeddings"])


def _vocabulary(source: Source) -> list[str]:
    """The texts of all tokens, by id."""
    tokenizer = open_tokenizer(source.directory)
    return [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]
