"""The vocabulary of a GGUF file, from a `tokenizer.json`.

Two families are known: byte-level BPE (llama.cpp's "gpt2" vocabulary) and BPE with byte fallback and a space marker,
as SentencePiece makes it (llama.cpp's "llama" vocabulary). llama.cpp has its own pre-tokenizers and knows them by
name, so a tokenizer is accepted only when its pre-tokenizer is one of those; anything else is refused, since a file
that splits text differently is not the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from edgewright.errors import BadInput
from edgewright.export.source import Source, special_ids

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

PRE_TOKENIZERS: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("gpt-2", [{"type": "ByteLevel", "use_regex": True}], False),
    ("smollm", [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], False),
    ("llama-bpe", [{"type": "Split", "regex": _LLAMA3}, {"type": "ByteLevel", "use_regex": False}], True),
    (
        "qwen2",
        [{"type": "Split", "regex": _LLAMA3.replace("{1,3}", "")}, {"type": "ByteLevel", "use_regex": False}],
        False,
    ),
]
"""llama.cpp's name of a pre-tokenizer, its steps in tokenizer.json, and whether whole words skip the merges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says about tokens."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece-style)."""
    tokens: list[str]
    types: list[TokenType]
    bos: int
    eos: int
    unknown: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    pre: str = "default"
    """llama.cpp's name of the pre-tokenizer."""
    merges: list[str] = field(default_factory=list)
    """Pairs joined by a space, for `gpt2`."""
    scores: list[float] = field(default_factory=list)
    """One per token, for `llama`."""
    add_space_prefix: bool = False

    def write(self, writer: GGUFWriter) -> None:
        """Add the tokenizer's keys to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)


def read_vocabulary(source: Source) -> Vocabulary:
    """The vocabulary of a checkpoint, padded to the width of its embedding.

    Raises:
        BadInput: EW-506, llama.cpp has no such tokenizer; EW-507, tokenizer and model contradict each other.
    """
    model = source.tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise _unknown(source, "the type of its model", "BPE", model.get("type"))
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(source, f"the setting {key!r} of its model", "none", model[key])
    tokens, types = _tokens(source, model)
    bos, eos, pad = (_special(source, kind, tokens) for kind in ("bos", "eos", "pad"))
    if eos is None:
        raise _contradiction(source, "an end-of-text token", "no eos_token_id in config.json, no eos_token")
    unknown = model.get("unk_token")
    common: dict[str, Any] = {
        "tokens": tokens,
        "bos": eos if bos is None else bos,
        "eos": eos,
        "pad": pad,
        "unknown": tokens.index(unknown) if unknown in tokens else None,
    }
    added = _added_around(source)
    common["add_bos"] = bos is not None and tokens[bos] == added[0]
    common["add_eos"] = tokens[eos] == added[1]
    if model.get("byte_fallback"):
        return _sentencepiece(source, model, types, common)
    return Vocabulary(model="gpt2", types=types, pre=_pre_tokenizer(source, model), merges=_merges(model), **common)


def _tokens(source: Source, model: dict[str, Any]) -> tuple[list[str], list[TokenType]]:
    """Token texts and types by id; ids that no token has are filled with unused ones."""
    width = int(source.config["vocab_size"])
    tokens = [f"[PAD{index}]" for index in range(width)]
    types = [TokenType.UNUSED] * width
    entries = [(text, index, TokenType.NORMAL) for text, index in model["vocab"].items()]
    for added in source.tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries.append((added["content"], added["id"], kind))
    for text, index, kind in entries:
        if not 0 <= index < width:
            raise _contradiction(source, f"ids below vocab_size {width}", f"{text!r} has id {index}")
        tokens[index], types[index] = text, kind
    if len(set(tokens)) != width:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise _contradiction(source, "tokens that differ", f"{twice!r} occurs twice")
    return tokens, types


def _merges(model: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _special(source: Source, kind: str, tokens: list[str]) -> int | None:
    ids = special_ids(source.config, source.tokenizer_config, kind, tokens)
    if any(not 0 <= index < len(tokens) for index in ids):
        raise _contradiction(source, f"{kind}_token_id below vocab_size {len(tokens)}", ids)
    return ids[0] if ids else None


def _added_around(source: Source) -> tuple[str | None, str | None]:
    """The special tokens that the tokenizer puts before and behind a text."""
    processor = source.tokenizer.get("post_processor") or {}
    parts = processor.get("processors", [processor])
    templates = [part["single"] for part in parts if part.get("type") == "TemplateProcessing"]
    template: list[dict[str, Any]] = templates[0] if templates else []
    ids = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in template]
    text = ids.index(None) if None in ids else 0
    return (ids[0] if text else None, ids[-1] if ids and ids[-1] is not None and text < len(ids) - 1 else None)


# ---------------------------------------------------------------- byte-level BPE


def _pre_tokenizer(source: Source, model: dict[str, Any]) -> str:
    """llama.cpp's name for the tokenizer's pre-tokenizer."""
    described = source.tokenizer.get("pre_tokenizer") or {}
    steps = [_step(step) for step in described.get("pretokenizers", [described])]
    for name, known, ignore_merges in PRE_TOKENIZERS:
        if steps == known and bool(model.get("ignore_merges")) == ignore_merges:
            normalizer = source.tokenizer.get("normalizer")
            if normalizer is not None and (name, normalizer) != ("qwen2", {"type": "NFC"}):
                raise _unknown(source, "its normalizer", "none", normalizer)
            return name
    raise _unknown(source, "its pre-tokenizer", f"that of {', '.join(name for name, *_ in PRE_TOKENIZERS)}", described)


def _step(step: dict[str, Any]) -> dict[str, Any]:
    """One step of a pre-tokenizer, reduced to what changes how text is split; the rest must be as usual."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return {"type": kind, "use_regex": step.get("use_regex", True)}
    if kind == "Digits":
        return {"type": kind, "individual_digits": step.get("individual_digits", False)}
    if kind == "Split" and step.get("behavior") in ("Isolated", "Removed") and "Regex" in step.get("pattern", {}):
        inverted = step["behavior"] == "Removed"
        return {"type": kind, "regex": step["pattern"]["Regex"]} if inverted == step.get("invert", False) else step
    return step


