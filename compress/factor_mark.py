"""The name by which a config.json says that some layers are factors; `factor_format` reads what it says beside it.

A module of its own, because the guard asks this of every folder and must not load pydantic for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KIND = "edgewright_factors"
"""The model type, and the name of the section."""


def is_marked(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its model has factored layers, by its type or by the section."""
    return config.get("model_type") == KIND or KIND in config
