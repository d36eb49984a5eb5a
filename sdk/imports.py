"""Loading the large libraries, quickly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
