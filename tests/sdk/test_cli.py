"""The command line's contract: what goes where, and which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgewright import errors
from edgewright.cli import main

Run = Callable[..., tuple[int, str, str]]


@dataclass
class Fake:
    """Any result."""

    shown: dict[str, object]

    def to_json(self) -> dict[str, object]:
        return self.shown


@pytest.fixture
def edgewright(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command in this process: (exit code, standard output, standard error)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        out, err = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put something else in the place of bench()."""

    def replace(function: Callable[..., Any]) -> None:
        monkeypatch.setattr("edgewright.bench.bench", function)

    return replace


def failing(error: BaseException) -> Callable[..., Any]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


ROW = {
    "path": "a.gguf", "to": "gguf", "quant": "tq2_0", "bytes": 1_500_000, "ttft_ms": 12.5, "prompt_tokens_per_s": 900.0,
    "prompt_tokens_per_s_sd": 9.0, "tokens_per_s": 412.0, "tokens_per_s_sd": 6.0, "peak_memory": 3e8,
    "device": None,
}  # fmt: skip
BENCH: dict[str, object] = {
    "schema_version": 1, "prompt": 8, "generate": 4, "repeats": 2, "threads": 1, "machine": {"cpu": "x"},
    "artifacts": [ROW], "warnings": ["noisy"],
}  # fmt: skip


def test_no_command_is_help(edgewright: Run) -> None:
    code, out, err = edgewright()
    assert code == 0 and "Commands:" in out and err == ""
    assert edgewright("--help")[1] == out


def test_version(edgewright: Run) -> None:
    code, out, _ = edgewright("--version")
    assert code == 0 and out.strip()[0].isdigit()


@pytest.mark.parametrize(
    "words",
    [
        ["bnch"],
        ["bench"],
        ["bench", "a", "--nothing"],
        ["bench", "a", "--repeats", "x"],
        ["check"],
        ["evaluate", "a", "b"],
    ],
)
def test_usage_errors_are_2(edgewright: Run, words: list[str]) -> None:
    code, out, err = edgewright(*words)
    assert (code, out) == (2, "") and "[EW-100]" in err and "Traceback" not in err
    code, out, err = edgewright(*words, "--json")
    assert code == 2 and json.loads(out)["error"]["code"] == "EW-100" and "[EW-100]" in err


def test_a_near_command_is_named(edgewright: Run) -> None:
    assert "bench" in edgewright("bnch")[2]


def test_arguments_reach_the_function(edgewright: Run, bench: Callable[..., None]) -> None:
    seen: list[object] = []

    def function(*args: object, **kwargs: object) -> Fake:
        seen.extend([args, kwargs])
        return Fake(BENCH)

    bench(function)
    words = ["bench", "a", "b", "--prompt", "8", "--generate", "4", "--repeats", "2", "--threads", "1"]
    code, out, err = edgewright(*words)
    assert code == 0 and err == ""
    assert seen == [(Path("a"), Path("b")), {"prompt": 8, "generate": 4, "repeats": 2, "threads": 1, "loop": "steps"}]
    assert "a.gguf" in out and "412 ± 6" in out and "warning: noisy" in out and "\x1b" not in out


def test_json_is_one_object_and_all_that_is_on_stdout(edgewright: Run, bench: Callable[..., None]) -> None:
    def noisy(*args: object, **kwargs: object) -> Fake:
        print("progress")
        os.write(1, b"a native library\n")
        subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
        return Fake({"schema_version": 1, "nan": float("nan"), "inf": [float("inf")], "path": "x"})

    bench(noisy)
    code, out, err = edgewright("bench", "a", "--json")
    assert code == 0
    assert json.loads(out) == {"schema_version": 1, "nan": None, "inf": [None], "path": "x"}
    assert all(words in err for words in ("progress", "a native library", "a child"))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("RecipeError", 2),
        ("BadInput", 3),
        ("OutOfResources", 4),
        ("GateFailed", 5),
        ("Locked", 6),
        ("Diverged", 7),
        ("Unsafe", 8),
        ("NeedsNetwork", 9),
    ],
)
def test_user_errors_have_their_exit_code_and_no_traceback(
    edgewright: Run, bench: Callable[..., None], name: str, code: int
) -> None:
    kind: type[errors.EdgewrightError] = vars(errors)[name]
    bench(failing(kind("EW-999", "it is wrong", where="a:1:2", expected="right", found="wrong", fix="mend it")))
    found, out, err = edgewright("bench", "a")
    assert (found, out) == (code, "")
    assert err == "a:1:2: it is wrong [EW-999]\n  expected: right\n  found: wrong\n  fix: mend it\n"
    found, out, _ = edgewright("bench", "a", "--json")
    shown = json.loads(out)
    assert found == code and shown["schema_version"] == 1
    assert shown["error"] == {
        "code": "EW-999",
        "exit_code": code,
        "what": "it is wrong",
        "where": "a:1:2",
        "expected": "right",
        "found": "wrong",
        "fix": "mend it",
    }


