"""Chat templates: from a conversation to text in which every character is known to be the assistant's or not.

A template is Jinja that came with a model. It is checked (`guard.template`), and rendered by a process of its own
(`chat_render`) in Jinja's immutable sandbox with limits of time, memory and output. Special tokens that people wrote
into their messages are put aside before and come back as plain text, so that nobody can speak in another's name.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgewright.data.text import Segment
from edgewright.data.tokenizer import SpecialTokens
from edgewright.errors import BadInput, Unsafe

SECONDS = 1.5
"""Of processor time, for one conversation: a busy machine stops nobody."""
GIVEN_UP = 60.0
"""Seconds without an answer, after which the process is ended: it stops by itself long before."""
CHARACTERS = 4 * 2**20
"""Of one rendered conversation."""
_ASIDE = re.compile("\ufdd0([0-9]+)\ufdd1")
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
"""What no text holds; messages with them are refused."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as segments, or why there are none."""

    segments: tuple[Segment, ...]
    fault: str | None = None


class ChatTemplate:
    """Renders conversations; to be used as a context, since it holds a process.

    Args:
        template: Jinja.
        place: where it came from, for messages.
        special: of the tokenizer.

    Raises:
        Unsafe: EW-339, it is no chat template.
    """

    def __init__(self, template: str, place: Path, special: SpecialTokens) -> None:
        from edgewright.export.guard.template import check_template

        check_template(place, "data", template.encode("utf-8", "surrogatepass"))
        self.template = template
        self.place = place
        self.special = special
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def render(self, messages: list[Any], tools: list[Any] | None) -> Rendered:
        """The segments of a conversation.

        Raises:
            Unsafe: EW-240, a limit of the sandbox was reached.
        """
        aside: list[str] = []
        asked = _put_aside({"messages": messages, "tools": tools}, self.special.pattern, aside)
        return self._segments(self._ask(asked), aside)

    def _ask(self, conversation: dict[str, Any]) -> dict[str, Any]:
        process = self._process or self._begin()
        assert process.stdin is not None and process.stdout is not None
        line = ""
        try:
            process.stdin.write(json.dumps(conversation) + "\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], GIVEN_UP)[0]:
                line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._end()
            raise self._limit("the process that renders it had to be ended", None)
        answer: dict[str, Any] = json.loads(line)
        if answer.get("limit"):
            raise self._limit(answer["error"], answer["line"])
        return answer

    def _begin(self) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("chat_render.py")
        process = subprocess.Popen(
            [sys.executable, "-I", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={},
        )
        assert process.stdin is not None
        variables = {"bos_token": self.special.bos or "", "eos_token": self.special.eos, "pad_token": self.special.eos}
        settings = {
            "template": self.template,
            "variables": variables,
            "special": list(self.special.texts),
            "seconds": SECONDS,
            "characters": CHARACTERS,
        }
        process.stdin.write(json.dumps(settings) + "\n")
        self._process = process
        return process

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was not sent yet has nobody to read it
                continue
        self._process = None

    def _limit(self, what: str, line: int | None) -> Unsafe:
        return Unsafe(
            "EW-240",
            "the chat template was stopped" + (f" in line {line}" if line else ""),
            where=self.place.absolute(),
            expected=f"a conversation rendered within {SECONDS:g} seconds, {CHARACTERS:,} characters and 512 MB",
            found=what,
            fix="take the template of the model's original publisher, or write a shorter one: data.chat_template",
        )

    def _segments(self, answer: dict[str, Any], aside: list[str]) -> Rendered:
        if "error" in answer:
            at = f" (line {answer['line']} of it)" if answer["line"] else ""
            return Rendered((), f"the chat template does not take it{at}: {answer['error']}")
        text = answer["text"]
        spans = answer["spans"] if answer["tracked"] else [self._turn(text, *span) for span in answer["spans"]]
        if spans and not self._ends(text):
            text = text[: max(len(text.rstrip()), spans[-1][1] if answer["tracked"] else 0)]
            spans[-1] = (spans[-1][0], min(spans[-1][1], len(text)))
            ended = spans[-1][1] == len(text)
        else:
            ended = False
        segments = list(_cut(text, spans, aside))
        if ended:
            segments.append(Segment(self.special.eos, counted=True, special=True))
        return Rendered(tuple(segments))

    def _ends(self, text: str) -> bool:
        """Whether the last that is no white space is a special token."""
        return text.rstrip().endswith(self.special.texts)

    def _turn(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Without the white space after the token that ends the turn: the model stops there and never writes it."""
        turn = text[start:end]
        stripped = turn.rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self.special.texts) else (start, end)


def _put_aside(value: Any, special: re.Pattern[str], aside: list[str]) -> Any:
    """A copy in which every special token that stands in a text is a mark."""
    if isinstance(value, str):

        def mark(found: re.Match[str]) -> str:
            aside.append(found.group())
            return f"\ufdd0{len(aside) - 1}\ufdd1"

        return special.sub(mark, value)
    if isinstance(value, dict):
        return {key: inner if key == "role" else _put_aside(inner, special, aside) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put_aside(inner, special, aside) for inner in value]
    return value


def _cut(text: str, spans: Sequence[tuple[int, int]], aside: list[str]) -> Iterator[Segment]:
    """Segments: the spans count; what was put aside comes back as plain text."""
    borders = [0, *(border for span in spans for border in span), len(text)]
    for number, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        for index, part in enumerate(_ASIDE.split(text[start:end])):
            if part:
                plain = index % 2 == 1
                yield Segment(aside[int(part)] if plain else part, counted=number % 2 == 1, special=not plain)


def find_template(directory: Path) -> tuple[str, Path]:
    """The chat template of a tokenizer's directory, and the file that it is in.

    Raises:
        BadInput: EW-241, there is none.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), file
    file = directory / "tokenizer_config.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((each["template"] for each in found if each.get("name") == "default"), None)
        if isinstance(found, str):
            return found, file
    raise BadInput(
        "EW-241",
        "there is no chat template for these messages",
        where=directory.absolute(),
        expected="chat_template.jinja, or chat_template in tokenizer_config.json",
        fix="give one in the recipe, data.chat_template or data.chat_template_path; pairs of texts need none "
        "(data.pairs: plain)",
    )
