"""Settings of a checkpoint as an artifact may hold them: nothing about the machine, nothing about other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgewright.compress.factor_format import unmarked

MODEL_TRACES = ("_name_or_path", "_commit_hash", "quantization_config")
"""What config.json may say of where the model lay, and of how the files stored its weights, which are gone."""

TOKENIZER_TRACES = ("name_or_path", "is_local", "local_files_only")
"""What tokenizer_config.json may say of where the tokenizer lay."""


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without `MODEL_TRACES`, and without the mark of factored layers: an artifact's graph has them."""
    return {key: value for key, value in unmarked(config).items() if key not in MODEL_TRACES}


def clean_tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json without `TOKENIZER_TRACES`."""
    return {key: value for key, value in settings.items() if key not in TOKENIZER_TRACES}
