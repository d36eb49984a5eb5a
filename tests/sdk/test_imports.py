"""Loading without looking for garbage."""

from __future__ import annotations

import gc
import subprocess
import sys

from edgewright.imports import no_collection


class Loop:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_was_loaded_can_still_be_collected():
    @no_collection()
    def load() -> int:
        Loop()
        assert not gc.isenabled()
        return 1

    before = gc.get_freeze_count()
    assert load() == 1
    assert gc.isenabled() and gc.get_freeze_count() == before
    gc.collect()
    assert not any(type(each) is Loop for each in gc.get_objects())


def test_no_young_generation_is_left_to_search():
    program = """
import gc
from edgewright.imports import no_collection
with no_collection():
    kept = [[] for _ in range(100_000)]
print(len(gc.get_objects(0)) + len(gc.get_objects(1)), gc.get_freeze_count())
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(shown[0]) < 10_000 and shown[1] == "0"


def test_who_collects_by_hand_or_froze_is_left_alone():
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        with no_collection():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
