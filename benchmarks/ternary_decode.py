"""Decoding with ternary weights against llama.cpp: speed, share of the memory roofline, peak memory, each with its bar.

    python benchmarks/ternary_decode.py [--starts 5] [--rounds 5] [--tokens 64] [--threads 2]

A Llama of 200M parameters (untied, random, all linear layers but the head ternary) is exported to GenAI, F16 and Q4_0,
each export certified. One process per artifact and start; the processes take turns, round by round, and are started
again `starts` times, because where in memory a process happens to lie moves its speed by some 10 %. The loop is the raw
one: append a token, logits to numpy, argmax. llama.cpp runs in our session and with its own defaults (F16 cache, flash
attention as it likes); the better of the two is the peer. The read bandwidth is that of summing a gigabyte of int64
with as many threads, in turn with the rest.

Two figures tell how far a bar is from what the stock runtime can do at all: the matrix products of the GenAI file
alone, in a graph that has nothing else; and what a process holds that has imported the runtime and opened nothing.
"""

from __future__ import annotations

import argparse
import importlib
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
PRODUCTS = "its products alone"
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


def products_only(folder: Path, out: Path) -> Path:
    """A graph of the matrix products of a GenAI folder and nothing else, each on a vector of ones."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = onnx.load(folder / "model.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    inputs: dict[str, onnx.TensorProto] = {}
    for node in nodes:
        size = next(item.i for item in node.attribute if item.name == "K")
        node.input[0] = f"ones_{size}"
        inputs[node.input[0]] = numpy_helper.from_array(np.ones((1, 1, size), np.float32), node.input[0])
    rows = [next(item.i for item in node.attribute if item.name == "N") for node in nodes]
    made = [
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, (1, 1, size))
        for node, size in zip(nodes, rows, strict=True)
    ]
    kept = [weights[name] for node in nodes for name in node.input[1:] if name]
    model = helper.make_model(
        helper.make_graph(nodes, "products", [], made, [*inputs.values(), *kept]),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    onnx.save(model, out)
    return out


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


def products_round(path: str, tokens: int, threads: int) -> Round:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for output in session.get_outputs():  # memory for the results once, not for every token
        binding.bind_ortvalue_output(
            output.name, onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(output.shape, np.float32))
        )

    def multiply() -> float:
        start = time.perf_counter()
        for _ in range(tokens):
            session.run_with_iobinding(binding)
        return tokens / (time.perf_counter() - start)

    return multiply


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
    importlib.import_module({TERNARY: "onnxruntime_genai", PRODUCTS: "onnxruntime"}.get(name, "llama_cpp"))
    imported = peak_memory()
    if name == BANDWIDTH:
        measure = bandwidth_round(threads)
    elif name == PRODUCTS:
        measure = products_round(path, tokens, threads)
    elif name.endswith(DEFAULTS):
        measure = defaults_round(path, tokens, threads)
    else:
        measure = session_round(path, tokens, threads)
    for _ in sys.stdin:
        rate, peak = measure(), peak_memory()
        print(json.dumps({"rate": rate, "peak": peak / 1e6, "own": (peak - imported) / 1e6}), flush=True)


# ---------------------------------------------------------------- the one who measures


def measure(
    paths: dict[str, Path], *, starts: int, rounds: int, tokens: int, threads: int
) -> dict[str, dict[str, list[float]]]:
    """Median rate of each start, the largest peak memory of it and what of that came after the imports, by name."""
    found: dict[str, dict[str, list[float]]] = {name: {"rate": [], "peak": [], "own": []} for name in paths}
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
            for figure in ("peak", "own"):
                found[name][figure].append(max(reply[figure] for reply in replies[name]))
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
        peak, own = statistics.median(figures["peak"]), statistics.median(figures["own"])
        memory = (
            f"   peak {peak:.0f} MB, {own:.0f} MB of it after the imports" if name not in (BANDWIDTH, PRODUCTS) else ""
        )
        print(f"  {name:30s} {median_line(figures['rate'], unit, 1)}{memory}")
    ours, reached = found[TERNARY], []
    for peer, bar in BARS.items():
        other = max((found[peer], found[peer + DEFAULTS]), key=lambda figures: statistics.median(figures["rate"]))
        reached.append(verdict(f"speed against {peer}", paired(ours["rate"], other["rate"]), bar))
    share, most = (share_of_roofline(found, name, bytes_read) for name in (TERNARY, PRODUCTS))
    reached.append(verdict(f"share of the roofline ({bytes_read / 1e6:.1f} MB a token)", share, ROOFLINE_BAR))
    print(f"    of the products alone: {most:.2f}, which no graph around these kernels can exceed")
    least = min((found[F16], found[F16 + DEFAULTS]), key=lambda figures: statistics.median(figures["peak"]))
    memory = paired(ours["peak"], least["peak"])
    reached.append(verdict("peak memory against llama.cpp F16", memory, MEMORY_BAR, at_most=True))
    print(f"    without what the imports of both take: {paired(ours['own'], least['own']):.2f}")
    return 0 if all(reached) else 1


def share_of_roofline(found: dict[str, dict[str, list[float]]], name: str, bytes_read: int) -> float:
    reads = [rate * bytes_read / 1e9 for rate in found[name]["rate"]]
    return paired(reads, found[BANDWIDTH]["rate"])


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
        paths[PRODUCTS] = products_only(paths[TERNARY], Path(scratch) / "products.onnx")
        sizes = {"starts": given.starts, "rounds": given.rounds, "tokens": given.tokens, "threads": given.threads}
        return report(measure(paths, **sizes), bytes_read)


if __name__ == "__main__":
    sys.exit(main())
