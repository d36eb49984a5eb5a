"""Calibration: a model's weights are put on a lattice with care, by what flows through them on real text.

The strong baseline of post-training quantization, in the bytes of plain rounding: searched scales (`search.py`), error
feedback (`gptq.py`, `layerwise.py`) and, under a size budget, 8 bits where 4 would cost most (`sensitivity.py`). What
comes out is a `Source` whose lattice every writer lays out as it is. Weights that are on a lattice already stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.errors import BadInput, RecipeError
from edgewright.export.calibration.decoder_blocks import (
    block_arguments,
    find_blocks,
    first_hidden,
    linear_weights,
    mean_squares,
    run_block,
    set_matrix,
    sharing,
    weight_layers,
    weight_prefixes,
)
from edgewright.export.calibration.layerwise import Task, quantize_layerwise
from edgewright.export.calibration.search import search
from edgewright.export.calibration.sensitivity import NARROW, WIDE, Unit, choose, measure, widening
from edgewright.export.calibration.text import MAX_TOKENS, CalibrationText, read_text
from edgewright.export.lattice import LatticeTensor
from edgewright.export.source import Source
from edgewright.student import load_model

METHODS: dict[str, str] = {
    "gptq": "error feedback, layer by layer",
    "search": "searched scales, weighted by the inputs",
    "imatrix": "no rounding: only how much each input column counts, for the target's own quantizer",
}
"""The methods by name, in a few words."""


def calibrate(
    source: Source,
    *,
    files: Sequence[str | Path],
    method: str = "gptq",
    bits: int = NARROW,
    embedding_bits: int | None = NARROW,
    group: int = 32,
    spare_bytes: float | None = None,
    columns_of: int = 1,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """Give the weights of a model lattices that lose little on text like the one given.

    Args:
        source: the model; what has a lattice already keeps it, bit for bit.
        files: calibration text; never the text that the result is judged on.
        method: a key of `METHODS`.
        bits: 4 or 8, of the linear weights.
        embedding_bits: of token embedding and output head; None leaves them alone.
        group: columns per scale.
        spare_bytes: what may be spent on 8 bits in the place of 4, wherever that helps most; None: nothing is.
        columns_of: weights whose columns are no multiple of this are left alone, since the target cannot hold them.
        max_tokens: of the text, at most.
        seed: of the choice among more text than that.
        threads: of torch.
        say: gets a line about progress now and then.

    Returns:
        The source with `lattice`, `calibrated`, `importance` and `calibration` (for the manifest) filled in. Same
        arguments on the same machine give the same bits.

    Raises:
        BadInput: EW-2xx for the text; EW-550, too little of it; EW-552, a model of unknown build; EW-554, nothing to
            calibrate.
        RecipeError: EW-551, no such method or width.
    """
    _check(method, bits, embedding_bits)
    if threads is not None:
        torch.set_num_threads(threads)
    text = read_text(source, files, max_tokens=max_tokens, seed=seed)
    say(f"calibrating on {text.tokens:,} tokens of {len(text.files)} files")
    work = _prepare(source, text, bits=bits, embedding_bits=embedding_bits, group=group, columns_of=columns_of, say=say)
    report: dict[str, Any] = {"method": method, **text.described(), "seed": seed}
    if method == "imatrix":
        return replace(source, importance=work.importance, calibration=report)
    if not work.bits:
        raise _nothing(source)
    if spare_bytes is not None:
        work.spend(spare_bytes)
    lattice = work.gptq() if method == "gptq" else work.search()
    widths = {str(width): sorted(name for name, bits in work.bits.items() if bits == width) for width in (NARROW, WIDE)}
    return replace(
        source,
        lattice={**source.lattice, **lattice},
        calibrated=frozenset(lattice),
        importance=work.importance,
        calibration=report | {"group": group, "bits": {width: names for width, names in widths.items() if names}},
    )


def _check(method: str, bits: int, embedding_bits: int | None) -> None:
    if method not in METHODS:
        raise RecipeError(
            "EW-551", "there is no such way to calibrate", expected=", ".join(METHODS), found=method, fix="choose one"
        )
    if bits not in (NARROW, WIDE) or embedding_bits not in (NARROW, WIDE, None):
        raise RecipeError(
            "EW-551", "calibration gives no such width", expected=f"{NARROW} or {WIDE} bits",
            found=f"{bits} and {embedding_bits}", fix="choose one",
        )  # fmt: skip


def _nothing(source: Source) -> BadInput:
    return BadInput(
        "EW-554",
        "there is nothing to calibrate in this model",
        where=source.directory.absolute(),
        expected="linear weights that are not on a lattice yet, of columns that the target can hold",
        found=f"{len(source.lattice)} weights that are on a lattice",
        fix="export without --calibrate: the lattice that the model was trained on is kept",
    )


@dataclass(slots=True, kw_only=True)
class _Work:
    """An open model and what is known about it."""

    source: Source
    model: PreTrainedModel
    sequences: Tensor
    group: int
    bits: dict[str, int]
    """The width of each weight to calibrate."""
    layers: dict[str, nn.Module]
    """The module of each linear weight, of the embedding and of the head."""
    importance: dict[str, np.ndarray]
    say: Callable[[str], None]

    def gptq(self) -> dict[str, LatticeTensor]:
        """Error feedback, block by block; a weight that the text does not reach gets searched scales."""
        task = Task(
            matrix=self.source.matrix,
            bits=self.bits,
            group=self.group,
            embedding=self.source.embedding,
            head=self.source.head,
            say=self.say,
        )
        found = quantize_layerwise(self.model, self.sequences, task)
        return {name: found[name] if name in found else self.searched(name) for name in self.bits}

    def search(self) -> dict[str, LatticeTensor]:
        """Searched scales for every weight."""
        return {name: self.searched(name) for name in self.bits}

    def searched(self, name: str) -> LatticeTensor:
        """The lattice of one weight with searched scales."""
        return search(self.source.matrix(name), self.importance.get(name), bits=self.bits[name], group=self.group)

    def spend(self, spare: float) -> None:
        """Widen from 4 bits to 8 what gains most, as far as the bytes go."""
        parts = [[name for name in unit if self.bits.get(name) == NARROW] for unit in self._units()]
        parts = [part for part in parts if part]
        self.say(f"measuring how sensitive {len(parts)} parts of the model are")
        losses = measure(self.model, self.sequences, parts, self.layers, lambda name: self.searched(name).dequantize())
        units = [
            Unit(tuple(part), sum(widening(self.source.matrix_shape(name), self.group) for name in part), loss)
            for part, loss in zip(parts, losses, strict=True)
        ]
        wide = choose(units, spare)
        self.bits |= dict.fromkeys(wide, WIDE)
        self.say(f"{len(wide)} of {len(self.bits)} weights get {WIDE} bits, the others {NARROW}")

    def _units(self) -> list[list[str]]:
        """The weights that share their inputs, block by block; then embedding and head."""
        blocks = find_blocks(self.model)
        arguments = block_arguments(self.model, blocks, self.sequences[0])
        hidden = first_hidden(self.model, blocks, self.sequences[:1])
        units = []
        for block, prefix, one in zip(blocks, weight_prefixes(self.model, blocks), arguments, strict=True):
            units += sharing(block, linear_weights(block, prefix), hidden, one)
            hidden = run_block(block, hidden, one)
        return units + [[name] for name in dict.fromkeys((self.source.embedding, self.source.head))]


def _prepare(
    source: Source,
    text: CalibrationText,
    *,
    bits: int,
    embedding_bits: int | None,
    group: int,
    columns_of: int,
    say: Callable[[str], None],
) -> _Work:
    """Open the model, find what is to be calibrated, measure what flows into it.

    Raises:
        BadInput: EW-552, EW-554.
    """
    model = load_model(source.directory).eval()
    sequences = torch.from_numpy(text.sequences)
    ends = {"embedding": source.embedding, "head": source.head}
    layers = weight_layers(model, find_blocks(model), **ends)
    for name in source.lattice.keys() & layers.keys():  # the lattice may be finer than the files
        set_matrix(layers[name], source.lattice[name].dequantize())
    outside = [name for name in source.linears if name not in layers and name not in source.lattice]
    if outside:
        say(f"outside the decoder blocks, so rounded plainly: {', '.join(outside)}")
    widths = {name: embedding_bits if name in ends.values() else bits for name in layers}
    chosen = {
        name: width
        for name, width in widths.items()
        if width is not None and name not in source.lattice and source.matrix_shape(name)[1] % columns_of == 0
    }
    importance = mean_squares(model, layers, sequences, **ends)
    return _Work(
        source=source, model=model, sequences=sequences, group=group, bits=chosen, layers=layers,
        importance=importance, say=say,
    )  # fmt: skip
