"""OpenVINO's packages, loaded so that they stay silent.

`import openvino` alone reports itself to its vendor over the network, through the package openvino_telemetry, and keeps
an identifier in the home directory. The vendor's code has a stub for the case that this package is not installed; that
is what it gets here.

The CPU plugin puts a signal stack of its own, of three pages, under the thread that loads it, and gives the memory
back when it is unloaded, by whichever thread. Python runs its handlers on that stack: SIGTERM or SIGINT then ends the
process with a segmentation fault, in a training run long after. `own_signal_stack` keeps the thread's.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgewright.errors import BadInput

_TELEMETRY = "openvino_telemetry"


def load(package: str = "openvino") -> Any:
    """Import one of OpenVINO's packages without its telemetry.

    Args:
        package: `openvino`, `openvino_genai` or `openvino_tokenizers`.

    Raises:
        BadInput: EW-603, it is not installed.
    """
    # In Python, None as a module means: there is no such package.
    sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise BadInput(
            "EW-603",
            f"OpenVINO is not installed: there is no {error.name}",
            expected="the packages of the extra `openvino`",
            found=f"no {error.name}",
            fix="pip install 'edgewright[openvino]'",
        ) from error


class _Stack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def own_signal_stack() -> Iterator[None]:
    """Around what may load the CPU plugin: this thread's alternate signal stack, or that it has none, is kept."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
