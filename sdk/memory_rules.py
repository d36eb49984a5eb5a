"""Which memory settings can be used with which methods and machine; what cannot is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgewright.errors import RecipeError
from edgewright.method import Method


def check_memory_settings(decisions: dict[str, Any], methods: Iterable[Method]) -> None:
    """Refuse what cannot be used here.

    Args:
        decisions: those of the run.
        methods: those of the stage.

    Raises:
        RecipeError: EW-750.
    """
    if decisions["offload_optimizer"] and decisions["device"] == "cpu":
        raise refused("offload_optimizer", "on a CPU, where the optimizer's state is in host memory already", "a GPU")
    if decisions["gradient_release"]:
        for method in methods:
            if type(method).after_backward is not Method.after_backward:
                why = f"with the method {method.type}, which reads or changes the complete gradients of a step"
                raise refused("gradient_release", why, "methods that leave gradients alone")


def refused(setting: str, why: str, expected: str) -> RecipeError:
    """EW-750 for a setting that is switched on."""
    return RecipeError(
        "EW-750",
        f"training.{setting} cannot be used {why}",
        expected=expected,
        found=f"{setting}: true",
        fix=f"{setting}: false",
    )
