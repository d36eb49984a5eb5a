"""Is speculative decoding the target's own text, in every runtime, and what does our loop cost?

    python benchmarks/drafts_lossless.py [--draft DIR] [--runtimes torch llamacpp genai onnx openvino] [--folder DIR]

Target: examples/teacher in fp32; draft: --draft, or the teacher's own first layer. Bars:

* greedy: the same tokens as plain decoding for at least 200 prompts of 64 tokens, in every runtime (chat and code
  prompts of ../shared/data/prompts where they are, and held-out code);
* draft == target: acceptance 1 and gamma + 1 tokens a round, greedy; at least 0.99, drawn;
* drawn: the joint of the first two tokens of 20,000 texts against the target's law, |z| < 4, for drafts that draw and
  for greedy ones; and with the wrong rule (a rejected token drawn from p) z far beyond;
* the loop: what is not spent in the two models' passes, at most 10 % of them; cutting back the caches and drawing
  tokens (which plain decoding does as well) are counted as the loop's and shown apart. Runtimes take turns; medians.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import ROOT, header, interleaved

import edgewright
from edgewright.export.runtimes import Session, open_session
from edgewright.speculate import speculate
from edgewright.speculative import Counts, DraftModel, Sampler, decode, sampling
from edgewright.speculative.prompts import held_out_prompts

TEACHER = ROOT / "examples" / "teacher"
SHARED = ROOT.parent / "shared" / "data" / "prompts"
TARGETS = {"torch": None, "llamacpp": "gguf", "genai": "genai", "onnx": "onnx", "openvino": "openvino"}
CHAT_AND_CODE = ("spec_bench_question.jsonl.xz", "eagle_humaneval_question.jsonl.xz")
PROMPT_TOKENS = 128
TOP_K = 8
Pair = tuple[Session, Session]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, help="a draft for examples/teacher; by default its first layer")
    parser.add_argument("--runtimes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--folder", type=Path, help="keeps the exported files for the next time")
    parser.add_argument("--held-out", type=int, default=60, help="prompts of held-out code beside the others")
    parser.add_argument("--limit", type=int, default=160, help="prompts of each of the other files")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = given.folder or Path(scratch)
        header()
        draft = given.draft or first_layer(folder / "first_layer")
        folder.mkdir(parents=True, exist_ok=True)
        files = prompt_files(folder, given.held_out)
        paths = {name: tuple(exported(model, name, folder) for model in (TEACHER, draft)) for name in given.runtimes}
        missed = [bar for name in paths for bar in greedy(name, paths[name], files, given)]
        pairs: dict[str, Pair] = {name: opened(stack, both, given.threads) for name, both in paths.items()}
        missed += [bar for name, both in paths.items() for bar in its_own_draft(name, both, pairs[name], given)]
        missed += drawn(pairs, given.rounds)
        missed += overhead(pairs, given)
        print(f"bars missed: {', '.join(missed) or 'none'}")
        raise SystemExit(bool(missed))


def opened(stack: ExitStack, both: Sequence[Path], threads: int | None) -> Pair:
    target, draft = (stack.enter_context(open_session(path, threads=threads, shares_cores=True)) for path in both)
    return target, draft


def first_layer(directory: Path) -> Path:
    """The teacher without its later layers, where there is none yet."""
    if not (directory / "config.json").exists():
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="bfloat16")
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        model.save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TEACHER / name, directory / name)
    return directory


def exported(model: Path, runtime: str, folder: Path) -> Path:
    to = TARGETS[runtime]
    if to is None:
        return model
    out = folder / f"{model.name}-{to}"
    if not out.exists():
        width = "f32" if to == "gguf" else "fp32"
        edgewright.export(model, to=to, quant=width, out=out, verify=False)
    return next(iter(out.glob("*.gguf")), out)


def prompt_files(folder: Path, held_out: int) -> list[Path]:
    """The prompts beside the repository, and a file of held-out code; more of it where they are not."""
    found = [SHARED / name for name in CHAT_AND_CODE if (SHARED / name).exists()]
    code = folder / "held-out.txt"
    texts = [prompt.text for prompt in held_out_prompts(held_out if found else 200)]
    code.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    return [*found, code]


def greedy(name: str, both: Sequence[Path], files: list[Path], given: argparse.Namespace) -> list[str]:
    result = speculate(
        *both,
        prompts=files,
        limit=given.limit,
        gamma=given.gamma,
        ngram=3,
        max_new_tokens=given.tokens,
        max_prompt_tokens=PROMPT_TOKENS,
        threads=given.threads,
    )
    whole = [row for row in result.rows if row.prompts == "all"]
    for row in whole:
        rate, tau = row.counts.acceptance_rate, row.counts.block_efficiency
        print(
            f"{name:9s} {row.proposer:5s} greedy: {row.texts} prompts x {given.tokens}, "
            f"same text {row.token_identity:.2%}, accepted {rate:.3f}, {tau:.3f} tokens a round, "
            f"speed-up {row.speedup:.2f}"
        )
    for parting in result.divergences:
        each = parting.divergence
        print(f"  {parting.where}: token {each.position}, margin {each.margin:.2e}, noise {each.noise:.2e}")
    same = all(row.token_identity == 1 for row in whole)
    return ([] if same else [f"{name} greedy identity"]) + ([] if whole[0].texts >= 200 else [f"{name} prompts"])


def its_own_draft(name: str, both: Sequence[Path], pair: Pair, given: argparse.Namespace) -> list[str]:
    """The target with itself, opened a second time, as its draft."""
    target, rounds = pair[0], 13
    with open_session(both[0], threads=given.threads, shares_cores=True) as twin:
        found = {}
        for sampler in (Sampler(), Sampler(temperature=1.0, seed=1)):
            counts = Counts()
            for prompt in held_out_prompts(10):
                tokens = [target.start_id, *target.tokenize(prompt.text)][:PROMPT_TOKENS]
                counts += decode(
                    target,
                    DraftModel(twin, sampler),
                    tokens,
                    max_new_tokens=rounds * (given.gamma + 1),
                    gamma=given.gamma,
                    sampler=sampler,
                    stop_at_eos=False,
                ).counts
            found[sampler.greedy] = counts
    exact, drawn = found[True], found[False]
    print(
        f"{name:9s} draft == target: greedy accepted {exact.acceptance_rate}, {exact.block_efficiency} tokens a round; "
        f"drawn accepted {drawn.acceptance_rate:.4f}"
    )
    right = (exact.acceptance_rate, exact.block_efficiency) == (1.0, given.gamma + 1)
    assert drawn.acceptance_rate is not None
    return [] if right and drawn.acceptance_rate >= 0.99 else [f"{name} draft == target"]


def drawn(pairs: dict[str, Pair], rounds: int) -> list[str]:
    """Chi-square of two tokens, in the runtime that is fastest to call."""
    name = next(each for each in ("llamacpp", "onnx", "genai", "openvino", "torch") if each in pairs)
    target, draft = pairs[name]
    prompt = [target.start_id, *target.tokenize("def ")]
    missed = []
    for kind in ("drawn drafts", "greedy drafts", "the wrong rule"):
        right, sampling_residual = kind != "the wrong rule", sampling.residual
        try:
            if not right:
                sampling.residual = lambda mass, drafted: mass  # type: ignore[assignment]
            z, freedom, rate = z_of_joint(target, draft, prompt, rounds, greedy_draft=kind == "greedy drafts")
        finally:
            sampling.residual = sampling_residual
        print(f"{name:9s} {kind}: z {z:+.2f} (df {freedom}) over {rounds:,} texts, accepted {rate:.3f}")
        if right != (abs(z) < 4):
            missed.append(f"chi-square of {kind}")
    return missed


def z_of_joint(
    target: Session, draft: Session, prompt: list[int], rounds: int, *, greedy_draft: bool
) -> tuple[float, int, float]:
    """The joint of the first two tokens against the law that single passes of the target give, top-k in float64."""
    first = law(target, prompt)
    joint = {
        (one, other): mass * second
        for one, mass in first.items()
        for other, second in law(target, [*prompt, one]).items()
    }
    sampler = Sampler(temperature=1.0, top_k=TOP_K, seed=5)
    proposer = DraftModel(draft, sampler, width=target.vocab_size, greedy=greedy_draft)
    seen = dict.fromkeys(joint, 0)
    counts = Counts()
    for _ in range(rounds):
        found = decode(target, proposer, prompt, max_new_tokens=5, gamma=4, sampler=sampler, stop_at_eos=False)
        seen[found.tokens[0], found.tokens[1]] += 1  # a token that the law excludes is an error here
        counts += found.counts
    often = [cell for cell, mass in joint.items() if rounds * mass >= 5]
    rest = [cell for cell in joint if cell not in set(often)]
    cells = [[cell] for cell in often] + ([rest] if rounds * sum(joint[cell] for cell in rest) >= 5 else [])
    chi2 = 0.0
    for group in cells:
        expected = rounds * sum(joint[cell] for cell in group)
        chi2 += (sum(seen[cell] for cell in group) - expected) ** 2 / expected
    freedom = len(cells) - 1
    assert counts.acceptance_rate is not None
    return (chi2 - freedom) / (2 * freedom) ** 0.5, freedom, counts.acceptance_rate


def law(target: Session, tokens: list[int]) -> dict[int, float]:
    """Probabilities of the next token, of the `TOP_K` likeliest ones."""
    target.rewind(0)
    rows = target.append(tokens, "last")
    assert rows is not None
    logits = rows[0].astype(np.float64)
    kept = np.argsort(-logits)[:TOP_K]
    mass = np.exp(logits[kept] - logits[kept[0]])
    return dict(zip(kept.tolist(), (mass / mass.sum()).tolist(), strict=True))


def overhead(pairs: dict[str, Pair], given: argparse.Namespace) -> list[str]:
    prompts = [prompt.text for prompt in held_out_prompts(8)]
    timed = {name: (Timed(target), Timed(draft)) for name, (target, draft) in pairs.items()}

    def measure(case: str) -> dict[str, float]:
        name, kind = case.split(", ")
        clocks = timed[name]
        target, draft = pairs[name]
        sampler = Sampler(temperature=0.0 if kind == "greedy" else 1.0, top_p=1.0)
        drawing = timed_draws(sampler)
        total = passes = rewinds = 0.0
        for text in prompts:
            tokens = [target.start_id, *target.tokenize(text)][:64]
            proposer = DraftModel(draft, sampler, width=target.vocab_size)
            for clock in clocks:
                clock.forget()
            started = time.perf_counter()
            decode(
                target,
                proposer,
                tokens,
                max_new_tokens=given.tokens,
                gamma=given.gamma,
                sampler=sampler,
                stop_at_eos=False,
            )
            total += time.perf_counter() - started
            passes += sum(clock.passes for clock in clocks)
            rewinds += sum(clock.rewinds for clock in clocks)
        return {"all": (total - passes) / passes, "rewinds": rewinds / passes, "draws": sum(drawing) / passes}

    cases = [f"{name}, {kind}" for kind in ("greedy", "drawn") for name in pairs]
    for case in cases:
        measure(case)  # warm-up
    found = interleaved(cases, measure, given.repeats)
    missed = []
    for case, figures in found.items():
        whole, cut, draws = (median(figures[name]) for name in ("all", "rewinds", "draws"))
        spread = f"[{min(figures['all']):.1%} - {max(figures['all']):.1%}]"
        print(
            f"loop over the two models' passes, {case}: {whole:.1%} {spread} (bar 10 %), "
            f"of it rewinds {cut:.1%}, draws {draws:.1%}"
        )
        if whole > 0.1:
            missed.append(f"loop, {case}")
    for clocks in timed.values():
        for clock in clocks:
            clock.remove()
    return missed


def timed_draws(sampler: Any) -> list[float]:
    """The seconds of every distribution and draw of a sampler, as they come."""
    seconds: list[float] = []
    for name in ("distribution", "draw"):
        method = getattr(sampler, name)

        def timed(given: np.ndarray, method: Any = method) -> Any:
            started = time.perf_counter()
            result = method(given)
            seconds.append(time.perf_counter() - started)
            return result

        setattr(sampler, name, timed)
    return seconds


class Timed:
    """Counts the seconds in a session's passes and in its rewinds."""

    def __init__(self, session: Session) -> None:
        self.session: Any = session
        self.append, self.rewind = session.append, session.rewind
        self.session.append, self.session.rewind = self._append, self._rewind
        self.forget()

    def forget(self) -> None:
        self.passes = self.rewinds = 0.0

    def remove(self) -> None:
        del self.session.append, self.session.rewind

    def _append(self, tokens: Sequence[int], logits: Any = "last") -> Any:
        started = time.perf_counter()
        rows = self.append(tokens, logits)
        self.passes += time.perf_counter() - started
        return rows

    def _rewind(self, length: int) -> None:
        started = time.perf_counter()
        self.rewind(length)
        self.rewinds += time.perf_counter() - started


if __name__ == "__main__":
    main()
