"""The checkpoint with a file's own weights: what the width costs, apart from what the runtime does with it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from edgewright.export.source import Source


class WeightsOnly:
    """Puts the weights of a file, one by one, into the open model of its checkpoint.

    Args:
        model: the checkpoint's; it is changed in place.
        source: knows which weights it stores transposed.
    """

    def __init__(self, model: PreTrainedModel, source: Source) -> None:
        self._source = source
        self._state = model.state_dict()
        self._prefix = f"{model.base_model_prefix}."
        self.changed = False
        """Whether any weight is another than before."""
        self._waiting = {value.data_ptr() for value in self._state.values()}  # tied weights have one address
        self._misfit = False

    @property
    def complete(self) -> bool:
        """Whether every weight of the model has come, and each that came had a place in it."""
        return not self._misfit and not self._waiting

    def __call__(self, name: str, values: np.ndarray) -> None:
        """Take a weight: float32, a matrix `[out, in]`."""
        place = self._place(name)
        oriented = values.T if self._source.stores_transposed(name) else values
        value = torch.from_numpy(np.require(oriented, np.float32, ["C", "W"]))
        if place is None or place.shape != value.shape:
            self._misfit = True
            return
        self._waiting.discard(place.data_ptr())
        if not torch.equal(place, value):
            place.copy_(value)
            self.changed = True

    def _place(self, name: str) -> torch.Tensor | None:
        """The model's tensor; a checkpoint may name it with or without the prefix of the base model."""
        names = (name, self._prefix + name, name.removeprefix(self._prefix))
        return next((self._state[each] for each in names if each in self._state), None)