def test_a_bug_is_one_line_and_70(edgewright: Run, bench: Callable[..., None]) -> None:
    bench(failing(ZeroDivisionError("division by zero\nsecond line")))
    code, out, err = edgewright("bench", "a")
    assert (code, out) == (70, "")
    assert "ZeroDivisionError: division by zero" in err and "--debug" in err and "Traceback" not in err
    assert json.loads(edgewright("bench", "a", "--json")[1])["error"]["exit_code"] == 70


def test_debug_lets_the_exception_through(bench: Callable[..., None]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    bench(failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["bench", "a", "--debug"])
    signal.signal(signal.SIGTERM, before)


def test_memory_and_interrupts(edgewright: Run, bench: Callable[..., None]) -> None:
    bench(failing(MemoryError()))
    code, _, err = edgewright("bench", "a")
    assert code == 4 and "[EW-404]" in err
    bench(failing(KeyboardInterrupt()))
    assert edgewright("bench", "a")[0] == 130


def test_sigterm_is_143_and_cleans_up(tmp_path: Path) -> None:
    code = (
        "import sys, time, edgewright.bench\nfrom pathlib import Path\nfrom edgewright.cli import main\n"
        "def slow(*args, **kwargs):\n"
        "    try:\n        Path('started').touch()\n        time.sleep(60)\n"
        "    finally:\n        Path('cleaned').touch()\n"
        "edgewright.bench.bench = slow\nmain(['bench', 'a'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and (tmp_path / "cleaned").exists() and "Traceback" not in err


def test_a_closed_pipe_is_no_bug() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgewright.cli", "check", "--schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and err == b""


def test_an_interrupted_run_says_how_to_go_on(edgewright: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.training import Interrupted

    monkeypatch.setattr("edgewright.run.run", failing(Interrupted(signal.SIGTERM, 12)))
    code, _, err = edgewright("run", "my recipe.yaml", "data.files=*.txt")
    assert code == 143
    assert "step 12" in err and "edgewright run 'my recipe.yaml' 'data.files=*.txt'" in err


def test_check_prints_all_errors_of_a_recipe(edgewright: Run, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nnmae: x\n")
    code, out, err = edgewright("check", str(path))
    assert (code, out) == (2, "") and f"{path}:2:1: unknown key 'nmae'" in err and "did you mean name?" in err
    code, out, _ = edgewright("check", str(path), "seed=x", "--json")
    shown = json.loads(out)["error"]["errors"]
    assert code == 2 and {error["code"] for error in shown} == {"EW-110", "EW-111", "EW-112"}


def test_check_writes_the_schema(edgewright: Run) -> None:
    code, out, _ = edgewright("check", "--schema")
    assert code == 0 and "stages" in json.loads(out)["properties"]


def test_check_exits_with_the_first_error(edgewright: Run, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "version: 1\nname: x\ndata: {type: files, files: none.txt}\n"
        "stages: [{name: a, student: {type: preset}, budget: {max_steps: 1}}]\n"
    )
    code, out, _ = edgewright("check", str(path))
    assert code == 3 and "FAIL  corpus" in out and "[EW-203]" in out
    code, out, _ = edgewright("check", str(path), "--json")
    assert code == 3 and json.loads(out)["ok"] is False


def test_data_files_may_follow_as_the_shell_expands_them(edgewright: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def evaluate(target: Path, **kwargs: object) -> Fake:
        seen.update(kwargs)
        facts = {"path": "m", "runtime": "torch", "ci95": [1.0, 2.0], "loss": 1.0, "perplexity": 2.7, "bytes": 9}
        return Fake({**facts, "bits_per_byte": 1.5, "tokens": 7})

    monkeypatch.setattr("edgewright.evaluate.evaluate", evaluate)
    code, out, _ = edgewright("evaluate", "m", "--data", "a.txt", "b.txt", "c.txt")
    assert code == 0 and sorted(seen["data"]) == ["a.txt", "b.txt", "c.txt"]  # type: ignore[call-overload]
    assert "bits per byte" in out and "1.5000" in out


def test_a_failed_verification_is_5(edgewright: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Parity(Fake):
        gate: str = "failed"

    shown = {
        "path": "a", "against": "b", "max_abs_diff": 3.0, "kl": 0.5, "kl_ci": [0.4, 0.6], "top1_agreement": 0.5,
        "kl_limit": 0.25, "longest_text": 64, "context_length": 512, "skipped": {"left-padded batch": "no batches"},
        "kl_weights": 0.4375, "kl_runtime": 0.125, "perplexity_ratio": 1.75,
        "greedy_identity": 0.1, "lattice_identity": False, "gate": "failed", "reasons": ["the KL is too large"],
    }  # fmt: skip
    monkeypatch.setattr("edgewright.export.parity.verify", lambda *args, **kwargs: Parity(shown))
    code, out, _ = edgewright("verify", "a", "--against", "b")
    assert code == 5 and "the KL is too large" in out and "lattice bit-exact" in out
    assert all(number in out for number in ("0.438", "0.125", "1.75", "64 of 512", "no batches"))


def test_explain(edgewright: Run) -> None:
    code, out, _ = edgewright("explain", "EW-315")
    assert code == 0 and "pickle" in out and "exit code 8" in out
    assert json.loads(edgewright("explain", "315", "--json")[1])["exit_code"] == 8
    assert edgewright("explain", "EW-000")[0] == 2
