"""Renders a chat template in a process of its own, which is all that a stranger's template can reach.

    python -I chat_render.py

One JSON object a line comes in: first `{"template", "variables", "special", "seconds", "characters"}`, then
conversations `{"messages", "tools"}`. For each a line goes out: `{"text", "spans", "tracked"}` - the characters of the
assistant's turns - or `{"error", "line"}`, the template's line. The sandbox is Jinja's immutable one; time, output and
memory are limited. Nothing of edgewright is imported here.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 * 2**20
"""Address space beyond which the process gets no more: a template that doubles a string ends in a MemoryError."""
TODAY = "26 Jul 2024"
"""What `strftime_now` gives whatever the format: the same corpus must give the same tokens tomorrow."""
BEGIN, END = "\ufdd2", "\ufdd3"
"""Noncharacters around what `{% generation %}` encloses; messages with such are refused before."""


class Limit(Exception):
    """A limit of the sandbox was reached."""


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes, as in transformers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


class Renderer:
    """A compiled template with its limits.

    Args:
        template: Jinja.
        variables: such as bos_token.
        special: the special tokens.
        characters: that a conversation may become.
    """

    def __init__(self, template: str, variables: dict[str, str], special: list[str], characters: int) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: TODAY}
        self.template = environment.from_string(template)
        self.variables = variables
        self.special = special
        self.characters = characters

    def render(self, messages: list[Any], tools: Any, *, prompt: bool) -> str:
        """The text of a conversation; with `prompt` what comes before the assistant's next turn."""
        parts, length = [], 0
        settings = {"tools": tools, "documents": None, "add_generation_prompt": prompt}
        stream = self.template.generate(messages=messages, **settings, **self.variables)
        for part in stream:
            parts.append(part)
            length += len(part)
            if length > self.characters:  # thrown in there, so that the traceback has the template's line
                cast(Generator[str, None, None], stream).throw(Limit(f"over {self.characters:,} characters come out"))
        return "".join(parts)

    def conversation(self, messages: list[Any], tools: Any) -> dict[str, Any]:
        """Text and the characters of the assistant's turns."""
        text = self.render(messages, tools, prompt=False)
        if BEGIN in text:
            return _unmarked(text)
        spans = list(self._spans(text, messages, tools))
        return {"text": text, "spans": spans, "tracked": False}

    def _spans(self, text: str, messages: list[Any], tools: Any) -> Iterator[tuple[int, int]]:
        """A turn is what the conversation up to it has more than the prompt for it."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], tools, prompt=True)
            after = self.render(messages[: number + 1], tools, prompt=False)
            end = _common(text, after)
            if not text.startswith(before) or end <= len(before) or self._speaks(after[end:]):
                raise TemplateError(
                    f"message {number + 1}: the conversation does not begin with the prompt that the model would get "
                    "and its answer, so the turn cannot be found; a template with {% generation %} tells where it is"
                )
            yield len(before), end

    def _speaks(self, rest: str) -> bool:
        """Whether there is more in it than tokens that end a turn."""
        for token in self.special:
            rest = rest.replace(token, "")
        return bool(rest.strip())


def _common(left: str, right: str) -> int:
    """Characters that two texts begin with."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(index for index in range(length) if left[index] != right[index])


def _unmarked(text: str) -> dict[str, Any]:
    parts, spans, length = [], [], 0
    for number, part in enumerate(text.replace(END, BEGIN).split(BEGIN)):
        if number % 2 and part:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return {"text": "".join(parts), "spans": spans, "tracked": True}


def _line(error: BaseException) -> int | None:
    """The template's line in which it happened: jinja rewrites tracebacks so that they name it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return getattr(error, "lineno", None) or (lines[-1] if lines else None)


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise Limit("it takes too long")


def main() -> None:
    """Read conversations until there are no more."""
    settings = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGPROF, _too_long)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    renderer: Renderer | None = None
    problem: dict[str, Any] = {}
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
        try:
            if renderer is None:
                renderer = Renderer(
                    **{name: settings[name] for name in ("template", "variables", "special", "characters")}
                )
            request = json.loads(line)
            answer = renderer.conversation(request["messages"], request["tools"])
        except (Exception, MemoryError) as error:  # whatever a template does, the process goes on with the next one
            what = "memory ran out" if isinstance(error, MemoryError) else f"{error or type(error).__name__}"
            problem = {"error": what[:500], "line": _line(error), "limit": isinstance(error, (Limit, MemoryError))}
            answer = problem
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
