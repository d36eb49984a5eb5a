"""Options of the command line that several commands share, or that come in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Speculative = Annotated[bool, typer.Option("--speculative", help="Will a draft pay? Measures here, about a minute.")]
Runtimes = Annotated[list[str] | None, typer.Option(help="Of the target's files; may be given several times.")]
Quants = Annotated[list[str] | None, typer.Option(help="Their widths; may be given several times.")]
Draft = Annotated[Path | None, typer.Option(help="The draft; by default random ones of a few sizes.")]
Acceptance = Annotated[
    str | None, typer.Option(help="Of the draft: 0.7, or by position 0.8,0.7,0.6; by default draft.json's.")
]
Gamma = Annotated[int | None, typer.Option(help="Tokens drafted a round; by default the best.")]


def shares(text: str | None) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--acceptance takes numbers with commas between them, not {text!r}") from None


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers with commas between them, not {text!r}") from None
