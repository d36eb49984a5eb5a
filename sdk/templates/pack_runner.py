"""Measure the model files of this folder on this device, and write `result.json`.

    python bench.py [--device "Raspberry Pi 5"] [--threads 4] [--repeats 5]

Needs Python 3.10 or newer and, for each file, its runtime's own package (README.txt); nothing else. Carry `result.json`
back and give it to `edgewright bench` or `edgewright report --add`.

The protocol is that of `edgewright bench`: every file in a process of its own, all open at once and measured in turns.
A round processes the prompt at once, then, from an empty cache, generates token by token (greedy). The way of the last
logits into numpy and the choice of the token are in the times; tokenization is not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = json.loads((HERE / "pack.json").read_text(encoding="utf-8"))


class Runtime:
    """A model with its cache."""

    package: str

    def __init__(self, path: Path, threads: int, room: int) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Empty the cache."""
        raise NotImplementedError

    def append(self, tokens: list) -> Any:
        """Run tokens behind those in the cache; the logits after the last one, `[vocabulary]`."""
        raise NotImplementedError


class LlamaCpp(Runtime):
    """A GGUF file: keys and values in float32, no flash attention, as in `edgewright bench`."""

    package = "llama-cpp-python"

    def __init__(self, path: Path, threads: int, room: int) -> None:
        import llama_cpp
        import numpy

        self.numpy, self.api = numpy, llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, unused: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = room
        settings.n_batch = settings.n_ubatch = min(512, room)
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = 0
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.size = min(512, room)

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def append(self, tokens: list) -> Any:
        for start in range(0, len(tokens), self.size):
            part = tokens[start : start + self.size]
            held = (ctypes.c_int32 * len(part))(*part)  # the batch only points to it
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(held, len(part))):
                raise RuntimeError("llama_decode failed")
        last = self.api.llama_get_logits_ith(self.context, -1)
        return self.numpy.ctypeslib.as_array(last, shape=(self.vocabulary,)).copy()


class Genai(Runtime):
    """A folder of ONNX Runtime GenAI."""

    package = "onnxruntime-genai"

    def __init__(self, path: Path, threads: int, room: int) -> None:
        import numpy
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()
        self.numpy, self.api, self.room = numpy, onnxruntime_genai, room
        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None

    def reset(self) -> None:
        if self.generator is not None:
            self.generator.rewind_to(0)
            return
        settings = self.api.GeneratorParams(self.model)
        settings.set_search_options(max_length=self.room, batch_size=1, num_beams=1, do_sample=False)
        self.generator = self.api.Generator(self.model, settings)

    def append(self, tokens: list) -> Any:
        self.generator.append_tokens(self.numpy.asarray(tokens, self.numpy.int32))
        return self.numpy.asarray(self.generator.get_logits()[0][-1], self.numpy.float32)


