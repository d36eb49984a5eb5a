"""Instruction data: prompts that are read and completions that are learned, one example a line of JSON.

A row is `{"messages": [{"role", "content"}, ...]}`, or a pair `{"prompt", "completion"}` of texts or of lists of
messages; the keys can be named. Only what the assistant says is learned, with the token that ends its turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgewright.data.chat_template import NONCHARACTERS, ChatTemplate, Rendered, find_template
from edgewright.data.examples import ExampleLayout
from edgewright.data.files import Pattern, find
from edgewright.data.reading import read_records, text_bytes
from edgewright.data.source import Source
from edgewright.data.text import RawDocument, Segment
from edgewright.data.tokenizer import END_OF_TEXT, PretrainedTokenizer, SpecialTokens, special_tokens
from edgewright.paths import RecipePath

ROLES = ("system", "developer", "user", "assistant", "tool")


class InstructData(Source):
    """Prompts and completions from .jsonl files; only completions are learned."""

    not_in_tokens: ClassVar[frozenset[str]] = frozenset({"restart_at_documents", "files", "chat_template_path"})
    layout: ClassVar[ExampleLayout] = ExampleLayout()

    type: Literal["instruct"] = "instruct"
    files: Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]
    """One glob pattern or several, of .jsonl files, each also as .gz, .xz or .zst."""
    messages_key: str = "messages"
    """Key of a conversation: a list of messages with `role` and `content`."""
    prompt_key: str = "prompt"
    """Key of a pair's first half, in rows without a conversation."""
    completion_key: str = "completion"
    """Key of its second half."""
    pairs: Literal["plain", "chat"] = "plain"
    """What a pair of texts becomes. plain: prompt, completion, end of text, one right after the other. chat: a turn of
    the user and one of the assistant, through the chat template."""
    chat_template: str | None = None
    """Jinja, in the place of the tokenizer's own. What `{% generation %}` encloses is learned; without it a turn is
    what the conversation has more than the prompt for it."""
    chat_template_path: RecipePath | None = None
    """A file with that."""
    on_long: Literal["refuse", "truncate", "skip"] = "refuse"
    """An example that is longer than sequence_length: stop, cut its end off, or drop it; counted."""

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.chat_template is not None and self.chat_template_path is not None:
            raise ValueError("give one of chat_template and chat_template_path")
        return self

    @property
    def _patterns(self) -> tuple[str, ...]:
        return (self.files,) if isinstance(self.files, str) else self.files

    def fingerprint(self) -> list[object]:
        entries: list[object] = []
        for name, path in find(self._patterns):
            status = path.stat()
            entries.append([name, status.st_size, status.st_mtime_ns])
        if self.chat_template_path is not None:
            entries.append(["chat template", hashlib.sha256(self.chat_template_path.read_bytes()).hexdigest()])
        return entries

    def text_bytes(self) -> int:
        return text_bytes([path for _, path in find(self._patterns)])

    def special(self) -> SpecialTokens:
        """The special tokens of the tokenizer, which may not be there yet."""
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return special_tokens(self.tokenizer.path)
        return SpecialTokens(bos=END_OF_TEXT, eos=END_OF_TEXT, texts=(END_OF_TEXT,))

    def complete_tokenizer(self, directory: Path) -> None:
        """The recipe's template, so that the finished model has the one that it was trained with."""
        if self.chat_template is not None or self.chat_template_path is not None:
            (directory / "chat_template.jinja").write_text(self.template()[0], encoding="utf-8")

    def visible(self) -> Callable[[Segment], str]:
        special = self.special()
        return lambda segment: visible(segment, special)

    def documents(self) -> Iterator[RawDocument]:
        """Every example with its segments; the text is theirs without the special tokens.

        Raises:
            BadInput: EW-241, messages and no template. Unsafe: EW-240, EW-339, a template that does what none needs.
        """
        special = self.special()
        with ExitStack() as stack:
            reader = _Reader(self, special, stack)
            for name, path in find(self._patterns):
                for line, record, fault in read_records(path):
                    found = Rendered((), fault) if record is None else reader.read(record)
                    text = "".join(visible(segment, special) for segment in found.segments)
                    yield RawDocument(
                        f"{name}:{line}",
                        str(path),
                        line,
                        (text,),
                        fault=found.fault,
                        one_line=True,
                        segments=found.segments,
                    )

    def template(self) -> tuple[str, Path]:
        """The chat template and where it is.

        Raises:
            BadInput: EW-241, there is none.
        """
        if self.chat_template is not None:
            return self.chat_template, Path("the recipe")
        if self.chat_template_path is not None:
            return self.chat_template_path.read_text(encoding="utf-8"), self.chat_template_path
        directory = self.tokenizer.path if isinstance(self.tokenizer, PretrainedTokenizer) else Path("data.tokenizer")
        return find_template(directory)


