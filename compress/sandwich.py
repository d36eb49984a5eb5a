"""The objective of an elastic model: the whole network, the smallest, and some between, in every micro-batch."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.objective import ModelInputs, Objective

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.compress.elastic_layers import Net, Size


class SandwichConfig(BaseModel):
    """Sandwich rule with same-view distillation, for the method `elastic` (slimmable networks, arXiv 1903.05134; POA,
    arXiv 2408.01031)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["sandwich"] = "sandwich"
    random: int = Field(default=2, ge=0)
    """Sub-networks between the smallest and the whole that every micro-batch trains, drawn anew."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of all sub-networks together, where the whole network has 1."""
    kl_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the divergence from the whole network in the loss of a sub-network; the cross-entropy gets the rest."""

    def build(self) -> Sandwich:
        return Sandwich(self)


class Sandwich(Objective):
    """CE(whole) + weight mean over the sub-networks of [kl_weight KL(sg whole || sub) + (1 - kl_weight) CE(sub)].

    The sub-networks are the smallest one and `random` others, drawn evenly without replacement; which, follows from the
    run's seed, the step and the micro-batch. All their activations are held until the backward pass.
    """

    parts = ("cross_entropy", "smallest", "between")

    def __init__(self, config: SandwichConfig) -> None:
        self.config = config
        self._student: PreTrainedModel | None = None
        self._net: Net | None = None
        self._seed = self._step = 0

    def attach(self, student: PreTrainedModel) -> None:
        """Find the sub-networks. RecipeError: EW-767, there are none."""
        import torch

        from edgewright.compress.elastic_layers import net_of

        self._student, self._net, self._seed = student, net_of(student), torch.initial_seed()

    def begin_step(self, step: int, total_steps: int) -> None:
        self._step = step

    def drawn(self, net: Net, inputs: ModelInputs) -> list[Size]:
        """The sub-networks of a micro-batch, the smallest first."""
        first = inputs.sequences[0] if inputs.sequences else 0
        between = net.sizes[1:-1]
        chosen = Random(f"{self._seed} {self._step} {first}").sample(between, min(self.config.random, len(between)))
        return [net.sizes[0], *chosen]

    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        import torch

        from edgewright.chunked import chunked_loss, cross_entropy_rule
        from edgewright.compress.divergences import forward_kl_rows
        from edgewright.compress.loss_rule import CrossEntropy, DenseLoss, distillation_rule
        from edgewright.compress.targets import HeadLogits
        from edgewright.student import hidden_states, output_head

        student, net = self._student, self._net
        assert student is not None and net is not None, "attach() comes first"
        labels = inputs.labels.flatten()
        loss, (whole,) = chunked_loss(hidden, head, cross_entropy_rule(labels, scale), parts=1, dtype=dtype)
        with torch.no_grad():
            taught = HeadLogits(hidden.detach(), output_head(student, dtype), dtype)
        sizes, share = self.drawn(net, inputs), self.config.kl_weight
        losses, weights = (DenseLoss(forward_kl_rows, 1.0), CrossEntropy()), (share, 1.0 - share)
        rule = distillation_rule(losses, weights, labels, taught, scale=scale * self.config.weight / len(sizes))
        values = []
        for size in sizes:
            with net.at(student, size):
                with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
                    own, own_head = hidden_states(student, inputs), output_head(student)
                part, _ = chunked_loss(own, own_head, rule, parts=2, dtype=dtype)
            loss = loss + part
            values.append(part.detach())
        between = torch.stack(values[1:]).sum() if len(values) > 1 else torch.zeros_like(whole)
        return loss, torch.stack([whole, values[0], between])