class Onnx(Runtime):
    """A folder with `model.onnx`: a decoder with past and present keys and values."""

    package = "onnxruntime"

    def __init__(self, path: Path, threads: int, room: int) -> None:
        import numpy
        import onnxruntime

        self.numpy = numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(
            str(path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.reset()

    def reset(self) -> None:
        numpy, types = self.numpy, {"tensor(float)": "float32", "tensor(float16)": "float16"}
        self.length = 0
        self.past = {
            name: numpy.zeros((1, each.shape[1], 0, each.shape[3]), types[each.type])
            for name, each in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def append(self, tokens: list) -> Any:
        numpy, end = self.numpy, self.length + len(tokens)
        feeds = {
            "input_ids": numpy.array([tokens], numpy.int64),
            "attention_mask": numpy.ones((1, end), numpy.int64),
            "position_ids": numpy.arange(self.length, end, dtype=numpy.int64)[None],
        }
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        found = dict(zip(self.outputs, self.session.run(None, {**feeds, **self.past}), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        self.length = end
        return numpy.asarray(found["logits"][0, -1], numpy.float32)


class OpenVino(Runtime):
    """A folder with `openvino_model.xml`: a stateful decoder, with the settings of `edgewright bench`."""

    package = "openvino"
    exact = {"EXECUTION_MODE_HINT": "ACCURACY", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    fast = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
    codes = ("u2", "i4", "u4", "i8", "u8")

    def __init__(self, path: Path, threads: int, room: int) -> None:
        import numpy

        # `import openvino` would report itself over the network; it does not where this package is not installed, which
        # is what None as a module means.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        self.numpy = numpy
        core = openvino.Core()
        model = core.read_model(str(path / "openvino_model.xml"))
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        types = {node.get_output_element_type(0).get_type_name() for node in constants}
        settings = self.exact if types.isdisjoint(self.codes) else self.fast
        compiled = core.compile_model(model, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads})
        self.names = {name for each in compiled.inputs for name in each.names}
        self.request = compiled.create_infer_request()
        self.length = 0

    def reset(self) -> None:
        self.request.reset_state()
        self.length = 0

    def append(self, tokens: list) -> Any:
        numpy, end = self.numpy, self.length + len(tokens)
        feeds = {
            "input_ids": numpy.array([tokens], numpy.int64),
            "attention_mask": numpy.ones((1, end), numpy.int64),
            "position_ids": numpy.arange(self.length, end, dtype=numpy.int64)[None],
            "beam_idx": numpy.zeros(1, numpy.int32),
        }
        self.length = end
        self.request.infer({name: value for name, value in feeds.items() if name in self.names})
        return numpy.array(self.request.get_tensor("logits").data[0, -1], numpy.float32)


RUNTIMES: dict[str, type[Runtime]] = {"llamacpp": LlamaCpp, "genai": Genai, "onnx": Onnx, "openvino": OpenVino}


def measure(entry: dict, threads: int) -> None:
    """One file's process: `go` on standard input is a round, its times in seconds are a line on standard output."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints must not mix in
    baseline, start = resident_memory(), time.perf_counter()
    room = max(FOLDER["prompt"], FOLDER["generate"]) + 1
    model = RUNTIMES[entry["runtime"]](HERE / entry["path"], threads, room)
    opened = {"load": time.perf_counter() - start, "baseline_memory": baseline}
    draw = random.Random(FOLDER["seed"])
    prompt = [entry["start_id"], *draw.choices(range(entry["vocab_size"]), k=FOLDER["prompt"] - 1)]
    print(json.dumps(opened), file=replies, flush=True)
    for _ in sys.stdin:
        model.reset()
        start = time.perf_counter()
        logits = model.append(prompt)
        read = time.perf_counter()
        int(logits.argmax())
        first = time.perf_counter()
        model.reset()
        token, begin = entry["start_id"], time.perf_counter()
        for _ in range(FOLDER["generate"]):
            token = int(model.append([token]).argmax())
        times = {"prompt": read - start, "first": first - start, "generate": time.perf_counter() - begin}
        print(json.dumps({**times, "peak_memory": peak_memory()}), file=replies, flush=True)


def row(entry: dict, opened: dict, rounds: list) -> dict:
    """What `edgewright bench --json` says about one file."""
    first = [1000 * each["first"] for each in rounds]
    prompt = [FOLDER["prompt"] / each["prompt"] for each in rounds]
    rate = [FOLDER["generate"] / each["generate"] for each in rounds]
    spread = {
        f"{name}_sd": statistics.stdev(values) if len(values) > 1 else 0.0
        for name, values in (("ttft_ms", first), ("prompt_tokens_per_s", prompt), ("tokens_per_s", rate))
    }
    return {
        **{name: entry[name] for name in ("path", "to", "quant", "bytes", "sha256", "gate", "runtime")},
        "bits_per_byte": None,
        "kl": None,
        "ttft_ms": statistics.fmean(first),
        "prompt_tokens_per_s": statistics.fmean(prompt),
        "tokens_per_s": statistics.fmean(rate),
        **spread,
        "peak_memory": max(each["peak_memory"] for each in rounds),
        "baseline_memory": opened["baseline_memory"],
        "load_ms": 1000 * opened["load"],
    }


def peak_memory() -> int:
    """The most bytes that this process ever had in memory."""
    if sys.platform == "win32":
        return resident_memory() or 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else _status("VmHWM") or peak * 1024


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not tell."""
    return _status("VmRSS")


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def machine(threads: int) -> dict:
    """Processor, cores, system and versions; no host name, no paths."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ["numpy", *{RUNTIMES[entry["runtime"]].package for entry in FOLDER["artifacts"]}]:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "model\t"))]
    return {
        "cpu": models[-1] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="what to call this device in the tables")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=FOLDER["repeats"])
    parser.add_argument("--measure", type=int, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        measure(FOLDER["artifacts"][given.measure], given.threads)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    command = [sys.executable, __file__, "--threads", str(given.threads), "--measure"]
    workers = [
        subprocess.Popen(
            [*command, str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        for index in range(len(FOLDER["artifacts"]))
    ]

    def ask(index: int, request: str) -> dict:
        requests, replies = workers[index].stdin, workers[index].stdout
        assert requests is not None and replies is not None
        requests.write(request)
        requests.flush()
        line = replies.readline()
        if not line:
            raise SystemExit(f"{FOLDER['artifacts'][index]['path']}: its process ended (see above)")
        found: dict = json.loads(line)
        return found

    opened = [ask(index, "") for index in range(len(workers))]
    rounds: list = [[] for _ in workers]
    for turn in range(given.repeats + 1):  # the first warms up
        for index in range(len(workers)):
            found = ask(index, "go\n")
            if turn:
                rounds[index].append(found)
    for worker in workers:
        worker.communicate()  # the end of its requests ends it
    about = machine(given.threads)
    result = {
        "schema_version": 1,
        "device": given.device or about["cpu"],
        "machine": about,
        **{name: FOLDER[name] for name in ("prompt", "generate")},
        "threads": given.threads,
        "repeats": given.repeats,
        "artifacts": [row(*each) for each in zip(FOLDER["artifacts"], opened, rounds, strict=True)],
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for each in result["artifacts"]:
        print(f"{each['path']}: {each['tokens_per_s']:,.1f} tokens/s, first token {each['ttft_ms']:,.1f} ms")
    print("written: result.json")


if __name__ == "__main__":
    main()
