"""The pre-check of chat templates: Jinja text that comes with a model and that a library renders.

Rendering happens in the libraries' sandboxes; those are the boundary. What is refused here is what no chat template
needs and every attack so far did.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgewright.errors import Unsafe
from edgewright.export.guard.files import printable

MAX_TEMPLATE_BYTES = 2**20
_FORBIDDEN = re.compile(
    rb"\{%[-+]?\s*(?:include|import|extends|from)\b"
    rb"|__(?:class|mro|base|bases|subclasses|globals|builtins|import|init|getattribute|code|dict|module|reduce)__"
)


def check_template(path: Path, place: str, template: bytes) -> None:
    """Refuse a chat template that reads other files, walks Python's attributes, or is huge.

    Args:
        path: the file that holds it.
        place: where in the file, for the message.
        template: its text.

    Raises:
        Unsafe: EW-339 names file, place and line.
    """
    found = _FORBIDDEN.search(template[:MAX_TEMPLATE_BYTES])
    if found is None and len(template) <= MAX_TEMPLATE_BYTES:
        return
    line = template.count(b"\n", 0, found.start()) + 1 if found else None
    raise Unsafe(
        "EW-339",
        f"the chat template in {place} is no chat template" + (f": line {line}" if line else ""),
        where=path.absolute(),
        expected=f"text of at most {MAX_TEMPLATE_BYTES} bytes that loads nothing and touches no internals",
        found=printable(found.group()) if found else f"at least {len(template)} bytes",
        fix="take the template of the model's original publisher, or remove it",
    )
