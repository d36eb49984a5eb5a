"""The process that holds one artifact while `edgewright bench` measures it.

It imports the Session interface and nothing else, so that its memory is the runtime's own and not the measurer's.
One JSON object per line on stdin is a request, one per line on stdout is its reply; whatever a runtime prints goes to
stderr. Requests: `{"do": "open", "path", "threads", "prompt", "generate", "loop"}` once, then `{"do": "round"}` as
often as wanted. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from edgewright.errors import BadInput, EdgewrightError
from edgewright.machine import peak_memory, resident_memory

if TYPE_CHECKING:
    import numpy as np

    from edgewright.export.runtimes.session import Session

OpenSession = Callable[..., "Session"]
Request = dict[str, object]
Reply = dict[str, object]
TOKEN_SEED = 20_251_120


class Bencher:
    """Opens one artifact, and runs the two tests on it as often as it is asked to."""

    session: Session
    prompt: list[int]
    generate: int
    native: bool

    def __init__(self, open_session: OpenSession) -> None:
        self._open_session = open_session

    def open(self, request: Request) -> Reply:
        """Open the artifact; `load` is in seconds and includes importing the runtime."""
        baseline = resident_memory()
        start = time.perf_counter()
        self.session = self._open_session(Path(str(request["path"])), threads=request["threads"])
        load = time.perf_counter() - start
        prompt, self.generate = int(str(request["prompt"])), int(str(request["generate"]))
        self.native = request["loop"] == "native"
        self._refuse_too_long(max(prompt, self.generate))
        # The same tokens for every artifact with the same vocabulary, in every round.
        vocabulary = range(self.session.vocab_size)
        self.prompt = [self.session.start_id, *random.Random(TOKEN_SEED).choices(vocabulary, k=prompt - 1)]
        return {"runtime": self.session.runtime, "load": load, "baseline_memory": baseline}

    def round(self, request: Request) -> Reply:
        """Both tests once, each on an empty cache, as llama-bench does; times in seconds.

        `prompt`: append the whole prompt at once. `first`: the same plus choosing the first new token (argmax).
        `generate`: append one token at a time, each the argmax of the logits before it, beginning with the model's
        start token. Handing the logits of the last position to numpy is in all three, the argmax over the vocabulary
        in `first` and `generate`, tokenization and detokenization in none.
        """
        session = self.session
        session.rewind(0)
        start = time.perf_counter()
        logits = _given(session.append(self.prompt, logits="last"))
        prompt_done = time.perf_counter()
        int(logits[-1].argmax())
        first_done = time.perf_counter()

        session.rewind(0)
        generate_start = time.perf_counter()
        (self._native_loop if self.native else self._steps)()
        generate_done = time.perf_counter()
        return {
            "prompt": prompt_done - start,
            "first": first_done - start,
            "generate": generate_done - generate_start,
            "peak_memory": peak_memory(),
        }

    def _steps(self) -> None:
        """Generate by asking for the logits of one token after the other."""
        token = self.session.start_id
        for _ in range(self.generate):
            token = int(_given(self.session.append([token], logits="last"))[-1].argmax())

    def _native_loop(self) -> None:
        """Generate with the runtime's own greedy loop, its sampling included."""
        made = self.session.native_generate([self.session.start_id], self.generate, stop_at_eos=False)
        assert len(made) == self.generate

    def _refuse_too_long(self, tokens: int) -> None:
        if tokens > self.session.context_length:
            raise BadInput(
                "EW-611",
                "the test is longer than the model's context",
                where=self.session.path.name,
                expected=f"at most {self.session.context_length} tokens",
                found=f"{tokens} tokens",
                fix="give smaller values for prompt and generate",
            )


def _given(logits: np.ndarray | None) -> np.ndarray:
    """The logits [1, vocabulary], which a session that was asked for them gives."""
    assert logits is not None
    return logits


def serve(open_session: OpenSession, requests: TextIO, replies: TextIO) -> None:
    """Answer the requests of `bench`."""
    bencher = Bencher(open_session)
    answer({"open": bencher.open, "round": bencher.round}, requests, replies)


def answer(handlers: Mapping[str, Callable[[Request], Reply]], requests: TextIO, replies: TextIO) -> None:
    """Answer requests, by what their `do` says, until their stream ends.

    A user error is a reply; anything else ends the process loudly. Each reply also carries `idle_cpu`: processor
    seconds that this process burned since its last reply, when it should have done nothing (threads of a runtime that
    spin would falsify the numbers of the other artifacts).
    """
    idle_since = time.process_time()
    for line in requests:
        idle_cpu = time.process_time() - idle_since
        request = json.loads(line)
        try:
            reply = {**handlers[request["do"]](request), "idle_cpu": idle_cpu}
        except EdgewrightError as error:
            reply = {"error": error.to_json()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        idle_since = time.process_time()


def private_stdout() -> TextIO:
    """A stream to the real stdout; descriptor 1 is stderr from now on, so that a runtime's prints cannot mix in."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def main() -> None:
    """Entry point of `python -m edgewright.bench_worker`."""
    replies = private_stdout()
    from edgewright.export.runtimes import open_session

    serve(open_session, sys.stdin, replies)


if __name__ == "__main__":
    main()
