"""The vocabulary of a GGUF file, from a `tokenizer.json`.

Two families are known: byte-level BPE (llama.cpp's "gpt2" vocabulary) and BPE with byte fallback and a space marker,
as SentencePiece makes it (llama.cpp's "llama" vocabulary, or "gemma4" where only some merges exist). llama.cpp has its
own pre-tokenizers and knows them by name, so a tokenizer is accepted only when its pre-tokenizer is one of those;
anything else is refused, since a file that splits text differently is not the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gguf import GGUFWriter, TokenType

from edgewright.errors import BadInput
from edgewright.export.source import Source, special_ids

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    """The rule of OpenAI's newer tokenizers: words end where a capital follows a small letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES


_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_BYTES = {"type": "ByteLevel", "use_regex": False}
_GPT2 = {"type": "ByteLevel", "use_regex": True}

PRE_TOKENIZERS: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("gpt-2", [_GPT2], False),
    ("smollm", [{"type": "Digits", "individual_digits": True}, _GPT2], False),
    ("llama-bpe", [{"type": "Split", "regex": _LLAMA3}, _BYTES], True),
    ("dbrx", [{"type": "Split", "regex": _LLAMA3}, _BYTES], False),
    ("qwen2", [{"type": "Split", "regex": _LLAMA3.replace("{1,3}", "")}, _BYTES], False),
    (
        "qwen35",
        [
            {
                "type": "Split",
                "regex": _CONTRACTIONS
                + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
                + _SPACES,
            },
            _BYTES,
        ],
        False,
    ),
    ("gpt-4o", [{"type": "Split", "regex": _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")}, _BYTES], False),
    ("tekken", [{"type": "Split", "regex": _cased("", r"\p{N}")}, _BYTES], True),
]
"""llama.cpp's name of a pre-tokenizer, its steps in tokenizer.json, and whether whole words skip the merges."""

_CASED_NOTE = dict.fromkeys(
    ("gpt-4o", "tekken"),
    "llama.cpp's rule for this tokenizer knows no combining marks and only the capitals A to Z: Hindi, decomposed "
    "accents or words with capitals inside may be split otherwise",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says about tokens."""

    model: str
    """`gpt2` (byte-level BPE), `llama` (SentencePiece-style) or `gemma4` (likewise, by merges)."""
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
    other_ends: list[int] = field(default_factory=list)
    """Further tokens that end a text: of a turn, of a message."""
    chat_template: str | list[dict[str, str]] | None = None
    """Jinja, or several by their names."""
    note: str | None = None
    """Where llama.cpp splits text otherwise than the checkpoint's tokenizer, and nothing can be done."""

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
        for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), self.other_ends, strict=False):
            add(token)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


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
    bos, pad = (next(iter(_special(source, kind, tokens)), None) for kind in ("bos", "pad"))
    ends = _special(source, "eos", tokens)
    if not ends:
        raise _contradiction(source, "an end-of-text token", "no eos_token_id in config.json, no eos_token")
    unknown = model.get("unk_token")
    common: dict[str, Any] = {
        "tokens": tokens,
        "bos": ends[0] if bos is None else bos,
        "eos": ends[0],
        "pad": pad,
        "unknown": tokens.index(unknown) if unknown in tokens else None,
        "other_ends": ends[1:],
        "chat_template": _chat_template(source),
    }
    added = _added_around(source)
    common["add_bos"] = bos is not None and tokens[bos] == added[0]
    common["add_eos"] = tokens[ends[0]] == added[1]
    if model.get("byte_fallback"):
        return _sentencepiece(source, model, types, common)
    pre = _pre_tokenizer(source, model)
    merges = _merges(model)
    return Vocabulary(model="gpt2", types=types, pre=pre, merges=merges, note=_CASED_NOTE.get(pre), **common)


def _tokens(source: Source, model: dict[str, Any]) -> tuple[list[str], list[TokenType]]:
    """Token texts and types by id; ids that no token has are filled with unused ones."""
    width = int(source.config["vocab_size"])
    tokens = [f"[PAD{index}]" for index in range(width)]
    types = [TokenType.UNUSED] * width
    entries = [(text, index, TokenType.NORMAL) for text, index in model["vocab"].items()]
    for added in source.tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries.append((added["content"], added["id"], kind))
        greedy = [key for key in ("single_word", "lstrip", "rstrip") if added.get(key)]
        if greedy and not added["special"]:
            raise _unknown(source, f"{greedy[0]!r} of the added token {added['content']!r}", "false", True)
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


def _special(source: Source, kind: str, tokens: list[str]) -> list[int]:
    ids = special_ids(source.config, source.tokenizer_config, kind, tokens)
    if any(not 0 <= index < len(tokens) for index in ids):
        raise _contradiction(source, f"{kind}_token_id below vocab_size {len(tokens)}", ids)
    return ids


def _chat_template(source: Source) -> str | list[dict[str, str]] | None:
    """How a conversation becomes text: the file beside the tokenizer counts, as in transformers."""
    path = source.directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found: str | list[dict[str, str]] | None = source.tokenizer_config.get("chat_template")
    return found


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
    merges = _merges(model)
    prefix, note = _space_prefix(source)
    if not _pieces_tell(merges, model["vocab"]):
        if prefix or any("\n" in merge.strip("\n").replace(" ", "") for merge in merges):
            raise _unknown(source, "its merges", "a merge for every pair of tokens that makes up a token", "fewer")
        return Vocabulary(model="gemma4", pre="gemma4", types=types, merges=merges, **common)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return Vocabulary(
        model="llama",
        types=types,
        scores=[-float(ranks.get(token, 0)) for token in tokens],
        add_space_prefix=prefix,
        note=note,
        **common,
    )


def _pieces_tell(merges: list[str], vocab: dict[str, int]) -> bool:
    """Whether tokens alone say what is joined: any two that make up a third are, in the order of the thirds.

    So it is where the merges were derived from a SentencePiece model; then llama.cpp, which looks at tokens only, and
    the merges lead to the same result.
    """
    pairs = {tuple(merge.split(" ")) for merge in merges}
    results = ["".join(merge.split(" ")) for merge in merges]
    in_order = len(set(results)) == 1 + sum(one != other for one, other in pairwise(results)) if results else True
    return in_order and all(
        (token[:cut], token[cut:]) in pairs
        for token in set(results)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )


def _space_prefix(source: Source) -> tuple[bool, str | None]:
    """Whether a text gets a space in front, and what llama.cpp does otherwise; anything but that is refused."""
    normalizer, pre = source.tokenizer.get("normalizer"), source.tokenizer.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if steps in ([prepend, replace], [replace]) and (pre is None or _splits_nothing(pre)):
        return steps[0] == prepend, None
    metaspace: dict[str, Any] = pre or {}
    whole = metaspace.get("type") == "Metaspace" and not metaspace.get("split")
    if not steps and whole and metaspace["replacement"] == _SPACE:
        if metaspace.get("prepend_scheme") == "never":
            return False, None
        return True, "a text that begins with a space gets another space in front, where the checkpoint's keeps one"
    raise _unknown(source, "its normalizer and pre-tokenizer", f"a space marker {_SPACE!r}", [normalizer, pre])


def _splits_nothing(pre: dict[str, Any]) -> bool:
    """Gemma splits at spaces, of which none are left when it comes to that."""
    return pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}


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
