"""How a bundle is laid out for each runtime, and what the files themselves must say so that it can be opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.export.genai.pair import GENAI_CONFIG, check_genai_pair, check_logits, unfit
from edgewright.export.guard import read_json
from edgewright.export.runtimes.spinning import STOP_SPINNING
from edgewright.export.tokenizer_files import BESIDE, SETTINGS
from edgewright.files import write_json


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the two models lie in a bundle: each is an artifact of its own."""

    target: str
    draft: str
    arrange: Callable[[Path, int], None]
    """Joins the two, once both are in their places: folder of the bundle, gamma."""


def layout_of(to: str, *, quant: str, draft_quant: str) -> Layout:
    """The layout of a target.

    Args:
        to: a key of `RULES`.
        quant, draft_quant: the widths, which are in the names of GGUF files.
    """
    names = {"gguf": (f"target-{quant}.gguf", f"draft-{draft_quant}.gguf")}
    target, draft = names.get(to, ("target", "draft"))
    return Layout(target, draft, _ARRANGE.get(to, _leave))


def _leave(place: Path, gamma: int) -> None:
    """Two models side by side are all there is."""


def _arrange_genai(place: Path, gamma: int) -> None:
    """Write the genai_config.json of the whole: the target's, with the draft's decoder section, and the tokenizer
    beside it. Each of the two folders can still be opened by itself."""
    config: Any = read_json(place / "target" / GENAI_CONFIG)
    other: Any = read_json(place / "draft" / GENAI_CONFIG)
    shares = [each["search"][SHARED] for each in (config, other)]
    if shares[0] != shares[1]:
        raise unfit(place / GENAI_CONFIG, f"search.{SHARED} of the draft", str(shares[0]), str(shares[1]))
    target, draft = config["model"]["decoder"], other["model"]["decoder"]
    for name, section in (("target", target), ("draft", draft)):
        section["filename"] = f"{name}/{section['filename']}"
    target["session_options"] |= STOP_SPINNING
    draft["session_options"] = target["session_options"]
    config["model"]["draft"] = draft
    config["speculative"] = {"max_draft_tokens": gamma}
    config["search"]["no_repeat_ngram_size"] = 0
    for file in sorted((place / "target").iterdir()):
        if file.name in TOKENIZER:
            shutil.copyfile(file, place / file.name)
    write_json(place / GENAI_CONFIG, config)
    check_genai_pair(place)
    check_logits(place)


SHARED = "past_present_share_buffer"
"""Whether attention writes into the cache that it is given: one setting for both models, which depends on the graph."""

TOKENIZER = frozenset({"tokenizer.json", SETTINGS, *BESIDE})
"""The files of a tokenizer in a folder of ours."""


def _arrange_openvino(place: Path, gamma: int) -> None:
    """Two folders side by side, if the pipeline can open both as a pair."""
    from edgewright.export.openvino.paging import check_paging

    for role in ("target", "draft"):
        check_paging(place / role, role)


def _arrange_hf(place: Path, gamma: int) -> None:
    """Let transformers draft exactly gamma tokens: its settings are the draft's."""
    path = place / "draft" / "generation_config.json"
    settings: dict[str, Any] = read_json(path) if path.exists() else {}
    settings |= {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    write_json(path, settings)


_ARRANGE: Mapping[str, Callable[[Path, int], None]] = {
    "genai": _arrange_genai,
    "hf": _arrange_hf,
    "openvino": _arrange_openvino,
}
