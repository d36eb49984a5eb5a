"""The sizes at which `quality.py` trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgewright.student import PresetStudentConfig

SEQUENCE = 256
Section = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A size of model, and what goes with it."""

    name: str
    preset: str
    sizes: dict[str, int]
    """Put over the preset's."""
    vocabulary: int
    batch: int
    accumulation: int = 1
    rates: tuple[float, ...]
    """Learning rates that the dense model tries."""
    rank: int
    """Of low-rank factors: at most 60 % of the linear parameters."""
    lost_rank: int
    restart_every: int = 200
    judged_tokens: int = 100_000
    """Held-out tokens, in windows drawn at random from all held-out text; the same for every model and file."""
    tokens_per_parameter: float = 20.0
    """Of all parameters, embedding included. Shorter runs rank methods by noise."""

    def student(self, width: float = 1.0) -> Section:
        """The `student:` section of a model whose hidden and intermediate sizes are `width` of the full ones."""
        full = PresetStudentConfig.model_validate({"preset": self.preset, **self.sizes}).sizes()
        scaled = {key: round(full[key] * width) for key in ("hidden_size", "intermediate_size")}
        return {"type": "preset", "preset": self.preset, **self.sizes, **scaled}

    def shape(self, width: float = 1.0) -> dict[str, int]:
        """All sizes of that model."""
        return PresetStudentConfig.model_validate(self.student(width)).sizes()

    def linear(self, width: float = 1.0) -> int:
        """Weights of its linear layers but the head; it has as many key and value heads as heads."""
        shape = self.shape(width)
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        return shape["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)

    def embedding(self, width: float = 1.0) -> int:
        """Weights of its token embedding, which is the head as well."""
        return self.vocabulary * self.shape(width)["hidden_size"]

    def attention(self, width: float = 1.0) -> int:
        """Multiply-adds of attention for one token, over half of the sequence, as it is causal."""
        shape = self.shape(width)
        return shape["num_hidden_layers"] * shape["hidden_size"] * (SEQUENCE + 1)

    @property
    def parameters(self) -> int:
        """Of the full dense model, embedding included."""
        return PresetStudentConfig.model_validate(self.student()).parameters(self.vocabulary)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch * self.accumulation * SEQUENCE

    @property
    def steps(self) -> int:
        """Optimizer steps of the dense run."""
        return math.ceil(self.tokens_per_parameter * self.parameters / self.step_tokens)


SCALES = {
    "small": Scale(
        name="small",
        preset="llama-1m",
        # Rows of 256, which GGUF's ternary blocks hold; a vocabulary that has the share of the whole (13 %) that 8,192
        # tokens have of a model of 33M.
        sizes={"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
        vocabulary=512,
        batch=16,
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
        rank=76,
        lost_rank=64,
    ),
    "smoke": Scale(
        name="smoke",
        preset="llama-1m",
        sizes={"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
        vocabulary=512,
        batch=2,
        rates=(2e-3, 4e-3),
        rank=76,
        lost_rank=64,
        restart_every=12,
        judged_tokens=4_000,
        tokens_per_parameter=0.05,
    ),
    "gpu": Scale(
        name="gpu",
        preset="llama-60m",
        sizes={},
        vocabulary=8192,
        batch=256,
        rates=(1e-3, 2e-3, 4e-3),
        rank=128,
        lost_rank=128,
    ),
}
"""small: two CPU cores. smoke: whether everything runs, no more.

gpu: 58.7M parameters, 54.5M of them in linear layers, the smallest size of the papers; give it a corpus of 300M tokens
or more, or it goes over it again and again (the table says how often).
"""