# ---------------------------------------------------------------- SentencePiece style


def _sentencepiece(source: Source, model: dict[str, Any], types: list[TokenType], common: dict[str, Any]) -> Vocabulary:
    """Scores stand for merge ranks: llama.cpp joins the pair whose result scores highest."""
    tokens: list[str] = common["tokens"]
    types = [TokenType.BYTE if _BYTE.fullmatch(token) else kind for token, kind in zip(tokens, types, strict=True)]
    if types.count(TokenType.BYTE) != 256:
        raise _unknown(source, "its byte fallback", "256 tokens from <0x00> to <0xFF>", types.count(TokenType.BYTE))
    if common["unknown"] is not None:
        types[common["unknown"]] = TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return Vocabulary(
        model="llama",
        types=types,
        scores=[-float(ranks.get(token, 0)) for token in tokens],
        add_space_prefix=_space_prefix(source),
        **common,
    )


def _space_prefix(source: Source) -> bool:
    """Whether a text gets a space in front; anything but the space marker is refused."""
    normalizer, pre = source.tokenizer.get("normalizer"), source.tokenizer.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and steps in ([prepend, replace], [replace]):
        return steps[0] == prepend
    metaspace: dict[str, Any] = pre or {}
    whole = metaspace.get("type") == "Metaspace" and not metaspace.get("split")
    if not steps and whole and metaspace["replacement"] == _SPACE:
        return metaspace.get("prepend_scheme") != "never"
    raise _unknown(source, "its normalizer and pre-tokenizer", f"a space marker {_SPACE!r}", [normalizer, pre])


def _unknown(source: Source, what: str, expected: str, found: object) -> BadInput:
    return BadInput(
        "EW-506",
        f"llama.cpp has no tokenizer like this one: {what} is unknown",
        where=(source.directory / "tokenizer.json").absolute(),
        expected=expected,
        found=str(found)[:200],
        fix="export to another target (genai), or train the model on a byte-level BPE tokenizer",
    )


def _contradiction(source: Source, expected: str, found: object) -> BadInput:
    return BadInput(
        "EW-507",
        "tokenizer and model do not belong together",
        where=source.directory.absolute(),
        expected=expected,
        found=found,
        fix="put the tokenizer files of this very model beside its weights",
    )
