"""Which memory settings can be used with which methods and machine; what cannot is refused by name."""

from __future__ import annotations

from collections.abc import Iterable

from edgewright.errors import RecipeError
from edgewright.method import Method


def leaves_gradients_alone(method: Method) -> bool:
    """Whether a method never looks at the complete gradients of a step."""
    return type(method).after_backward is Method.after_backward


def check_release(methods: Iterable[Method]) -> None:
    """Refuse gradient_release with a method that wants a step's gradients.

    Raises:
        RecipeError: EW-750.
    """
    for method in methods:
        if not leaves_gradients_alone(method):
            why = f"with the method {method.type}, which reads or changes the complete gradients of a step"
            raise _refused("gradient_release", why, "methods that leave gradients alone")


def check_offload(device: str) -> None:
    """Refuse offload_optimizer where there is nothing to offload from.

    Raises:
        RecipeError: EW-750.
    """
    if device == "cpu":
        why = "on a CPU, where the optimizer's state is in host memory already"
        raise _refused("offload_optimizer", why, "a GPU")


def _refused(setting: str, why: str, expected: str) -> RecipeError:
    return RecipeError(
        "EW-750",
        f"training.{setting} cannot be used {why}",
        expected=expected,
        found=f"{setting}: true",
        fix=f"{setting}: false",
    )
