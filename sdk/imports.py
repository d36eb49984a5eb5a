"""Loading the large libraries, quickly."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast


@contextmanager
def no_collection() -> Iterator[None]:
    """Load modules without looking for garbage in between, and without looking through them soon after.

    What modules define stays until the process ends, and each search goes through all of it again: with torch and
    transformers a third of the time that they take to load. Also a decorator.
    """
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            if not gc.get_freeze_count():  # else whoever froze objects would find them thawed
                gc.freeze()
                gc.unfreeze()  # all that is new joins the oldest generation, which is searched last
            gc.enable()


@contextmanager
def importing_bitsandbytes() -> Iterator[None]:
    """Import bitsandbytes, or what imports it, inside.

    With the package `kernels` it would fetch code from a hub and run it: it does without, and its warning that it has
    to is not shown. And the tables that it makes are real tensors, also where a step is being simulated without memory.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, quiet = sys.modules.get("kernels"), logger.disabled
    sys.modules["kernels"] = cast(ModuleType, None)  # so that importing it fails
    logger.disabled = True
    try:
        with unset_fake_temporarily():
            yield
    finally:
        logger.disabled = quiet
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before
