"""A GenAI folder with a draft: what ONNX Runtime GenAI asks of it, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgewright.errors import BadInput
from edgewright.export.guard import read_json

GENAI_CONFIG = "genai_config.json"

MAX_DRAFT_TOKENS = 16
"""Tokens that the runtime drafts in a round at most."""


def check_genai_pair(folder: Path) -> None:
    """Whether ONNX Runtime GenAI can decode speculatively with a folder, by its genai_config.json.

    Both models must run on the same execution provider with the same options, one text at a time, without beams, with
    caches that can be cut back.

    Raises:
        BadInput: EW-828 names the key.
    """
    path = folder / GENAI_CONFIG
    config = read_json(path)
    target, draft = _sections(path, config)
    if target.get("session_options") != draft.get("session_options"):
        found = str(draft.get("session_options"))
        raise unfit(path, "model.draft.session_options", f"the target's {target.get('session_options')}", found)
    for name, section in (("decoder", target), ("draft", draft)):
        if section.get("sliding_window"):
            raise unfit(path, f"model.{name}.sliding_window", "a cache that is kept whole", "a window")
    search: Any = config.get("search")
    search = search if isinstance(search, dict) else {}
    for key, right in (("num_beams", 1), ("num_return_sequences", 1), ("batch_size", 1), ("no_repeat_ngram_size", 0)):
        if search.get(key, right) != right:
            raise unfit(path, f"search.{key}", str(right), search[key])
    speculative = config.get("speculative")
    gamma = speculative.get("max_draft_tokens", 4) if isinstance(speculative, dict) else 4
    if not isinstance(gamma, int) or not 1 <= gamma <= MAX_DRAFT_TOKENS:
        raise unfit(path, "speculative.max_draft_tokens", f"1 to {MAX_DRAFT_TOKENS}", str(gamma))


def check_logits(folder: Path) -> None:
    """Whether both graphs give the logits of every token, over vocabularies of one size.

    Where a target gave those of the last one alone, the runtime would ask for them one at a time, and win nothing.

    Raises:
        BadInput: EW-828.
    """
    import onnx

    widths = []
    for section in _sections(folder / GENAI_CONFIG, read_json(folder / GENAI_CONFIG)):
        path = folder / str(section.get("filename"))
        graph = onnx.load(path, load_external_data=False).graph
        logits = [value for value in graph.output if value.name == section.get("outputs", {}).get("logits", "logits")]
        if len(logits) != 1:
            raise unfit(path, "its outputs", "one called logits", ", ".join(value.name for value in graph.output[:4]))
        shape = logits[0].type.tensor_type.shape.dim
        if len(shape) != 3 or shape[1].dim_value == 1:
            raise unfit(path, "its logits", "those of every token, [batch, tokens, vocabulary]", f"{len(shape)} axes")
        widths.append(shape[2].dim_value)
    if widths[0] != widths[1]:
        raise unfit(path, "the width of the draft's logits", f"the target's {widths[0]}", str(widths[1]))


def _sections(path: Path, config: dict[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections of target and draft."""
    model = config.get("model")
    found = [model.get(name) if isinstance(model, dict) else None for name in ("decoder", "draft")]
    target, draft = found
    if not isinstance(target, dict) or not isinstance(draft, dict):
        raise unfit(path, "model.decoder and model.draft", "two sections of a decoder", type(draft).__name__)
    return target, draft


def unfit(path: Path, what: str, expected: str, found: object) -> BadInput:
    """EW-828: a folder that the runtime would refuse, or decode wrongly with."""
    return BadInput(
        "EW-828",
        f"ONNX Runtime GenAI cannot decode speculatively with this folder: {what}",
        where=path.absolute(),
        expected=expected,
        found=found,
        fix="export the pair again: edgewright export TARGET --draft DRAFT --to genai ...",
    )
