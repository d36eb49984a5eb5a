"""The live panel on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel as Box
from rich.progress_bar import ProgressBar
from rich.table import Table


class Panel:
    """One box that is redrawn in place: progress bar and the newest line of figures."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)

    def __enter__(self) -> Panel:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, value, traceback)

    def update(self, name: str, step: int, total: int, line: str) -> None:
        """Show step `step` of `total`."""
        grid = Table.grid(expand=True)
        grid.add_row(ProgressBar(total=total, completed=step))
        grid.add_row(line)
        self._live.update(Box(grid, title=f"edgewright: {name}", border_style="cyan"))
