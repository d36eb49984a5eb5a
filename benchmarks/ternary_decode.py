"""Decoding with ternary weights against llama.cpp: speed, share of the memory roofline, peak memory, each with its bar.

    python benchmarks/ternary_decode.py [--starts 5] [--rounds 5] [--tokens 64] [--threads 2]

A Llama of 200M parameters (untied, random, all linear layers but the head ternary) is exported to GenAI, F16 and Q4_0,
each export certified. One process per artifact and start; the processes take turns, round by round, and are started
again `starts` times, because where in memory a process happens to lie moves its speed by some 10 %. The loop is the raw
one: append a token, logits to numpy, argmax. llama.cpp runs in our session and with its own defaults (F16 cache, flash
attention as it likes); the better of the two is the peer. The read bandwidth is that of summing a gigabyte of int64
with as many threads, in turn with the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import header, median_line

from edgewright.machine import peak_memory

TERNARY = "genai ternary"
BANDWIDTH = "read bandwidth"
F16, Q4_0 = "llama.cpp F16", "llama.cpp Q4_0"
DEFAULTS = ", its defaults"
CONTEXT = 512
BARS = {F16: 3.9, Q4_0: 1.6}
ROOFLINE_BAR, MEMORY_BAR = 0.80, 0.25

# ---------------------------------------------------------------- model and files


def export_all(model: Path, directory: Path) -> dict[str, Path]:
    """The certified artifacts by name."""
    import edgewright

    asked = {TERNARY: ("genai", "ternary", "int4"), F16: ("gguf", "f16", None), Q4_0: ("gguf", "q4_0", "q4_0")}
    paths = {}
    for name, (to, quant, embedding) in asked.items():
        out = directory / f"{to}-{quant}"
        artifact = edgewright.export(model, to=to, quant=quant, embedding_quant=embedding, out=out)
        assert artifact.gate == "passed" and not artifact.fallbacks
        paths[name] = artifact.path
        print(f"{name}: {artifact.bytes / 1e6:.0f} MB, gate {artifact.gate}")
    return paths


def bytes_a_token(folder: Path) -> int:
    """What a token must read of a GenAI folder: all weights but the embedding, of which it reads a row."""
    import onnx
    from onnx import helper

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(
        int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if "embed_tokens" not in tensor.name and not tensor.name.endswith("_cache")
    )


# ---------------------------------------------------------------- the processes that are measured

Round = Callable[[], float]
"""Measures once: tokens a second, or GB a second."""


def session_round(path: str, tokens: int, threads: int) -> Round:
    from edgewright.export.runtimes import open_session

    session = open_session(Path(path), threads=threads)

    def decode() -> float:
        session.rewind(0)
        token, start = 0, time.perf_counter()
        for _ in range(tokens):
            logits = session.append([token], logits="last")
            assert logits is not None
            token = int(logits[-1].argmax())
        return tokens / (time.perf_counter() - start)

    return decode


def defaults_round(path: str, tokens: int, threads: int) -> Round:
    """llama.cpp with the cache and the attention that it chooses itself."""
    import llama_cpp

    model = llama_cpp.Llama(
        path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
    )
    vocabulary = model.n_vocab()

    def decode() -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        token, start = 0, time.perf_counter()
        for _ in range(tokens):
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
            assert llama_cpp.llama_decode(model.ctx, batch) == 0
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=(vocabulary,))
            token = int(logits.argmax())
        return tokens / (time.perf_counter() - start)

    return decode


def bandwidth_round(threads: int) -> Round:
    parts = np.array_split(np.ones(1 << 27, np.int64), threads)

    def read() -> float:
        readers = [threading.Thread(target=part.sum) for part in parts]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return sum(part.nbytes for part in parts) / (time.perf_counter() - start) / 1e9

    return read


def serve(name: str, path: str, tokens: int, threads: int) -> None:
    """A line on stdin is a request for a round; its reply is a line of JSON."""
    if name == BANDWIDTH:
        measure = bandwidth_round(threads)
    elif name.endswith(DEFAULTS):
        measure = defaults_round(path, tokens, threads)
    else:
        measure = session_round(path, tokens, threads)
    for _ in sys.stdin:
        print(json.dumps({"rate": measure(), "peak": peak_memory() / 1e6}), flush=True)


# ---------------------------------------------------------------- the one who measures


def measure(
    paths: dict[str, Path], *, starts: int, rounds: int, tokens: int, threads: int
) -> dict[str, dict[str, list[float]]]:
    """Median rate of each start and the largest peak memory of it, by name."""
    found: dict[str, dict[str, list[float]]] = {name: {"rate": [], "peak": []} for name in paths}
    for _ in range(starts):
        workers = {name: start_worker(name, path, tokens, threads) for name, path in paths.items()}
        replies: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
        for turn in range(1 + rounds):
            for name, worker in workers.items():
                reply = ask(worker)
                if turn:  # the first one warms up
                    replies[name].append(reply)
                time.sleep(0.05)  # threads that spin go to sleep
        for name, worker in workers.items():
            worker.communicate()
            found[name]["rate"].append(statistics.median(reply["rate"] for reply in replies[name]))
            found[name]["peak"].append(max(reply["peak"] for reply in replies[name]))
    return found


def start_worker(name: str, path: Path, tokens: int, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--serve", name, str(path), "--tokens", str(tokens), "--threads", str(threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    reply: dict[str, float] = json.loads(worker.stdout.readline())
    return reply


def report(found: dict[str, dict[str, list[float]]], bytes_read: int) -> int:
    """Print all; 1 when a bar was missed."""
    for name, figures in found.items():
        unit = "GB/s" if name == BANDWIDTH else "tokens/s"
        peak = f"   peak {statistics.median(figures['peak']):.0f} MB" if name != BANDWIDTH else ""
        print(f"  {name:30s} {median_line(figures['rate'], unit, 1)}{peak}")
    ours, reached = found[TERNARY], []
    for peer, bar in BARS.items():
        other = max((found[peer], found[peer + DEFAULTS]), key=lambda figures: statistics.median(figures["rate"]))
        reached.append(verdict(f"speed against {peer}", paired(ours["rate"], other["rate"]), bar))
    reads = [rate * bytes_read / 1e9 for rate in ours["rate"]]
    share = paired(reads, found[BANDWIDTH]["rate"])
    reached.append(verdict(f"share of the roofline ({bytes_read / 1e6:.1f} MB a token)", share, ROOFLINE_BAR))
    least = min((found[F16], found[F16 + DEFAULTS]), key=lambda figures: statistics.median(figures["peak"]))
    memory = paired(ours["peak"], least["peak"])
    reached.append(verdict("peak memory against llama.cpp F16", memory, MEMORY_BAR, at_most=True))
    return 0 if all(reached) else 1


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median over the starts of the ratio within a start."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def verdict(what: str, value: float, bar: float, *, at_most: bool = False) -> bool:
    """Print a value beside its bar; whether that was reached."""
    reached = value <= bar if at_most else value >= bar
    word = "at most" if at_most else "at least"
    print(f"  {what}: {value:.2f}   bar: {word} {bar:.2f}   {'reached' if reached else 'NOT reached'}")
    return reached


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.serve:
        name, path = given.serve
        serve(name, path, given.tokens, given.threads)
        return 0
    from models import mid  # not above: torch would be in the memory of every process

    header()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        mid(model, ternary=True)
        paths = export_all(model, Path(scratch))
        bytes_read = bytes_a_token(paths[TERNARY])
        paths |= {name + DEFAULTS: paths[name] for name in (F16, Q4_0)} | {BANDWIDTH: Path()}
        sizes = {"starts": given.starts, "rounds": given.rounds, "tokens": given.tokens, "threads": given.threads}
        return report(measure(paths, **sizes), bytes_read)


if __name__ == "__main__":
    sys.exit(main())
