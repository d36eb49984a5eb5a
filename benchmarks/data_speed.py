"""How fast a corpus becomes packed tokens, against the tokenizer alone.

    python benchmarks/data_speed.py [repeats]

Both sides see the source of the standard library and the same byte-level BPE tokenizer of 4,096 tokens. One side is
`tokenizers.Tokenizer.encode_batch` over all documents, already in memory; the other is `prepare_data`: list the
files, read, decode, screen, deduplicate, split, encode, pack, hash and write. They are run in turn, and the ratio is
that of the median times. The bar: preparing reaches at least 0.8 of the tokenizer's speed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from edgewright.data import PretrainedTokenizer, StdlibData, TrainTokenizer, iterate_documents, prepare_data
from edgewright.machine import describe_machine

BAR = 0.8


def silent(line: str) -> None:
    """Progress is not wanted here."""


def main(repeats: int) -> None:
    """Measure and print; exit 1 when the bar is missed."""
    texts = [text for _, text in iterate_documents(StdlibData())]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    alone: list[float] = []
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = prepare_data(StdlibData(tokenizer=TrainTokenizer()), folder / "first", say=silent)
        config = StdlibData(tokenizer=PretrainedTokenizer(path=trained.tokenizer_dir))
        for repeat in range(repeats + 1):  # the first round warms up and is not counted
            start = time.perf_counter()
            tokenizer = Tokenizer.from_file(str(trained.tokenizer_dir / "tokenizer.json"))
            tokenizer.encode_batch(texts, add_special_tokens=False)
            middle = time.perf_counter()
            prepare_data(config, folder / str(repeat), say=silent)
            end = time.perf_counter()
            if repeat:
                alone.append(middle - start)
                whole.append(end - middle)
    ratio = statistics.median(alone) / statistics.median(whole)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(f"command: python benchmarks/data_speed.py {repeats}   commit: {commit.strip()}")
    machine = describe_machine()
    print(f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['os']}, load {os.getloadavg()[0]:.1f}")
    for label, seconds in (("encode_batch alone", alone), ("prepare_data", whole)):
        median, spread = statistics.median(seconds), statistics.pstdev(seconds)
        print(f"{label:20} {megabytes / median:6.2f} MB/s   median {median:.2f} s, sd {spread:.2f}, {repeats} repeats")
    print(f"ratio {ratio:.2f} (bar {BAR}) on {len(texts)} documents, {megabytes:.1f} MB")
    sys.exit(ratio < BAR)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
