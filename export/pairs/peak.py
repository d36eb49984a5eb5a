"""How much memory a pair takes, in a process that does nothing else.

`python -m edgewright.export.pairs.peak BUNDLE THREADS` opens the bundle, decodes a little, and prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from edgewright.errors import BadInput

NEW_TOKENS = 16


def peak_memory_of(bundle: Path, *, threads: int | None) -> int | None:
    """Bytes that such a process had in memory at most; None where the system does not tell.

    Raises:
        BadInput: EW-610, it died.
    """
    command = [sys.executable, "-P", "-m", "edgewright.export.pairs.peak", str(bundle.absolute()), str(threads or 0)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}, check=False
    )
    if done.returncode != 0:
        raise BadInput(
            "EW-610",
            "the process that measured the memory of this pair died",
            where=bundle.absolute(),
            found=f"exit status {done.returncode}; it last said: {done.stderr.strip()[-300:] or 'nothing'}",
            fix=f"try it alone: edgewright generate {bundle} --prompt a",
        )
    found: int | None = json.loads(done.stdout.strip().splitlines()[-1])["peak_memory"]
    return found


def main() -> None:
    """Entry point of the process."""
    from edgewright.bench_worker import private_stdout

    reply = private_stdout()
    from edgewright.export.runtimes import open_session
    from edgewright.machine import peak_memory

    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    with open_session(path, threads=threads or None) as session:
        session.native_generate([session.start_id], min(NEW_TOKENS, session.context_length - 1), stop_at_eos=True)
    print(json.dumps({"peak_memory": peak_memory()}), file=reply, flush=True)


if __name__ == "__main__":
    main()
