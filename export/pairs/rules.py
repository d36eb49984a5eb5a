"""What must be true of a target and its draft before a runtime may have them, checked before anything is written.

Each runtime checks a part of it, and not always well: transformers compares two numbers, and decodes with any draft
whose vocabulary has as many rows; llama.cpp leaves the first five tokens alone. What one of them would refuse is
refused here with its reason, and so is what one of them would take, and then draft in vain or decode wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from edgewright.errors import RecipeError
from edgewright.export.genai.config import special_tokens
from edgewright.export.genai.pair import MAX_DRAFT_TOKENS
from edgewright.export.onnx.decoder import has_windows
from edgewright.export.source import Source, open_tokenizer
from edgewright.vocabulary import first_other_token, quoted, token_table, tokens_beyond

READABLE_CACHES = frozenset({"full_attention", "sliding_attention"})
"""The kinds of layers whose cache can be cut back at all; a recurrent state cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a runtime asks of a pair."""

    runtime: str
    """Its name, for messages."""
    max_gamma: int
    """Drafted tokens per round at most."""
    spare_rows: int
    """By how many rows the two output heads may differ."""
    windows: bool
    """Whether a model whose layers see a sliding window can be cut back after a rejected token."""
    same_context: bool
    """Whether the draft's context must reach as far as the target's: what happens behind its end is not defined."""


RULES: Mapping[str, Rules] = {
    "genai": Rules(
        runtime="ONNX Runtime GenAI", max_gamma=MAX_DRAFT_TOKENS, spare_rows=0, windows=True, same_context=True
    ),
    "openvino": Rules(runtime="OpenVINO GenAI", max_gamma=64, spare_rows=0, windows=False, same_context=True),
    "gguf": Rules(runtime="llama.cpp", max_gamma=64, spare_rows=128, windows=True, same_context=False),
    "hf": Rules(runtime="transformers", max_gamma=64, spare_rows=0, windows=False, same_context=False),
}
"""By target. Only GenAI's bound for gamma is the runtime's own (1 to 16); 64 is where no draft is right any more.
Windows: GenAI's folders hold the whole cache, llama.cpp is told to (--swa-full); OpenVINO's speculative pipeline needs
paged attention, which does not know windows; the cache of transformers cannot be cut back behind one."""


def rules_of(to: str) -> Rules:
    """The rules of a target.

    Raises:
        RecipeError: EW-820, its runtime takes no drafts.
    """
    if to not in RULES:
        raise RecipeError(
            "EW-820",
            f"the target {to} takes no draft",
            expected=f"one of: {', '.join(RULES)}",
            found=to,
            fix="choose one of these, or leave out --draft; `edgewright speculate` decodes with any two exported files",
        )
    return RULES[to]


def check_pair(to: str, target: Source, draft: Source, gamma: int) -> list[str]:
    """Whether a runtime can serve this pair.

    Args:
        to: the target of the export, a key of `RULES`.
        target, draft: the two checkpoints.
        gamma: tokens that are drafted in a round.

    Returns:
        What the user should know of a pair that works, in words.

    Raises:
        RecipeError: EW-820 to EW-827, one for each cause.
        BadInput: EW-506, EW-507, llama.cpp does not know the tokenizer.
    """
    rules = rules_of(to)
    check_gamma(rules, gamma)
    notes: list[str] = []
    for rule in (_sizes, _tokens, _special, _widths, _caches, _contexts, *_OWN.get(to, ())):
        notes += rule(rules, target, draft)
    return notes


def check_gamma(rules: Rules, gamma: int) -> None:
    """Raises RecipeError (EW-822) for a gamma that the runtime does not take."""
    if not 1 <= gamma <= rules.max_gamma:
        raise RecipeError(
            "EW-822",
            f"{rules.runtime} cannot draft so many tokens in a round",
            expected=f"gamma from 1 to {rules.max_gamma}",
            found=gamma,
            fix="2 to 5 suit most pairs: --gamma 4",
        )


def parameters(source: Source) -> int:
    """Weights of a checkpoint; a tied head counts once."""
    return sum(prod(source.shape(name)) for name in source.names)


def _sizes(rules: Rules, target: Source, draft: Source) -> list[str]:
    large, small = parameters(target), parameters(draft)
    if small > large:
        raise RecipeError(
            "EW-821",
            "the draft is larger than its target",
            where=draft.directory.absolute(),
            expected=f"fewer than the target's {large:,} parameters; a tenth or less pays best",
            found=f"{small:,}",
            fix="exchange the two, or train a smaller draft",
        )
    if 2 * small > large:
        return [f"the draft has {small / large:.0%} of the target's parameters: it will hardly pay"]
    return []


def _tokens(rules: Rules, target: Source, draft: Source) -> list[str]:
    """The same text behind every id that both have."""
    ours, theirs = (token_table(source.directory) for source in (target, draft))
    other = first_other_token(ours, theirs)
    if other is not None:
        raise RecipeError(
            "EW-823",
            f"target and draft have other tokens: {rules.runtime} would take the draft's {other.id} for another text",
            where=draft.directory.absolute(),
            expected=f"token {other.id} is {quoted(other.target)}, as in the target",
            found=quoted(other.draft),
            fix="take a draft that was trained with the target's own tokenizer",
        )
    return tokens_beyond(ours, theirs)


def _special(rules: Rules, target: Source, draft: Source) -> list[str]:
    """The same tokens start and end a text, and both tokenizers add the same of them."""
    ours, theirs = special_tokens(target), special_tokens(draft)
    pairs = {
        "the token that starts a text": (ours.starts[:1], theirs.starts[:1]),
        "the tokens that end a text": (sorted(ours.ends), sorted(theirs.ends)),
        "what the tokenizer puts around a text": (_around(target), _around(draft)),
    }
    for what, (right, found) in pairs.items():
        if right != found:
            raise RecipeError(
                "EW-825",
                f"target and draft differ in {what}",
                where=draft.directory.absolute(),
                expected=f"{right}, as in the target",
                found=str(found),
                fix="copy the target's tokenizer files, generation_config.json and its bos_token_id and eos_token_id "
                "in config.json to the draft",
            )
    return []


def _around(source: Source) -> list[int]:
    """The special tokens that a checkpoint's tokenizer adds to a text."""
    tokenizer = open_tokenizer(source.directory)
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return [token for token in whole if token not in plain]


