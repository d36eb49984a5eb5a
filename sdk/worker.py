"""The parent's end of a process that measures something: requests and replies, one JSON object a line.

`bench` and the probe of speculative decoding measure in processes of their own, so that memory and threads are those of
what is measured. `bench_worker.answer` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgewright.errors import BadInput

IDLE_SHARE_ALLOWED = 0.1  # processor time of a process that waits, as a share of the time it waits


class WorkerProcess:
    """A process that answers requests. A context manager: leaving it ends the process.

    Args:
        command: what to start.
        place: the artifact that it measures, for messages.
        threads: of every library in it.
    """

    def __init__(self, command: Sequence[str], place: Path, *, threads: int) -> None:
        self.place = place
        self._waited = 0.0
        self._burned = 0.0
        self._last_reply = time.monotonic()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def ask(self, request: dict[str, object]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            BadInput: the process's own user error, with the artifact as its place; EW-610, it died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        waited = time.monotonic() - self._last_reply
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._user_error(reply["error"])
        self._waited += waited
        self._burned += float(reply.pop("idle_cpu"))
        self._last_reply = time.monotonic()
        return reply

    def forget(self) -> None:
        """Drop what is known about the time that the process waited: it was the warm-up."""
        self._waited = self._burned = 0.0

    def warnings(self) -> list[str]:
        """Says so when this process worked while the others were measured."""
        if self._burned <= IDLE_SHARE_ALLOWED * self._waited:
            return []
        share = self._burned / self._waited
        return [f"{self.place} used {share:.0%} of a core while the others were measured: they are faster than shown."]

    def _user_error(self, error: dict[str, Any]) -> BadInput:
        """The worker's error as one of this process, with the artifact as the place."""
        return BadInput(
            error["code"],
            error["what"],
            where=self.place,
            expected=error["expected"],
            found=error["found"],
            fix=error["fix"],
        )

    def _died(self) -> BadInput:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return BadInput(
            "EW-610",
            "the process that measured this artifact died",
            where=self.place,
            found=f"{how}; it last said: {' | '.join(said[-3:]) or 'nothing'}",
            fix=f"try it alone: edgewright generate {self.place}",
        )
