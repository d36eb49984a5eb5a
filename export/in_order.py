"""Work on several tensors at a time, and take the results one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 2
"""Items in work, or done and not yet taken. What the caller holds comes on top; each may be the largest tensor."""


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, on other cores while the caller uses the results, and never more than `AT_ONCE` items ahead of it.

    What `work` raises is raised here, in the place of its result; nothing after it is begun. It pays where the work is
    done outside Python: numpy, torch, hashes, files.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
