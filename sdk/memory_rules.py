"""Which memory settings can be used with which model, methods and machine; what cannot is refused by name."""

from __future__ import annotations

from typing import Any

from edgewright.errors import RecipeError

NOT_BUILT = ("gradient_checkpointing", "gradient_release", "offload_optimizer")


def check_memory_settings(decisions: dict[str, Any]) -> None:
    """Refuse what cannot be used here.

    Raises:
        RecipeError: EW-750.
    """
    for name in NOT_BUILT:
        if decisions[name]:
            raise RecipeError("EW-750", f"training.{name} cannot be used here", expected=f"{name}: false", found=True)
    if decisions["weights"] != "fp32":
        raise RecipeError(
            "EW-750", "training.weights cannot be used here", expected="weights: fp32", found=decisions["weights"]
        )
