"""A session without a model, for tests: counts up through the vocabulary, and a bench worker that serves it.

Run as a script it is the process that `bench` starts; a file's name decides how it behaves.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgewright.bench_worker import private_stdout, serve
from edgewright.errors import BadInput
from edgewright.export.runtimes.session import Capabilities, Logits, Session

VOCABULARY = 300
LETTERS = "abcdefghij"


class CountingSession(Session):
    """The next token is always the last one plus one; token i is the letter i mod 10; 299 ends a text."""

    runtime = "fake"
    vocab_size = VOCABULARY
    context_length = 100
    capabilities = Capabilities(logits=True, rewind=True, fp32_compute=True)
    start_id = 0
    eos_ids = frozenset({299})

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path = path
        self.threads = threads
        self.cache: list[int] = []
        self.calls: list[tuple[int, int]] = []
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.cache)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        self.calls.append((len(self.cache), len(tokens)))
        self.cache.extend(tokens)
        if logits == "none":
            return None
        rows = np.zeros((len(tokens), VOCABULARY), dtype=np.float32)
        rows[np.arange(len(tokens)), (np.asarray(tokens) + 1) % VOCABULARY] = 1.0
        return rows if logits == "all" else rows[-1:]

    def rewind(self, length: int) -> None:
        del self.cache[length:]

    def native_generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        draft: Session | None = None,
    ) -> list[int]:
        new: list[int] = []
        last = tokens[-1]
        while len(new) < max_new_tokens and last + 1 not in self.eos_ids:
            last += 1
            new.append(last)
        return new

    def tokenize(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(LETTERS[token % 10] for token in tokens)

    def memory(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True


class CrashingSession(CountingSession):
    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)


class PrintingSession(CountingSession):
    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        os.write(1, b"a runtime prints to stdout\n")
        return super().append(tokens, logits)


class SlowSession(CountingSession):
    """10 ms for every token."""

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        time.sleep(0.01 * len(tokens))
        return super().append(tokens, logits)


class JumpySession(CountingSession):
    """2 ms for every token, in every second test of generation 20."""

    tests = 0

    def rewind(self, length: int) -> None:
        super().rewind(length)
        self.tests += 1

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        time.sleep(0.02 if self.tests % 4 == 0 else 0.002)
        return super().append(tokens, logits)


class BigSession(CountingSession):
    """Holds 200 MB."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        super().__init__(path, threads=threads)
        self.weights = np.ones(50_000_000, dtype=np.float32)


class BusySession(CountingSession):
    """Has a thread that never sleeps."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        import threading

        super().__init__(path, threads=threads)
        threading.Thread(target=self._spin, daemon=True).start()

    def _spin(self) -> None:
        while not self.closed:
            sum(range(1000))


class RefusedSession(CountingSession):
    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        raise BadInput("EW-603", "a package is missing", where=path, fix="pip install it")


BEHAVIOURS = {
    "counting": CountingSession,
    "crashing": CrashingSession,
    "printing": PrintingSession,
    "slow": SlowSession,
    "jumpy": JumpySession,
    "big": BigSession,
    "busy": BusySession,
    "refused": RefusedSession,
}


def open_fake(path: Path, *, threads: int | None = None) -> CountingSession:
    """Open the session that the file's name asks for."""
    log = os.environ.get("FAKE_SESSION_LOG")
    session = BEHAVIOURS[path.stem](path, threads=threads)
    if log is not None:
        _log_rounds(session, Path(log))
    return session


def _log_rounds(session: CountingSession, log: Path) -> None:
    """Write one line for each prompt test: the order in which processes were asked."""
    rewind = session.rewind

    def logged(length: int) -> None:
        if session.length != 0 or not session.calls:
            with log.open("a") as file:
                file.write(f"{session.path.stem} {session.threads} {session.length}\n")
        rewind(length)

    session.rewind = logged  # type: ignore[method-assign]


if __name__ == "__main__":
    replies = private_stdout()
    serve(open_fake, sys.stdin, replies)
