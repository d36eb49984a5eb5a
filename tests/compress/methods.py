"""Every method once, with what is true of it: the table that `test_methods.py` goes through; and a small loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edgewright.compress.choice import LayerChoice
from edgewright.compress.granet import GranetConfig
from edgewright.compress.integer import IntegerConfig
from edgewright.compress.lora import LoraConfig
from edgewright.compress.lost import LostConfig
from edgewright.compress.lowrank import LowRankConfig, ReLoRAConfig
from edgewright.compress.sltrain import SLTrainConfig
from edgewright.compress.sparse import GradualMask, SparseConfig, StaticMask, TwoOfFourMask
from edgewright.compress.ternary import TernaryConfig
from edgewright.method import Method, StepContext

VOCABULARY = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method under one setting."""

    name: str
    config: LayerChoice
    limit: LayerChoice | None = None
    """The setting at which the method's forward is the dense model's; None: there is none."""
    merges: bool = True
    """Whether `finish` gives a model of plain linear layers."""
    quantizes: bool = False
    """Whether `finish` gives a lattice."""
    exact: float = 1e-5
    """Largest relative difference of the finished model's logits from the trained form's."""


CASES = [
    Case(name="granet", config=GranetConfig(update_every=2), limit=GranetConfig(), exact=0.0),
    Case(
        name="granet-gradient",
        config=GranetConfig(density=0.2, initial_density=0.5, regrow="gradient", update_every=3),
        exact=0.0,
    ),
    Case(name="granet-none", config=GranetConfig(density=0.2, regrow="none"), exact=0.0),
    Case(name="integer-q4_0", config=IntegerConfig(), quantizes=True),
    Case(name="integer-q8_0", config=IntegerConfig(format="q8_0"), quantizes=True),
    Case(name="integer-4-bits-of-64", config=IntegerConfig(format="matmulnbits", block=64), quantizes=True),
    Case(name="integer-8-bits-of-128", config=IntegerConfig(format="matmulnbits", bits=8, block=128), quantizes=True),
    Case(name="lora", config=LoraConfig(rank=8), limit=LoraConfig(rank=8)),  # B = 0
    Case(name="lora-dora", config=LoraConfig(rank=4, dora=True, dropout=0.1), limit=LoraConfig(rank=4, dora=True)),
    Case(name="lora-norms", config=LoraConfig(rank_fraction=0.1, alpha=8.0, dropout=0.2, train_norms=True)),
    Case(name="lora-nf4", config=LoraConfig(rank=8, quantize_base="nf4")),
    Case(name="lora-fp4-dora", config=LoraConfig(rank=8, quantize_base="fp4", dora=True)),
    Case(
        name="lost",
        config=LostConfig(rank_fraction=0.25, columns=0.05),
        limit=LostConfig(rank_fraction=1.0, columns=1.0, gamma=0.5, activation="none"),
        merges=False,
    ),
    Case(
        name="lost-merged",
        config=LostConfig(rank=32, columns=0.1, gamma=0.9, activation="none", restart_every=3, rewarm_steps=1),
    ),
    Case(name="lowrank", config=LowRankConfig(rank_fraction=0.25), limit=LowRankConfig(rank_fraction=1.0)),
    Case(name="lowrank-cola", config=LowRankConfig(rank=32, activation="silu", init="cola"), merges=False),
    Case(name="lowrank-restarts", config=LowRankConfig(rank=32, restart_every=3, rewarm_steps=2)),
    Case(name="lowrank-factors", config=LowRankConfig(rank=32, merge=False), merges=False),
    Case(
        name="lowrank-relora",
        config=LowRankConfig(rank=8, relora=ReLoRAConfig(merge_every=3), rewarm_steps=0),
        limit=LowRankConfig(rank=8, relora=ReLoRAConfig(merge_every=100)),  # B = 0
    ),
    Case(name="sparse", config=SparseConfig(), limit=SparseConfig(density=1.0), exact=0.0),
    Case(name="sparse-erk", config=SparseConfig(density=0.25, mask=StaticMask(distribution="erk")), exact=0.0),
    Case(
        name="sparse-erk-plus", config=SparseConfig(density=0.25, mask=StaticMask(distribution="erk_plus")), exact=0.0
    ),
    Case(
        name="sparse-gradual",
        config=SparseConfig(density=0.25, mask=GradualMask()),
        limit=SparseConfig(density=0.01, mask=GradualMask()),  # nothing is pruned at the start
        exact=0.0,
    ),
    Case(
        name="sparse-gradual-uniform",
        config=SparseConfig(density=0.5, mask=GradualMask(end=1.0, prune_every=2, floor=1.0)),
        exact=0.0,
    ),
    Case(name="sparse-2:4", config=SparseConfig(mask=TwoOfFourMask()), exact=0.0),
    Case(name="sparse-2:4-ste", config=SparseConfig(mask=TwoOfFourMask(decay=0.0)), exact=0.0),
    Case(name="sltrain", config=SLTrainConfig(rank=16)),
    Case(
        name="sltrain-spectral",
        config=SLTrainConfig(rank=16, density=0.1, init="spectral", restart_every=3, rewarm_steps=1),
        limit=SLTrainConfig(rank=16, density=1.0, init="spectral"),
    ),
    Case(name="ternary", config=TernaryConfig(), quantizes=True),
    Case(name="ternary-tensor", config=TernaryConfig(granularity="tensor"), quantizes=True),
    Case(name="ternary-group", config=TernaryConfig(granularity="group"), quantizes=True),
    Case(name="ternary-int8-activations", config=TernaryConfig(quantize_activations=True), quantizes=True, exact=0.05),
    # the finished model leaves the rounding of activations to the runtime
    *(
        Case(name=f"ternary-{quantizer}", config=TernaryConfig(quantizer=quantizer), quantizes=True)
        for quantizer in ("median", "twn", "seq_ternary", "seq_2bit", "tequila", "sherry")
    ),
    Case(
        name="ternary-seq_2bit-group",
        config=TernaryConfig(quantizer="seq_2bit", granularity="group", group=64),
        quantizes=True,
    ),
]


def small_model(seed: int = 0) -> PreTrainedModel:
    """A Llama of 2 layers whose sizes all differ (256, 512, keys and values 128), tied head, no dropout."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


def tokens(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(seed))


class Loop:
    """What the trainer does with a method, without everything else."""

    def __init__(self, model: PreTrainedModel, method: Method, total_steps: int = 20, learning_rate: float = 1e-3):
        self.model, self.method, self.total_steps = model, method, total_steps
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.1)
        self.step = 0
        self.rewarmed: list[tuple[int, int]] = []

    def context(self) -> StepContext:
        from edgewright.optim.state import reset_state

        return StepContext(
            step=self.step,
            total_steps=self.total_steps,
            reset_state=lambda parameter, mask: reset_state(self.optimizer, parameter, mask),
            reset_all_state=self.optimizer.state.clear,
            rewarm=lambda steps: self.rewarmed.append((self.step, steps)),
        )

    def run(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            self.method.before_step(self.context())
            batch = tokens(seed=self.step)
            loss = self.model(input_ids=batch, labels=batch).loss
            penalty = self.method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            self.method.after_backward(self.context())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.method.after_step(self.context())
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "method": self.method.state_dict(),
                "step": self.step,
                "rng": torch.get_rng_state(),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])


def prepared(config: LayerChoice, seed: int = 0) -> tuple[PreTrainedModel, Method]:
    model = small_model(seed)
    method = config.build()
    method.prepare(model)
    return model, method


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens(seed=99)).logits.double()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
