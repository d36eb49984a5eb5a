"""One exception family. Every user error says where, what was expected, what was found and what to do.

The code `EW-nnn` is stable: its hundreds digit is the exit code's class, and `edgewright explain EW-nnn`
prints the long form kept in `templates/errors.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EdgewrightError(Exception):
    """A failure that the user can act on; never a bug of ours.

    Args:
        code: stable identifier, `EW-nnn`, described in the catalogue.
        what: one sentence that says what is wrong.
        where: file, `file:line:column` or recipe key.
        key: the key below a section of the recipe, of a component that does not know its place; see `in_section`.
        expected: what would have been right.
        found: what was there.
        fix: what to do about it: a command or an edit.
    """

    exit_code = 70

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str | Path | None = None,
        key: str | None = None,
        expected: object | None = None,
        found: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.key = key
        self.code = code
        self.what = what
        self.where = str(where) if where is not None else None
        self.expected = expected
        self.found = found
        self.fix = fix
        super().__init__(self.message())

    def message(self) -> str:
        """The full text as a terminal shows it."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [f"{head} [{self.code}]"]
        for label, value in (("expected", self.expected), ("found", self.found), ("fix", self.fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def place(self, section: str) -> None:
        """Say which section of the recipe it is about, where that is not known yet."""
        if self.where is None:
            self.where = section if self.key is None else f"{section}.{self.key}"
            self.args = (self.message(),)

    def to_json(self) -> dict[str, object]:
        """The same as an object for `--json`."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "expected": None if self.expected is None else str(self.expected),
            "found": None if self.found is None else str(self.found),
            "fix": self.fix,
        }


class RecipeError(EdgewrightError):
    """The command line or the recipe is wrong (exit 2)."""

    exit_code = 2


class BadInput(EdgewrightError):
    """A file that was handed in cannot be used (exit 3)."""

    exit_code = 3


class OutOfResources(EdgewrightError):
    """Disk or memory ran out (exit 4)."""

    exit_code = 4


class GateFailed(EdgewrightError):
    """An exported file is not the model it was made from (exit 5)."""

    exit_code = 5


class Locked(EdgewrightError):
    """Another process works in this run directory (exit 6)."""

    exit_code = 6


class Diverged(EdgewrightError):
    """Training produced non-finite values again and again (exit 7)."""

    exit_code = 7


class Unsafe(EdgewrightError):
    """Refused for safety: code or pickles in what should be data (exit 8)."""

    exit_code = 8


class NeedsNetwork(EdgewrightError):
    """Something would have to be downloaded, and nobody asked for that (exit 9)."""

    exit_code = 9


class RecipeErrors(RecipeError):
    """All errors of a recipe at once."""

    def __init__(self, errors: list[RecipeError]) -> None:
        self.errors = errors
        super().__init__(errors[0].code, "\n".join(error.message() for error in errors))

    def message(self) -> str:
        return self.what

    def place(self, section: str) -> None:
        for error in self.errors:
            error.place(section)
        self.what = "\n".join(error.message() for error in self.errors)
        self.args = (self.what,)

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "exit_code": self.exit_code, "errors": [error.to_json() for error in self.errors]}


@contextmanager
def in_section(section: str) -> Iterator[None]:
    """Errors that leave the block and do not say where they are, are in this section of the recipe."""
    try:
        yield
    except EdgewrightError as error:
        error.place(section)
        raise