def _widths(rules: Rules, target: Source, draft: Source) -> list[str]:
    wide, narrow = (int(source.config["vocab_size"]) for source in (target, draft))
    difference = abs(wide - narrow)
    if difference > rules.spare_rows:
        most = f"at most {rules.spare_rows} rows more or fewer" if rules.spare_rows else "the same vocab_size"
        raise RecipeError(
            "EW-824",
            f"the logits of target and draft have other widths, which {rules.runtime} does not take",
            where=draft.directory.absolute(),
            expected=f"{most}: {wide:,} as the target, rows that only pad included",
            found=f"{narrow:,}",
            fix=f"pad the draft: model.resize_token_embeddings({wide}), and save it again",
        )
    return [f"logits of {wide:,} tokens in the target, of {narrow:,} in the draft"] if difference else []


def _caches(rules: Rules, target: Source, draft: Source) -> list[str]:
    for role, source in (("target", target), ("draft", draft)):
        kinds = set(source.config.get("layer_types") or ()) - READABLE_CACHES
        if kinds:
            raise _uncroppable(rules, role, source, f"layers that keep a state: {', '.join(sorted(kinds))}")
        if not rules.windows and has_windows(source):
            raise _uncroppable(rules, role, source, "layers that see the last tokens only (a sliding window)")
    return []


def _uncroppable(rules: Rules, role: str, source: Source, found: str) -> RecipeError:
    return RecipeError(
        "EW-826",
        f"{rules.runtime} cannot take back rejected tokens from the cache of this {role}",
        where=source.directory.absolute(),
        expected="full attention in every layer",
        found=found,
        fix="export the pair to gguf or genai, where a window's cache is kept whole; no runtime can cut back a state",
    )


def _contexts(rules: Rules, target: Source, draft: Source) -> list[str]:
    far, near = (int(source.config["max_position_embeddings"]) for source in (target, draft))
    if near >= far:
        return []
    if rules.same_context:
        raise RecipeError(
            "EW-827",
            f"the draft's context is shorter than the target's, and {rules.runtime} goes on behind its end",
            where=draft.directory.absolute(),
            expected=f"max_position_embeddings of at least {far}",
            found=near,
            fix=f"train the draft with a longer context, or export the pair to gguf; or set the target's to {near}",
        )
    return [f"the draft's context ends after {near:,} tokens, the target's after {far:,}: do not go beyond the former"]


def _llamacpp_vocabularies(rules: Rules, target: Source, draft: Source) -> list[str]:
    """What llama.cpp compares: the kind of vocabulary, and the flags that add special tokens."""
    from edgewright.export.gguf.vocabulary import read_vocabulary

    ours, theirs = read_vocabulary(target), read_vocabulary(draft)
    for name in ("model", "bos", "eos", "add_bos", "add_eos"):
        right, found = (_VOCABULARY[name](each) for each in (ours, theirs))
        if right != found:
            raise RecipeError(
                "EW-825",
                f"llama.cpp refuses a draft with another vocabulary: {name} differs",
                where=draft.directory.absolute(),
                expected=f"{right}, as in the target",
                found=str(found),
                fix="copy the target's tokenizer files to the draft",
            )
    return []


_VOCABULARY: Mapping[str, Callable[..., object]] = {
    "model": lambda each: each.model,
    "bos": lambda each: each.bos,
    "eos": lambda each: each.eos,
    "add_bos": lambda each: each.add_bos,
    "add_eos": lambda each: each.add_eos,
}

_OWN: Mapping[str, tuple[Callable[[Rules, Source, Source], list[str]], ...]] = {"gguf": (_llamacpp_vocabularies,)}
"""Rules of one runtime alone."""
