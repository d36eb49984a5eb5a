"""Does `plan --speculative` know beforehand what speculative decoding will win?

    python benchmarks/drafts_predict.py [--random 512x8 ...] [--target DIR ...] [--pair TARGET DRAFT ...] [--folder DIR]

For each pair of files in each runtime: costs by the probe, in a process of its own, before anything else; acceptance
by position on one half of the prompts; then the speed-up over plain decoding on the other half, prompt by prompt in
turns, in a third process. Bar: predicted and measured speed-up within 15 % of each other for at least eight pairs, and
of the pairs that do not pay with any length (at least two) both say so. Beside it, what would have been predicted from
the acceptance of the very text that was timed: what is then still off is the costs' share of the error.

Pairs of --target and --random (and examples/teacher, always) are synthetic: the later layers' part of the residual
stream is scaled down in the target, and the draft is its first layers. So the draft is right more often than a trained
one of its size would be; what a step takes is not changed. Pairs of --pair are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, header, worker

TEACHER = ROOT / "examples" / "teacher"
FILES = (("genai", "fp32"), ("genai", "int4"), ("gguf", "q8_0"), ("openvino", "int8"))
GAMMAS = (1, 2, 4, 8)
CHEAP, DEAR = 0.25, 0.75
"""Shares of the target's layers that a synthetic draft has: one that may pay, and one that cannot."""
BAR = 0.15


@dataclass(frozen=True)
class Pair:
    name: str
    target: Path
    draft: Path


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, action="append", default=[], help="a trained model directory")
    parser.add_argument("--random", action="append", default=[], help="WIDTHxLAYERS: a random target of that size")
    parser.add_argument("--pair", type=Path, nargs=2, action="append", default=[], help="a target and its draft")
    parser.add_argument("--files", nargs="+", default=[f"{to}:{quant}" for to, quant in FILES])
    parser.add_argument("--folder", type=Path, help="keeps models and exports for the next time")
    parser.add_argument("--prompts", type=int, default=16, help="in each half")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt, at most")
    parser.add_argument("--scale", type=float, default=0.3, help="of what later layers add, in synthetic targets")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each probe")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        header()
        rows = [row for pair in pairs(given, folder) for row in measured(pair, given, folder)]
    raise SystemExit(bool(summary(rows)))


def pairs(given: argparse.Namespace, folder: Path) -> Iterator[Pair]:
    targets = [TEACHER, *given.target]
    targets += [random_target(folder / f"random-{size}", size) for size in given.random]
    for target in targets:
        for share in (CHEAP, DEAR):
            yield synthetic(target, share, given.scale, folder)
    for target, draft in given.pair:
        yield Pair(f"{target.name} + {draft.name}", target, draft)


