"""What the command line writes: results as one JSON object, failures in the form that was asked for."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from typing import TYPE_CHECKING

from typer.exceptions import TyperException

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgewright.errors import EdgewrightError

BUG = 70


def failed(error: BaseException, as_json: bool) -> int:
    """Report what went wrong, in the form that was asked for; the exit code."""
    from edgewright.errors import EdgewrightError, OutOfResources, RecipeError

    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, BrokenPipeError):  # whoever read our output has gone; typer makes an exit of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    if isinstance(error, KeyboardInterrupt):
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    if isinstance(error, TyperException):
        fix = "edgewright --help, or --help after a command, lists what there is"
        error = RecipeError("EW-100", f"this command line is not understood: {error.format_message()}", fix=fix)
    if isinstance(error, MemoryError):
        fix = "use a smaller batch, sequence_length or model, or a machine with more memory"
        error = OutOfResources("EW-404", "memory ran out", fix=fix)
    if isinstance(error, EdgewrightError):
        return _report(error, as_json)
    return _bug(error, as_json)


def _report(error: EdgewrightError, as_json: bool) -> int:
    print(error.message(), file=sys.stderr)
    if as_json:
        print_json({"schema_version": 1, "error": error.to_json()})
    return error.exit_code


def _bug(error: BaseException, as_json: bool) -> int:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    print(
        f"edgewright: a bug of ours: {text}\n  fix: the same command with --debug shows the traceback", file=sys.stderr
    )
    if as_json:
        found: dict[str, object] = {"code": None, "exit_code": BUG, "what": text}
        print_json({"schema_version": 1, "error": found})
    return BUG


def print_json(value: object) -> None:
    """One object on standard output."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False), flush=True)


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_line(line: str) -> None:
    """Tell about progress."""
    print(line, file=sys.stderr, flush=True)


def progress(what: str) -> Callable[[int, int], None] | None:
    """Tells how far a measurement is, on a terminal alone."""
    if not sys.stderr.isatty():
        return None
    return lambda done, of: print(f"\r{what} {done} of {of}", end="\n" if done == of else "", file=sys.stderr)
