"""Targets that know plain linear layers alone refuse models whose layers are factors."""

from __future__ import annotations

from edgewright.errors import BadInput
from edgewright.export.source import Source


def refuse_factors(source: Source, target: str) -> None:
    """Refuse a checkpoint with factored layers.

    Raises:
        BadInput: EW-723.
    """
    factors = source.architecture.factors
    if factors:
        name, layer = next(iter(factors.items()))
        parts = [f"rank {layer.rank}", f"activation {layer.activation}", *(["columns"] if layer.columns else [])]
        raise BadInput(
            "EW-723",
            f"{target} cannot hold the factors of this model",
            where=source.directory.absolute(),
            expected="plain linear layers: nothing can lie between two factors, and no branch beside them",
            found=f"{len(factors)} factored layers, the first {name} ({', '.join(parts)})",
            fix="export to onnx, openvino or genai; or train with activation: none and merge: true",
        )
