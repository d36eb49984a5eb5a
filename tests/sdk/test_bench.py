"""Bench: the protocol, the interleaving, memory of a process of its own, and what goes wrong in that process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgewright import bench as bench_module
from edgewright.bench import bench
from edgewright.bench_worker import serve
from edgewright.errors import BadInput, RecipeError
from edgewright.inventory import describe_model
from edgewright.machine import describe_machine, peak_memory, resident_memory

Fakes = Callable[..., list[Path]]

FAKE = Path(__file__).with_name("fake_session.py")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """A function that makes a GGUF-named file which the fake worker opens with the behaviour of its name."""
    monkeypatch.setattr(bench_module, "WORKER_COMMAND", (sys.executable, str(FAKE)))
    monkeypatch.setenv("FAKE_SESSION_LOG", str(tmp_path / "log"))

    def make(*names: str) -> list[Path]:
        paths = [tmp_path / f"{name}.gguf" for name in names]
        for path in paths:
            path.write_bytes(b"GGUF")
        return paths

    return make


def test_rows_have_the_names_that_scripts_rely_on(fakes: Fakes) -> None:
    report = bench(*fakes("slow"), prompt=8, generate=4, repeats=5, threads=1).to_json()
    assert report["schema_version"] == 1
    assert report["threads"] == 1 and report["machine"]["threads"] == 1  # type: ignore[index]
    assert (report["prompt"], report["generate"], report["repeats"]) == (8, 4, 5)
    assert isinstance(report["warnings"], list)  # of a spread that other work on the machine may cause
    row = report["artifacts"][0]  # type: ignore[index]
    names = (
        "path to quant bytes bits_per_byte kl ttft_ms prompt_tokens_per_s prompt_tokens_per_s_sd tokens_per_s "
        "tokens_per_s_sd peak_memory baseline_memory gate load_ms"
    )
    assert set(names.split()) <= set(row)
    assert row["to"] == "gguf" and row["bytes"] == 4
    assert row["bits_per_byte"] is None and row["kl"] is None and row["gate"] is None
    assert row["tokens_per_s"] > 0 and row["ttft_ms"] > 0 and row["tokens_per_s_sd"] >= 0
    assert "--prompt 8 --generate 4 --repeats 5 --threads 1" in str(report["command"])
    json.dumps(report)


def test_rates_are_tokens_over_seconds(fakes: Fakes) -> None:
    """A model that sleeps 10 ms per token can do at most 100 tokens/s, and its first token takes prompt * 10 ms."""
    row = bench(*fakes("slow"), prompt=6, generate=3, repeats=2, threads=1).artifacts[0]
    assert 0 < row.tokens_per_s <= 100 and 0 < row.prompt_tokens_per_s <= 100
    assert row.ttft_ms >= 60
    assert row.prompt_tokens_per_s == pytest.approx(6000 / row.ttft_ms, rel=0.3)


def test_artifacts_take_turns(fakes: Fakes, tmp_path: Path) -> None:
    """A B A B ...: warm-up, then each round; every test from an empty cache, with the threads asked for."""
    bench(*fakes("counting", "printing"), prompt=7, generate=5, repeats=2, threads=3)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    prompts = [name for name, _, length in lines if length == "7"]
    assert prompts == ["counting", "printing"] * 3
    assert {threads for _, threads, _ in lines} == {"3"}
    assert {length for _, _, length in lines} == {"0", "7", "5"}


def test_the_warm_up_is_not_counted(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged = []
    mean_sd = bench_module._mean_sd
    monkeypatch.setattr(bench_module, "_mean_sd", lambda values: averaged.append(len(values)) or mean_sd(values))
    bench(*fakes("counting"), prompt=2, generate=2, repeats=3, threads=1)
    assert averaged == [3, 3, 3]


def test_serve_runs_both_tests_from_an_empty_cache(tmp_path: Path) -> None:
    sys.path.insert(0, str(FAKE.parent))
    try:
        from fake_session import CountingSession
    finally:
        sys.path.remove(str(FAKE.parent))
    session = CountingSession(tmp_path)
    requests = [{"do": "open", "path": "x", "threads": 1, "prompt": 9, "generate": 3, "loop": "steps"}, {"do": "round"}]
    replies = io.StringIO()
    serve(lambda path, threads: session, io.StringIO("\n".join(map(json.dumps, requests)) + "\n"), replies)
    opened, measured = map(json.loads, replies.getvalue().splitlines())
    assert opened["runtime"] == "fake" and opened["load"] >= 0
    assert session.calls == [(0, 9), (0, 1), (1, 1), (2, 1)]
    assert session.cache == [0, 1, 2]  # greedy: each token is the argmax of the logits before it
    assert measured["first"] >= measured["prompt"] > 0 and measured["generate"] > 0


def test_peak_memory_is_the_process_own(fakes: Fakes) -> None:
    small, big = bench(*fakes("counting", "big"), prompt=2, generate=2, repeats=1, threads=1).artifacts
    assert 190e6 < big.peak_memory - small.peak_memory < 260e6
    assert small.baseline_memory is not None and small.baseline_memory <= small.peak_memory


def test_prints_of_a_runtime_do_not_mix_with_replies(fakes: Fakes) -> None:
    assert bench(*fakes("printing"), prompt=2, generate=2, repeats=1, threads=1).artifacts[0].tokens_per_s > 0


def test_a_process_that_does_not_rest_is_reported(fakes: Fakes) -> None:
    report = bench(*fakes("busy", "slow"), prompt=5, generate=5, repeats=5, threads=1)
    assert [warning for warning in report.warnings if "busy.gguf" in warning and "faster than shown" in warning]
    assert not [warning for warning in report.warnings if "slow.gguf" in warning]


def test_few_repeats_are_warned_about(fakes: Fakes) -> None:
    report = bench(*fakes("slow"), prompt=2, generate=2, repeats=4, threads=1)
    assert [warning for warning in report.warnings if "Only 4 repeats" in warning]


def test_numbers_that_disagree_are_warned_about(fakes: Fakes) -> None:
    """Every second round of this model is ten times slower."""
    report = bench(*fakes("jumpy"), prompt=2, generate=2, repeats=6, threads=1)
    assert [warning for warning in report.warnings if "jumpy.gguf: tokens/s spread by" in warning]


def test_a_dead_process_names_its_artifact_and_last_words(fakes: Fakes) -> None:
    with pytest.raises(BadInput, match=r"crashing\.gguf.*EW-610") as caught:
        bench(*fakes("counting", "crashing"), prompt=2, generate=2, repeats=1, threads=1)
    assert "exit status 3" in str(caught.value.found) and "out of luck" in str(caught.value.found)


def test_errors_of_the_runtime_arrive_whole(fakes: Fakes) -> None:
    with pytest.raises(BadInput, match=r"refused\.gguf: a package is missing \[EW-603\]") as caught:
        bench(*fakes("refused"), prompt=2, generate=2, repeats=1, threads=1)
    assert caught.value.fix == "pip install it"


def test_a_test_longer_than_the_context_is_refused(fakes: Fakes) -> None:
    with pytest.raises(BadInput, match="EW-611"):
        bench(*fakes("counting"), prompt=101, generate=2, repeats=1, threads=1)


def test_nonsense_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="EW-190"):
        bench()
    with pytest.raises(RecipeError, match="repeats must be positive"):
        bench(tmp_path, repeats=0)
    with pytest.raises(BadInput, match="EW-390"):
        bench(tmp_path / "nothing.gguf")
    with pytest.raises(BadInput, match="EW-390"):
        bench(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="several GGUF files: a.gguf, b.gguf"):
        bench(tmp_path)


def test_the_worker_brings_no_heavy_package() -> None:
    """Importing what the worker imports must not bring in a runtime: its memory would be in every artifact's peak."""
    code = (
        "import sys, edgewright.bench_worker, edgewright.export.runtimes\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'llama_cpp', 'plotly', 'pydantic', 'gguf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_inventory_reads_manifests_and_checkpoints(tmp_path: Path) -> None:
    entry = {"to": "gguf", "quant": "tq2_0", "bytes": 7, "gate": "passed"}
    (tmp_path / "edgewright.json").write_text(json.dumps({"schema_version": 1, "artifacts": {"a.gguf": entry}}))
    (tmp_path / "a.gguf").write_bytes(b"1234567")
    for path in (tmp_path, tmp_path / "a.gguf"):
        known = describe_model(path)
        assert (known.to, known.quant, known.bytes, known.gate) == ("gguf", "tq2_0", 7, "passed")

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    save_file({"w": np.zeros((4, 4), np.float16), "n": np.zeros(4, np.float32)}, checkpoint / "model.safetensors")
    save_file({"codes": np.zeros(64, np.float32)}, checkpoint / "lattice.safetensors")
    known = describe_model(checkpoint)
    assert (known.to, known.quant, known.gate) == ("hf", "fp16", None)
    assert known.bytes == (checkpoint / "model.safetensors").stat().st_size

    (tmp_path / "edgewright.json").write_text('{"artifacts": {"a.gguf": {"to": "gguf"}}}')
    with pytest.raises(BadInput, match="EW-391"):
        describe_model(tmp_path / "a.gguf")


def test_machine_says_nothing_private() -> None:
    import getpass
    import platform

    machine = describe_machine(threads=1)
    assert set(machine) == {"cpu", "cores", "threads", "memory", "os", "python", "device", "packages"}
    assert machine["packages"]["numpy"] == np.__version__  # type: ignore[index]
    text = json.dumps(machine)
    assert str(Path.home()) + "/" not in text and f'"{getpass.getuser()}"' not in text
    assert platform.node() not in text or len(platform.node()) < 3


def test_memory_is_in_bytes() -> None:
    resident = resident_memory()
    assert resident is None or 10e6 < resident <= peak_memory()
