"""edgewright: from a text corpus to a small language model that is proven on the device it is for.

Every verb of the command line is a function here. Nothing is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewright.bench import bench as bench
    from edgewright.check import check as check
    from edgewright.doctor import doctor as doctor
    from edgewright.evaluate import evaluate as evaluate
    from edgewright.explain import explain as explain
    from edgewright.export import export as export
    from edgewright.export.parity import verify as verify
    from edgewright.export.runtimes import open_session as open_session
    from edgewright.generate import generate as generate
    from edgewright.ls import ls as ls
    from edgewright.plan import plan as plan
    from edgewright.report import report as report
    from edgewright.run import run as run
    from edgewright.speculate import speculate as speculate

    __version__: str

__all__ = [
    "__version__",
    "bench",
    "check",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "generate",
    "ls",
    "open_session",
    "plan",
    "report",
    "run",
    "speculate",
    "verify",
]

_VERB_MODULES = frozenset(
    {
        "bench",
        "check",
        "doctor",
        "evaluate",
        "explain",
        "export",
        "generate",
        "ls",
        "plan",
        "report",
        "run",
        "speculate",
    }
)
"""Modules of this package that can be called (see `_verbs.py`)."""
_FUNCTIONS = {"verify": "edgewright.export.parity", "open_session": "edgewright.export.runtimes"}


def __getattr__(name: str) -> object:
    if name in _VERB_MODULES:
        return importlib.import_module(f"edgewright.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("edgewright")
    raise AttributeError(f"module 'edgewright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
