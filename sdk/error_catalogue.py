"""Every error code with its exit code, its title and its long form, read from `templates/errors.md`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

_HEADING = re.compile(r"^## (EW-\d{3}) \(exit code (\d+)\): (.+)$", re.MULTILINE)


class Entry(NamedTuple):
    """What a code means."""

    exit_code: int
    title: str
    text: str


@cache
def catalogue() -> dict[str, Entry]:
    """All codes in the order of the file."""
    text = (files("edgewright") / "templates" / "errors.md").read_text(encoding="utf-8")
    headings = list(_HEADING.finditer(text))
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    entries = {}
    for heading, end in zip(headings, ends, strict=True):
        code, exit_code, title = heading.groups()
        prose = re.split(r"^# ", text[heading.end() : end], flags=re.MULTILINE)[0]
        entries[code] = Entry(int(exit_code), title, " ".join(prose.split()))
    return entries
