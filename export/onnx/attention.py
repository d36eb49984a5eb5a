"""Attention with a cache, in the two ways in which a graph can say it.

Both read `input_ids` int64 `[batch, sequence]`, `attention_mask` int64 `[batch, past + sequence]` and
`past_key_values.{layer}.key|value` float32 `[batch, key heads, past, head size]`, and give
`present.{layer}.key|value`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from edgewright.export.onnx.decoder import Decoder
from edgewright.export.onnx.fusions import CONTRIB
from edgewright.export.onnx.nodes import Nodes
from edgewright.export.onnx.rotary import Rotary

if TYPE_CHECKING:
    import onnx_ir as ir

LOWEST = float(np.finfo(np.float32).min)
"""Added to a score that does not count, as transformers does."""

ROTARY_PARTS = 8
"""GroupQueryAttention rotates only by tables whose width is a multiple of this."""
HEAD_PARTS = 8
"""It computes only heads whose size is a multiple of this."""


class Attention(ABC):
    """What the attention of all layers shares, and the attention of each.

    Args:
        nodes: the graph, which gets its inputs here.
        decoder: what to compute.
    """

    def __init__(self, nodes: Nodes, decoder: Decoder) -> None:
        self.nodes, self.decoder = nodes, decoder
        self.input_ids = nodes.input("input_ids", "INT64", ("batch", "sequence"))
        self.mask = nodes.input("attention_mask", "INT64", ("batch", "past + sequence"))

    @abstractmethod
    def attend(self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """What a layer attends to, `[batch, sequence, heads * head size]`.

        Args:
            layer: its number.
            query: `[batch, sequence, heads * head size]`.
            key: `[batch, sequence, key heads * head size]`, not rotated.
            value: the same.
        """

    def cache(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """The inputs that hold keys and values of the text so far."""
        key, value = (
            self.nodes.input(f"past_key_values.{layer}.{part}", "FLOAT", self._cache_dims("past"))
            for part in ("key", "value")
        )
        return key, value

    def keep(self, layer: int, key: ir.Value, value: ir.Value) -> None:
        """Make outputs of keys and values of the text so far."""
        for part, kept in (("key", key), ("value", value)):
            self.nodes.output(kept, f"present.{layer}.{part}", "FLOAT", self._cache_dims("past + sequence"))

    def rotation(self, rotary: Rotary, heads: int) -> dict[str, int]:
        """The attributes of an operator that rotates heads."""
        partial = {} if rotary.size == self.decoder.head_size else {"rotary_embedding_dim": rotary.size}
        return {"interleaved": 0, "num_heads": heads, **partial}

    def _cache_dims(self, length: str) -> tuple[str, int, str, int]:
        return ("batch", self.decoder.key_heads, length, self.decoder.head_size)


class StandardAttention(Attention):
    """ONNX's own operators, which every runtime knows: `RotaryEmbedding` and `Attention`, with a mask.

    Left-padded batches are right: the graph reads `position_ids` int64 `[batch, sequence]`.
    """

    def __init__(self, nodes: Nodes, decoder: Decoder) -> None:
        super().__init__(nodes, decoder)
        self._positions = nodes.input("position_ids", "INT64", ("batch", "sequence"))
        self._where: tuple[ir.Value, ir.Value] | None = None
        self._masks: dict[int | None, ir.Value] = {}
        self._turns: dict[Rotary, tuple[ir.Value, ir.Value]] = {}

    def attend(self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        nodes, decoder, rotary = self.nodes, self.decoder, self.decoder.layers[layer].rotary
        heads = decoder.heads, decoder.key_heads, decoder.key_heads
        query, key, value = (self._apart(each, count) for each, count in zip((query, key, value), heads, strict=True))
        if rotary is not None:
            query, key = self._rotated(query, rotary, heads[0]), self._rotated(key, rotary, heads[1])
        past = self.cache(layer)
        keys, values = (
            nodes.op("Concat", old, new, attributes={"axis": -2}) for old, new in zip(past, (key, value), strict=True)
        )
        self.keep(layer, keys, values)
        attend = self._softly_capped if decoder.softcap else self._plain
        found = attend(query, self._repeated(keys), self._repeated(values), self._mask(decoder.layers[layer].window))
        beside = nodes.op("Transpose", found, attributes={"perm": [0, 2, 1, 3]})
        return nodes.op("Reshape", beside, nodes.integers(0, 0, decoder.heads * decoder.head_size))

    def _apart(self, value: ir.Value, heads: int) -> ir.Value:
        """`[batch, heads, sequence, head size]` of what has all heads side by side, or already apart."""
        size = self.decoder.head_size
        split = self.nodes.op("Reshape", value, self.nodes.integers(0, 0, heads, size))
        return self.nodes.op("Transpose", split, attributes={"perm": [0, 2, 1, 3]})

    def _rotated(self, value: ir.Value, rotary: Rotary, heads: int) -> ir.Value:
        return self.nodes.op("RotaryEmbedding", value, *self._turn(rotary), attributes=self.rotation(rotary, heads))

    def _turn(self, rotary: Rotary) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine of the positions, `[batch, sequence, pairs]`; made once for all layers with this rotation."""
        if rotary not in self._turns:
            nodes = self.nodes
            places = nodes.op("Unsqueeze", self._positions, nodes.integers(2))
            wide = nodes.op("Cast", places, attributes={"to": 1})
            angles = nodes.op("Mul", wide, nodes.constant(rotary.inverse, f"rotary_inverse_{len(self._turns)}"))
            turn = nodes.op("Cos", angles), nodes.op("Sin", angles)
            if rotary.factor != 1:
                turn = (
                    nodes.op("Mul", turn[0], nodes.scalar(rotary.factor)),
                    nodes.op("Mul", turn[1], nodes.scalar(rotary.factor)),
                )
            self._turns[rotary] = turn
        return self._turns[rotary]

    def _mask(self, window: int | None) -> ir.Value:
        """Which token sees which, bool `[batch, 1, sequence, past + sequence]`; made once for each window."""
        if window not in self._masks:
            nodes, (keys, queries) = self.nodes, self._places()
            if window is None:
                earlier = nodes.op("LessOrEqual", keys, queries)
                real = nodes.op("Unsqueeze", self.mask, nodes.integers(1, 2))
                seen = nodes.op("And", earlier, nodes.op("Cast", real, attributes={"to": 9}))
            else:
                first = nodes.op("Sub", queries, nodes.constant(np.array(window)))
                seen = nodes.op("And", nodes.op("Greater", keys, first), self._mask(None))
            self._masks[window] = seen
        return self._masks[window]

    def _places(self) -> tuple[ir.Value, ir.Value]:
        """Places of keys and queries in the padded text: int64 `[1, 1, 1, past + sequence]`, `[1, 1, sequence, 1]`."""
        if self._where is not None:
            return self._where
        nodes, zero, one = self.nodes, self.nodes.constant(np.array(0)), self.nodes.constant(np.array(1))
        total, new = (
            nodes.op("Squeeze", nodes.op("Shape", each, attributes={"start": 1, "end": 2}))
            for each in (self.mask, self.input_ids)
        )
        keys = nodes.op("Range", zero, total, one)
        queries = nodes.op("Range", nodes.op("Sub", total, new), total, one)
        self._where = (
            nodes.op("Unsqueeze", keys, nodes.integers(0, 1, 2)),
            nodes.op("Unsqueeze", queries, nodes.integers(0, 1, 3)),
        )
        return self._where

    def _repeated(self, value: ir.Value) -> ir.Value:
        """Each head of keys or values once for every head of queries that reads it; `fusions` undoes it where the
        runtime needs no copies."""
        nodes, heads, size = self.nodes, self.decoder.heads, self.decoder.head_size
        groups = heads // self.decoder.key_heads
        if groups == 1:
            return value
        wide = nodes.op("Unsqueeze", value, nodes.integers(2))
        wide = nodes.op("Expand", wide, nodes.integers(1, 1, groups, 1, 1))
        return nodes.op("Reshape", wide, nodes.integers(0, heads, -1, size))

    def _plain(self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
        return self.nodes.op("Attention", query, key, value, mask, attributes={"scale": self.decoder.scale})

    def _softly_capped(self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
        """In single steps: the operator of opset 23 caps the mask along with the scores."""
        nodes, cap = self.nodes, self.nodes.scalar(self.decoder.softcap or 0)
        turned = nodes.op("Transpose", key, attributes={"perm": [0, 1, 3, 2]})
        scores = nodes.op("Mul", nodes.op("MatMul", query, turned), nodes.scalar(self.decoder.scale))
        capped = nodes.op("Mul", nodes.op("Tanh", nodes.op("Div", scores, cap)), cap)
        added = nodes.op("Where", mask, nodes.scalar(0), nodes.scalar(LOWEST))
        weights = nodes.op("Softmax", nodes.op("Add", capped, added), attributes={"axis": -1})
        return nodes.op("MatMul", weights, value)


class GroupQueryAttention(Attention):
    """ONNX Runtime's operator, which rotates, and writes keys and values into a cache in place.

    It takes no batches that are padded on the left. Where it cannot rotate the size, rotation stands before it, and
    the graph reads `position_ids`.
    """

    def __init__(self, nodes: Nodes, decoder: Decoder) -> None:
        super().__init__(nodes, decoder)
        rotaries = [layer.rotary for layer in decoder.layers if layer.rotary is not None]
        outside = any(rotary.size // 2 % ROTARY_PARTS for rotary in rotaries)
        self._positions = nodes.input("position_ids", "INT64", ("batch", "sequence")) if outside else None
        seen = nodes.op("ReduceSum", self.mask, nodes.integers(1), attributes={"keepdims": 0})
        last = nodes.op("Sub", seen, nodes.integers(1))
        total = nodes.op("Squeeze", nodes.op("Shape", self.mask, attributes={"start": 1, "end": 2}))
        self._lengths = [nodes.op("Cast", each, attributes={"to": 6}) for each in (last, total)]
        self._tables: dict[Rotary, tuple[ir.Value, ir.Value]] = {}

    @classmethod
    def takes(cls, decoder: Decoder) -> bool:
        """Whether the operator computes heads of this size."""
        return decoder.head_size % HEAD_PARTS == 0

    def attend(self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        decoder, how = self.decoder, self.decoder.layers[layer]
        tables: tuple[ir.Value | None, ir.Value | None] = (None, None)
        if how.rotary is not None and self._positions is not None:
            query = self._rotated(query, how.rotary, decoder.heads)
            key = self._rotated(key, how.rotary, decoder.key_heads)
        elif how.rotary is not None:
            tables = self._table(how.rotary)
        found, keys, values = self.nodes.ops(
            "GroupQueryAttention",
            *(query, key, value),
            *self.cache(layer),
            *self._lengths,
            *tables,
            attributes={
                "num_heads": decoder.heads,
                "kv_num_heads": decoder.key_heads,
                "scale": decoder.scale,
                "softcap": float(decoder.softcap or 0),
                "do_rotary": int(tables[0] is not None),
                "rotary_interleaved": 0,
                "local_window_size": -1 if how.window is None else how.window,
            },
            domain=CONTRIB,
            count=3,
        )
        self.keep(layer, keys, values)
        return found

    def _rotated(self, value: ir.Value, rotary: Rotary, heads: int) -> ir.Value:
        inputs, how = (value, self._positions, *self._table(rotary)), self.rotation(rotary, heads)
        return self.nodes.op("RotaryEmbedding", *inputs, attributes=how, domain=CONTRIB)

    def _table(self, rotary: Rotary) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine of all positions, `[context, pairs]`; stored once for all layers with this rotation."""
        if rotary not in self._tables:
            number = len(self._tables)
            cosine, sine = rotary.tables(self.decoder.context)
            self._tables[rotary] = (
                self.nodes.constant(cosine, f"cosine_{number}"),
                self.nodes.constant(sine, f"sine_{number}"),
            )
        return self._tables[rotary]
