"""A decoder with learned masks in it: on the residual stream, on heads, intermediate channels and whole blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.blocks import blocks_of
from edgewright.compress.cut import Kept, KeptBlock
from edgewright.compress.gates import Gates
from edgewright.compress.layers import CompressedLinear
from edgewright.compress.shape import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GatedModel:
    """The gates of a model by kind, and the layers behind them; kinds that nothing is pruned of have none.

    hidden [1, H]; block [1, L]; key_value [L, K]; query [L K, A / K], the heads on each; ffn [L, F].
    """

    def __init__(self, gates: dict[str, Gates], shape: Shape) -> None:
        self.gates = gates
        self.shape = shape
        self.layers: dict[str, GatedLinear] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, shape: Shape, wanted: Shape) -> GatedModel:
        """Put gates into a model that `axes.check_axes` passed."""
        blocks, pairs = shape.num_hidden_layers, shape.num_key_value_heads
        sizes = {
            "hidden": (1, shape.hidden_size, wanted.hidden_size),
            "block": (1, blocks, wanted.num_hidden_layers),
            "key_value": (blocks, pairs, wanted.num_key_value_heads),
            "query": (blocks * pairs, shape.group, wanted.group),
            "ffn": (blocks, shape.intermediate_size, wanted.intermediate_size),
        }
        with model.device:
            gates = {kind: Gates(*size) for kind, size in sizes.items() if size[2] < size[1]}
        gated = cls(gates, shape)
        base: Any = model.base_model
        base.add_module("gates", nn.ModuleDict(gates))
        base.register_forward_pre_hook(gated._opens)
        for number, block in enumerate(blocks_of(model)):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                linear: Any = block.get_submodule(name)
                layer = GatedLinear(linear, gated, number, heads=name.endswith("o_proj"))
                block.set_submodule(name, layer)
                gated.layers[f"{model.base_model_prefix}.layers.{number}.{name}"] = layer
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm: Any = block.get_submodule(name)
                block.set_submodule(name, GatedNorm(norm.weight, norm.variance_epsilon, gated))
        base.norm = GatedNorm(base.norm.weight, base.norm.variance_epsilon, gated)
        base.embed_tokens = GatedEmbedding(base.embed_tokens, gated)
        return gated

    def _opens(self, module: nn.Module, inputs: object) -> None:
        """Fix what the gates let through in a forward."""
        for gates in self.gates.values():
            gates.z = gates.open()

    @property
    def stream(self) -> Tensor | None:
        """[H], what is let through of the residual stream; None: all."""
        return self.gates["hidden"].z[0] if "hidden" in self.gates else None

    def entering(self, block: int, *, heads: bool) -> Tensor | None:
        """What is let through to the layer that closes attention ([A * D]) or the MLP ([F]) of a block."""
        if not heads:
            return self.gates["ffn"].z[block] if "ffn" in self.gates else None
        shape, found = self.shape, None
        if "key_value" in self.gates:
            found = self.gates["key_value"].z[block].repeat_interleave(shape.group)
        if "query" in self.gates:
            queries = self.gates["query"].z.view(-1, shape.num_attention_heads)[block]
            found = queries if found is None else found * queries
        return None if found is None else found.repeat_interleave(shape.head_dim)

    def whole(self, block: int) -> Tensor | None:
        """What is let through of what a block adds, a number."""
        return self.gates["block"].z[0, block] if "block" in self.gates else None

    def kept(self, shape: Shape) -> Kept:
        """What stays if the masks are fixed now."""

        def chosen(kind: str, group: int, size: int) -> Tensor:
            return self.gates[kind].kept()[group].cpu() if kind in self.gates else torch.arange(size)

        def block(number: int) -> KeptBlock:
            pairs = chosen("key_value", number, shape.num_key_value_heads)
            first = number * shape.num_key_value_heads
            heads = [pair * shape.group + chosen("query", first + pair, shape.group) for pair in pairs.tolist()]
            return KeptBlock(
                block=number,
                heads=torch.cat(heads),
                key_value_heads=pairs,
                ffn=chosen("ffn", number, shape.intermediate_size),
            )

        blocks = chosen("block", 0, shape.num_hidden_layers).tolist()
        return Kept(hidden=chosen("hidden", 0, shape.hidden_size), blocks=tuple(block(number) for number in blocks))


class GatedLinear(CompressedLinear):
    """The last layer of attention or MLP, with masks on what enters it and on what it adds to the stream."""

    method: ClassVar[str] = "shear"  # type: ignore[misc]

    def __init__(self, linear: nn.Linear, gated: GatedModel, block: int, *, heads: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.gated, self.block, self.heads = gated, block, heads

    def effective_weight(self) -> Tensor:
        """With the masks of the last forward, [out, in]."""
        weight: Tensor = self.weight
        entering, leaving = self.gated.entering(self.block, heads=self.heads), self._leaving()
        weight = weight if entering is None else weight * entering
        return weight if leaving is None else weight * leaving.expand(self.out_features)[:, None]

    def flops(self) -> int:
        """2 in out."""
        return 2 * self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        entering, leaving = self.gated.entering(self.block, heads=self.heads), self._leaving()
        y = F.linear(x if entering is None else x * entering.to(x.dtype), self.weight, self.bias)
        return y if leaving is None else y * leaving.to(y.dtype)

    def _leaving(self) -> Tensor | None:
        stream, whole = self.gated.stream, self.gated.whole(self.block)
        if stream is None or whole is None:
            return stream if whole is None else whole
        return stream * whole


class GatedEmbedding(nn.Module):
    """A token embedding with the mask of the stream on it."""

    def __init__(self, embedding: nn.Embedding, gated: GatedModel) -> None:
        super().__init__()
        self.weight, self.gated = embedding.weight, gated

    def forward(self, ids: Tensor) -> Tensor:
        x, stream = F.embedding(ids, self.weight), self.gated.stream
        return x if stream is None else x * stream.to(x.dtype)


class GatedNorm(nn.Module):
    """RMSNorm whose mean is over the channels that are not closed: those of the smaller model."""

    def __init__(self, weight: nn.Parameter, epsilon: float, gated: GatedModel) -> None:
        super().__init__()
        self.weight, self.epsilon, self.gated = weight, epsilon, gated

    def forward(self, x: Tensor) -> Tensor:
        wide, stream = x.to(torch.float32), self.gated.stream
        count = wide.shape[-1] if stream is None else stream.detach().count_nonzero().clamp_min(1)
        wide = wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / count + self.epsilon)
        return self.weight * wide.to(x.dtype)
