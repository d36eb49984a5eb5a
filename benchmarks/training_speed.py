"""Training speed on the CPU against `transformers.Trainer`: same model, batch, precision, clipping, optimizer.

    python benchmarks/training_speed.py [--repeats 3] [--steps 12]

A Llama of 20.5M parameters (hidden 384, 8 layers, vocabulary 8,192), batch 16 x 256, bf16, AdamW. Every measurement is
a process of its own, in turn: ours as `edgewright run` decides by itself; the Trainer with its defaults (bf16 as well,
so that precision is the same); the Trainer at its best (fused AdamW, bf16, torch_compile). Compilation and the first
steps are not counted; everything else of a step is. Bars: >= 1.2x the defaults, >= 1.05x the best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import header, interleaved, median_line, worker

from edgewright.method import Method

BATCH, LENGTH, VOCABULARY, WARM = 16, 256, 8192, 4
PEERS = {"trainer": 1.2, "trainer-best": 1.05}


def model():  # noqa: ANN201 - a PreTrainedModel; transformers is imported late
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def ours(steps: int, methods: Sequence[Method] = ()) -> list[float]:
    """Seconds of each step of our loop, with methods of compression if any."""
    import numpy as np
    import torch

    from edgewright.checkpoint import TrainState
    from edgewright.data import Batches, TokenStream
    from edgewright.metrics import Metrics
    from edgewright.objective import NextToken
    from edgewright.optim.adamw import AdamWConfig
    from edgewright.schedule import CosineConfig
    from edgewright.trainer import Job, Trainer, TrainingModule
    from edgewright.training import StopRequest, TrainingConfig, decide, memory_decisions
    from edgewright.world import ALONE

    tokens = np.random.default_rng(0).integers(1, VOCABULARY, 2_000_000).astype(np.uint16)
    stream = TokenStream(tokens=tokens, documents=1, bytes=len(tokens))
    settings = TrainingConfig(
        per_device_train_batch_size=BATCH, eval_steps=0, save_steps=10**9, save_minutes=1e9, eval_sequences=1
    )
    network = model()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    for method in methods:
        method.prepare(network)
    decisions = memory_decisions(settings) | decide(settings, parameters=parameters, tokens=20 * parameters)
    state, objective = TrainState(decisions=decisions), NextToken()
    module = TrainingModule(network, objective, getattr(torch, decisions["precision"]))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=network,
            replica=ALONE.replicate(module, settings.sharding),
            objective=objective,
            methods=list(methods),
            optimizer=AdamWConfig(learning_rate=1e-3, weight_decay=0.0).build(network),
            learning_rate=1e-3,
            schedule=CosineConfig(),
            batches=Batches(stream, sequence_length=LENGTH, seed=0, start_id=0, eos_id=0),
            held_out=None,
            bytes_per_token=1.0,
            total_steps=steps,
            settings=settings,
            directory=Path(folder),
            extra_files=lambda path: None,
        )
        metrics = Metrics(
            Path(folder) / "metrics.jsonl", name="bench", logging_steps=10**9, save_steps=10**9, say=lambda line: None
        )
        ends = [time.perf_counter()]
        step = metrics.step
        metrics.step = lambda *a, **k: (step(*a, **k), ends.append(time.perf_counter()))  # type: ignore[method-assign]
        Trainer(job, state, metrics, StopRequest()).train()
    return [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]


def trainer(steps: int, *, best: bool) -> list[float]:
    """Seconds of each step of `transformers.Trainer`."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            if not self.ends:
                self.ends.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ends.append(time.perf_counter())

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, VOCABULARY, (BATCH * steps, LENGTH), generator=generator)
    fastest = {"optim": "adamw_torch_fused", "torch_compile": True} if best else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **fastest,
        )
        clock = Clock()
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model(), args=arguments, train_dataset=data, callbacks=[clock]).train()
    return [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]


def measure(name: str, steps: int) -> None:
    """The worker: print tokens per second."""
    run = {
        "ours": lambda: ours(steps),
        "trainer": lambda: trainer(steps, best=False),
        "trainer-best": lambda: trainer(steps, best=True),
    }
    seconds = run[name]()[WARM:]
    print(json.dumps({"tokens_per_s": BATCH * LENGTH / statistics.median(seconds)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.steps)
        return
    header()
    names = ["ours", *PEERS]
    results = interleaved(
        names, lambda name: worker(__file__, "--worker", name, "--steps", str(arguments.steps)), arguments.repeats
    )
    for name in names:
        print(f"{name:14} {median_line(results[name]['tokens_per_s'], 'tokens/s')}")
    missed = False
    for peer, bar in PEERS.items():
        pairs = zip(results["ours"]["tokens_per_s"], results[peer]["tokens_per_s"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        missed |= ratio < bar
        print(f"ours / {peer}: {ratio:.2f} (bar {bar})")
    sys.exit(missed)


if __name__ == "__main__":
    main()
