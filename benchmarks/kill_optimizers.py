"""kill -9 at random moments of a training with every optimizer, the same command again: the same bits?

    python benchmarks/kill_optimizers.py [--kills 2] [--steps 40] [--only NAME]

A small Llama, a checkpoint every 7 steps, a new projection every 5. Each optimizer trains once without a kill, and then
`--kills` times with one at a moment drawn uniformly between the first step and the end, checkpoints and final write
included (start-up: kill_resume.py); a kill that finds the run done is drawn again. Compared by SHA-256: the final
weights, and the last checkpoint's weights, optimizer state and codes; as exact floats: loss and gradient norm of every
step, and the evaluations. Bar: all are identical.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from common import ROOT, header

RECIPE = f"""
version: 1
name: kill
seed: 3
data:
  type: files
  files: ["{ROOT}/sdk/optim/*.py"]
  tokenizer: {{type: pretrained, path: {ROOT}/examples/teacher}}
  sequence_length: 64
  held_out: 0.1
stages:
  - name: base
    student: {{type: preset, preset: llama-1m, hidden_size: 128, intermediate_size: 256}}
    budget: {{max_steps: 40}}
evaluate: null
bench: null
"""
SETTINGS = "per_device_train_batch_size: 4, save_steps: 7, eval_steps: 20, eval_sequences: 8"
GAP = "update_proj_gap: 5"
RELEASED = "gradient_release: true, max_grad_norm: null"
CASES = {
    "adamw": ("type: adamw", ""),
    "adamw, bf16 weights": ("type: adamw", "weights: bf16"),
    "adamw_8bit": ("type: adamw_8bit", ""),
    "muon": ("type: muon", ""),
    "apollo": (f"type: apollo, {GAP}", ""),
    "apollo, bf16 states": (f"type: apollo, {GAP}, states: bf16", ""),
    "apollo, int8 states, released": (f"type: apollo, {GAP}, states: int8", RELEASED),
    "apollo_mini": (f"type: apollo_mini, {GAP}", ""),
    "apollo_mini, int8 weights": (f"type: apollo_mini, {GAP}", f"weights: int8, {RELEASED}"),
    "galore": (f"type: galore, {GAP}", ""),
    "galore, int8 states": (f"type: galore, {GAP}, states: int8", ""),
    "q_galore, int8 weights": (f"type: q_galore, {GAP}", "weights: int8"),
    "fira": (f"type: fira, {GAP}", ""),
    "gradnorm_lorp": (f"type: gradnorm_lorp, {GAP}", ""),
}


def train(recipe: Path, folder: Path, case: str, steps: int) -> None:
    """The process that is killed."""
    import edgewright

    optimizer, training = CASES[case]
    settings = f"{SETTINGS}, {training}".rstrip(", ")
    edgewright.run(
        recipe,
        f"output_dir={folder}",
        f"stages.base.budget.max_steps={steps}",
        f"stages.base.optimizer={{{optimizer}}}",
        f"stages.base.training={{{settings}}}",
        say=lambda line: None,
    )


def outcome(folder: Path) -> tuple[str, ...]:
    """Hashes of the final weights, of all tensors of the last checkpoint, and of the curves."""
    stage = folder / "stages/base"
    last = sorted((stage / "checkpoints").glob("step-*"))[-1]
    tensors = [stage / "model/model.safetensors", *sorted(last.rglob("*.safetensors"))]
    entries = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "eval_loss")
    curve = [(entry["step"], n, float(entry[n]).hex()) for entry in entries for n in names if n in entry]
    return (
        *(f"{path.relative_to(stage)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in tensors),
        hashlib.sha256(repr(curve).encode()).hexdigest(),
    )


def start(*arguments: object) -> BaseProcess:
    """A process of its own, forked from this one, which has imported all that takes long."""
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    return process


def begun(folder: Path, process: BaseProcess) -> bool:
    """Wait for the first step; False where the process ended before."""
    metrics = folder / "stages/base/metrics.jsonl"
    while process.is_alive():
        if metrics.exists() and '"loss"' in metrics.read_text():
            return True
        time.sleep(0.01)
    return False


def finish(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"a training ended with {process.exitcode}")


def kill_once(folder: Path, seconds: float, moments: random.Random, *arguments: object) -> str:
    """Start, kill at a random moment after the first step, and say where that was; drawn again if it came too late."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        process = start(*arguments)
        assert begun(folder, process), "it ran before"
        moment = moments.uniform(0.0, seconds)
        process.join(moment)
        if process.is_alive():
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            lines = (folder / "stages/base/metrics.jsonl").read_text().count('"loss"')
            return f"{moment:4.1f} s, step {lines}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", action="append", choices=CASES)
    arguments = parser.parse_args()
    header()
    for module in ("bitsandbytes", "edgewright.stage", "torch._dynamo", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    same = tried = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        recipe = work / "recipe.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        for case in arguments.only or CASES:
            moments = random.Random(case)
            whole = start(recipe, work / "whole", case, arguments.steps)
            begun(work / "whole", whole)
            since = time.monotonic()
            finish(whole)
            seconds = time.monotonic() - since
            expected = outcome(work / "whole")
            found = []
            for _ in range(arguments.kills):
                again = (recipe, work / "killed", case, arguments.steps)
                where = kill_once(work / "killed", seconds, moments, *again)
                finish(start(*again))
                equal = outcome(work / "killed") == expected
                same, tried = same + equal, tried + 1
                found.append(f"{where}: {'identical' if equal else 'DIFFERENT'}")
            print(f"{case:30} killed after {'; after '.join(found)}", flush=True)
            for folder in ("whole", "killed"):
                shutil.rmtree(work / folder)
    print(f"{same} of {tried} bit-identical in weights, optimizer state and curves")
    sys.exit(same != tried)


if __name__ == "__main__":
    main()