def random_target(directory: Path, size: str) -> Path:
    """A Llama with random weights and the teacher's tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width, layers = map(int, size.split("x"))
    if not (directory / "config.json").exists():
        config = AutoConfig.from_pretrained(TEACHER)
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 3 * width, layers
        config.num_attention_heads = config.num_key_value_heads = width // config.head_dim
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        copy_tokenizer(TEACHER, directory)
    return directory


def synthetic(source: Path, share: float, scale: float, folder: Path) -> Pair:
    """A target whose later layers say little, and its first layers as the draft."""
    import torch
    from transformers import AutoModelForCausalLM

    name = f"{source.name}, first {share:.0%} of its layers"
    target, draft = (folder / f"{source.name}-{share:g}-{scale:g}-{role}" for role in ("target", "draft"))
    if not (draft / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        kept = max(1, round(share * model.config.num_hidden_layers))
        with torch.no_grad():
            for layer in model.model.layers[kept:]:
                layer.self_attn.o_proj.weight.mul_(scale)
                layer.mlp.down_proj.weight.mul_(scale)
        model.save_pretrained(target)
        model.model.layers = model.model.layers[:kept]
        model.config.num_hidden_layers = kept
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:kept]
        model.save_pretrained(draft)
        for directory in (target, draft):
            copy_tokenizer(source, directory)
    return Pair(name, target, draft)


def copy_tokenizer(source: Path, directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def measured(pair: Pair, given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each file: predictions and measurements by gamma."""
    from edgewright.planner.speculative import predict
    from edgewright.planner.speculative_files import Wanted
    from edgewright.planner.speculative_plan import plan_speculative

    for file in given.files:
        to, quant = file.split(":")
        target, draft = (exported(model, to, quant, folder) for model in (pair.target, pair.draft))
        wanted = Wanted(target=target, draft=draft, context=given.context + given.tokens // 2)
        costs = plan_speculative(wanted, seconds=given.seconds).files[0].drafts[0].costs
        request = {
            "target": str(target), "draft": str(draft), "prompts": given.prompts, "tokens": given.tokens,
            "context": given.context,
        }  # fmt: skip
        found = worker(__file__, "--worker", json.dumps(request))
        by_position = found["by_position"]
        row: dict[str, Any] = {"pair": pair.name, "file": f"{to} {quant}", "gammas": {}, "known": {}}
        for gamma in GAMMAS:
            prediction = predict(costs, by_position, gamma)
            row["gammas"][gamma] = (prediction, found["speedups"][str(gamma)])
            row["known"][gamma] = predict(costs, found["of_timed_text"], gamma).speedup
        ratio = statistics.median(costs.draft) / statistics.median(costs.verify[0])
        print(f"{pair.name}, {row['file']}: c {ratio:.2f}, accepted {by_position[0]:.2f} at first")
        for gamma, (prediction, speedup) in row["gammas"].items():
            print(
                f"    gamma {gamma}: predicted {prediction.speedup:.2f} "
                f"({prediction.low:.2f} to {prediction.high:.2f}), measured {speedup:.2f}, "
                f"off by {prediction.speedup / speedup - 1:+.1%}, with the acceptance of the timed text by "
                f"{row['known'][gamma] / speedup - 1:+.1%}",
                flush=True,
            )
        yield row


def exported(model: Path, to: str, quant: str, folder: Path) -> Path:
    import edgewright

    out = folder / f"{model.name}-{to}-{quant}"
    if not out.exists():
        edgewright.export(model, to=to, quant=quant, out=out, verify=False)
    return next(iter(out.glob("*.gguf")), out)


def measure(*, target: str, draft: str, prompts: int, tokens: int, context: int) -> dict[str, Any]:
    """In a process of its own: acceptance on one half of the prompts, speed on the other."""
    from edgewright.export.runtimes import open_session
    from edgewright.export.runtimes.spinning import SETTLE_SECONDS
    from edgewright.machine import available_cores
    from edgewright.speculative import Counts, DraftModel, Sampler, decode, plain
    from edgewright.speculative.prompts import held_out_prompts

    sampler = Sampler()
    with (
        open_session(target, threads=available_cores(), shares_cores=True) as judge,
        open_session(draft, threads=available_cores(), shares_cores=True) as helper,
        open_session(target, threads=available_cores()) as alone,
    ):

        def plainly(text: Sequence[int]) -> float:
            found = plain(alone, text, max_new_tokens=tokens, sampler=sampler, stop_at_eos=False)
            time.sleep(SETTLE_SECONDS)
            return found.seconds

        texts = [judge.tokenize(prompt.text)[: context - 1] for prompt in held_out_prompts(2 * prompts)]
        texts = [[judge.start_id, *text] for text in texts]
        proposer = DraftModel(helper, sampler)

        def speculative(text: Sequence[int], gamma: int) -> Any:
            return decode(judge, proposer, text, max_new_tokens=tokens, gamma=gamma, sampler=sampler, stop_at_eos=False)

        counts, timed = Counts(), Counts()
        for text in texts[::2]:
            counts += speculative(text, max(GAMMAS)).counts
        seconds = dict.fromkeys((0, *GAMMAS), 0.0)
        plainly(texts[1])
        for number, text in enumerate(texts[1::2]):
            order = list(seconds)
            for gamma in order if number % 2 else reversed(order):
                if gamma:
                    decoded = speculative(text, gamma)
                    seconds[gamma] += decoded.seconds
                    timed += decoded.counts if gamma == max(GAMMAS) else Counts()
                else:
                    seconds[0] += plainly(text)
    return {
        "by_position": _rates(counts),
        "of_timed_text": _rates(timed),
        "speedups": {gamma: seconds[0] / seconds[gamma] for gamma in GAMMAS},
    }


def _rates(counts: Any) -> list[float]:
    return [0.0 if rate is None else rate for rate in counts.by_position]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that were missed."""
    errors = {
        f"{row['pair']}, {row['file']}, gamma {gamma}": prediction.speedup / speedup - 1
        for row in rows
        for gamma, (prediction, speedup) in row["gammas"].items()
    }
    missed = [f"{name}: {error:+.1%}" for name, error in errors.items() if abs(error) > BAR]
    typical = statistics.median(abs(error) for error in errors.values())
    print(
        f"{len(rows)} pairs, {len(errors)} predictions: off by {typical:.1%} (median), {len(missed)} beyond {BAR:.0%}"
    )
    known = [row["known"][gamma] / row["gammas"][gamma][1] - 1 for row in rows for gamma in row["gammas"]]
    beyond = sum(abs(error) > BAR for error in known)
    print(f"with the acceptance of the timed text: off by {statistics.median(map(abs, known)):.1%}, {beyond} beyond")
    refused = 0
    for row in rows:
        predicted = max(prediction.speedup for prediction, _ in row["gammas"].values())
        real = max(speedup for _, speedup in row["gammas"].values())
        refused += real <= 1
        verdict = "agree" if (predicted > 1) == (real > 1) else "DISAGREE"
        print(f"{row['pair']}, {row['file']}: best predicted {predicted:.2f}, measured {real:.2f}: {verdict}")
        if verdict != "agree":
            missed.append(f"{row['pair']}, {row['file']}: the verdict")
    if len(rows) < 8:
        missed.append(f"only {len(rows)} pairs")
    if refused < 2:
        missed.append(f"only {refused} pairs that do not pay")
    print(f"bars missed: {'; '.join(missed) or 'none'}")
    return missed


if __name__ == "__main__":
    main()