def visible(segment: Segment, special: SpecialTokens) -> str:
    """The text of a segment without special tokens."""
    return special.pattern.sub("", segment.text) if segment.special else segment.text


class _Reader:
    """Makes segments of rows."""

    def __init__(self, config: InstructData, special: SpecialTokens, stack: ExitStack) -> None:
        self.config = config
        self.special = special
        self.stack = stack
        self.template: ChatTemplate | None = None

    def read(self, record: dict[str, Any]) -> Rendered:
        """The segments of a row, or what is wrong with it."""
        config = self.config
        tools = record.get("tools")
        if config.messages_key in record:
            return self._chat(record[config.messages_key], tools)
        missing = [key for key in (config.prompt_key, config.completion_key) if key not in record]
        if missing:
            keys = ", ".join(map(str, record)) or "none"
            return Rendered(
                (),
                f"neither {config.messages_key!r} nor {missing[0]!r} (data.messages_key, data.prompt_key, "
                f"data.completion_key); the keys are {keys}",
            )
        prompt, completion = record[config.prompt_key], record[config.completion_key]
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat([*prompt, *completion], tools)
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
            return Rendered((), f"prompt and completion are two texts, or two lists of messages, and not {kinds}")
        for name, text in ((config.prompt_key, prompt), (config.completion_key, completion)):
            if not text.strip():
                return Rendered(
                    (), f"{name!r} is empty: there would be nothing to " + ("read" if text is prompt else "learn")
                )
        if config.pairs == "chat":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._chat(turns, tools)
        start, end = self.special.bos or self.special.eos, self.special.eos
        return Rendered(
            (
                Segment(start, counted=False, special=True),
                Segment(prompt, counted=False, special=False, begins=True),
                Segment(completion, counted=True, special=False),
                Segment(end, counted=True, special=True),
            )
        )

    def _chat(self, messages: Any, tools: Any) -> Rendered:
        fault = _fault(messages)
        if fault is not None:
            return Rendered((), fault)
        if self.template is None:
            self.template = self.stack.enter_context(ChatTemplate(*self.config.template(), self.special))
        found = self.template.render(messages, tools if isinstance(tools, list) else None)
        if found.fault is None and not any(segment.counted for segment in found.segments):
            return Rendered((), "the chat template marks nothing that the assistant says")
        return found


def _fault(messages: Any) -> str | None:
    """What is wrong with a conversation."""
    if not isinstance(messages, list) or not messages:
        return "the conversation is no list of messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} is no object with a role"
        if message["role"] not in ROLES:
            return f"message {number} has the role {message['role']!r}; roles are {', '.join(ROLES)}"
        content = message.get("content")
        calls = message["role"] == "assistant" and isinstance(message.get("tool_calls"), list)
        if not isinstance(content, str) and not (content is None and calls):
            return f"the content of message {number} is no text but {type(content).__name__}"
        if isinstance(content, str) and NONCHARACTERS.search(content):
            return f"message {number} holds a Unicode noncharacter (U+FDD0 to U+FDEF)"
        if message["role"] == "assistant" and not calls and not (content or "").strip():
            return f"message {number} is of the assistant and empty: there would be nothing to learn"
    if not any(message["role"] == "assistant" for message in messages):
        return "the assistant says nothing in this conversation: there would be nothing to learn"
    return None
