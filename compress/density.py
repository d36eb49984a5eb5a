"""How a density is shared out among layers: uniform, ERK, ERK+; then as exact counts of weights.

ERK (Erdos-Renyi kernel; Mocanu et al., arXiv 1707.04780; Evci et al., 1911.11134) gives a layer of shape [out, in] a
density proportional to (out + in) / (out * in), so that small layers stay denser. A layer that would get more than 1
stays dense, and the others make up for what it takes beyond its share. ERK+ (Liu et al., 2202.02643) counts the output
head as well, which stays dense.

Where we differ: the published code draws each mask by Bernoulli trials, so that counts vary; ours are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from edgewright.errors import RecipeError

Shapes = Mapping[str, tuple[int, int]]
"""[out, in] of layers by name."""
Distribution = Literal["uniform", "erk", "erk_plus"]
SHARE_EPSILON = 1e-12
"""More than a product of two doubles is off by, relatively, and less than one in any count."""


def uniform(shapes: Shapes, density: float, head: int) -> dict[str, float]:
    """The same density for every layer."""
    return dict.fromkeys(shapes, density)


def erk(shapes: Shapes, density: float, head: int) -> dict[str, float]:
    """Densities proportional to 1/in + 1/out, none above 1, whose mean over all weights is `density`."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        sparse = [name for name in shapes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(raw[name] * sizes[name] for name in sparse)
        largest = max(raw[name] for name in sparse)
        if largest * scale <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name in sparse if raw[name] == largest}
    return dict.fromkeys(shapes, 1.0)


def erk_plus(shapes: Shapes, density: float, head: int) -> dict[str, float]:
    """ERK of what is left of `density`, the mean over layers and output head, when the head stays dense.

    Args:
        shapes: of the layers without the head.
        density: of layers and head together.
        head: weights of the output head.

    Raises:
        RecipeError: EW-727, the head alone is more than that density allows.
    """
    layers = sum(math.prod(shape) for shape in shapes.values())
    left = density * (layers + head) - head
    if left <= 0:
        raise RecipeError(
            "EW-727",
            "a dense output head alone is more than this density allows",
            expected=f"a density above {head / (layers + head):.4f}: the head is that share of head and layers",
            found=density,
            fix="use distribution: erk, which leaves the head out of the count, or a higher density",
        )
    return erk(shapes, left / layers, head)


def whole(share: float, count: int) -> int:
    """floor(share * count) of the share as it was written: 0.29 of 100 is 29, though floats make a hair less of it."""
    return math.floor(share * count * (1 + SHARE_EPSILON))


DISTRIBUTIONS: dict[Distribution, Callable[[Shapes, float, int], dict[str, float]]] = {
    "uniform": uniform,
    "erk": erk,
    "erk_plus": erk_plus,
}
"""Densities by layer from shapes, density and the weights of the output head."""


def exact_counts(shapes: Shapes, densities: Mapping[str, float]) -> dict[str, int]:
    """Weights that each layer keeps: round(density * size).

    Raises:
        RecipeError: EW-726, a layer would keep nothing.
    """
    counts = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        counts[name] = round(densities[name] * size)
        if counts[name] == 0:
            raise starved(name, densities[name], 1 / size)
    return counts


def starved(layer: str, density: float, least: float) -> RecipeError:
    """The error for a layer that would be left without a single weight."""
    return RecipeError(
        "EW-726",
        f"{layer} would be left without a single weight",
        expected=f"a density of at least {least:.3g}",
        found=f"{density:.3g}",
        fix="raise the density, or leave the layer out with `exclude`",
    )
