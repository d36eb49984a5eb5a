"""Rotary positions in a GGUF file: settings, and the factors by which single frequencies are divided."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgewright.export.gguf.architecture import Config, Family, Setting, head_size, refuse
from edgewright.export.source import Source

Rope = dict[str, Any]
"""The rotary positions of config.json; `original` is the length before any stretching."""

SMALLEST_CACHE = 256
"""Tokens of the smallest cache of llama.cpp; a LongRoPE model with less would never use its short factors."""

_YARN_FIXED = {"beta_fast": (None, 32, 32.0), "beta_slow": (None, 1, 1.0), "truncate": (None, True)}
"""What llama.cpp's YaRN computes, whatever a file says."""


def rope_parameters(config: Config) -> Rope:
    """Rotary positions: transformers 5 writes `rope_parameters`, older releases `rope_theta` and `rope_scaling`.

    Where layers with and without a sliding window differ, those of the layers without one.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention") or found)
    if found.get("rope_theta") is None:
        found["rope_theta"] = config.get("rope_theta") or 10000.0
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    if found["rope_type"] == "su":
        found["rope_type"] = "longrope"
    if found.get("partial_rotary_factor") is None:
        found["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    found["original"] = (
        config.get("original_max_position_embeddings")
        or found.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    return found


def rotary_size(config: Config) -> int:
    """Columns of a head that rotary positions turn."""
    return int(head_size(config) * rope_parameters(config)["partial_rotary_factor"])


def rope_settings(source: Source, family: Family) -> dict[str, Setting]:
    """The metadata of rotary positions, by their keys behind the name of the graph.

    Raises:
        BadInput: EW-505, llama.cpp's graph of this family does not compute them.
    """
    if not family.ropes:
        return {}
    rope = _checked(source, family)
    settings: dict[str, Setting] = {
        "rope.dimension_count": rotary_size(source.config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    return {**settings, **_KINDS[rope["rope_type"]][1](source, rope)}


def rope_constants(source: Source, family: Family) -> dict[str, list[float]]:
    """The factors that divide single frequencies, by their names in the file: `[rotary size / 2]` each."""
    if not family.ropes:
        return {}
    rope = rope_parameters(source.config)
    return _KINDS[rope["rope_type"]][2](source, rope)


def _checked(source: Source, family: Family) -> Rope:
    rope = rope_parameters(source.config)
    if rope["rope_type"] not in family.ropes:
        legal = " or ".join(family.ropes)
        raise refuse(source, "'rope_type' of the rotary positions in config.json", legal, rope["rope_type"])
    if rope["partial_rotary_factor"] != 1 and not family.partial_rotary:
        raise refuse(source, "'partial_rotary_factor' in config.json", 1.0, rope["partial_rotary_factor"])
    for key in ("rope_theta", *_KINDS[rope["rope_type"]][0]):
        if not isinstance(rope.get(key), int | float):
            raise refuse(source, f"{key!r} of the rotary positions in config.json", "a number", rope.get(key))
    return rope


# ---------------------------------------------------------------- the kinds


def _nothing(source: Source, rope: Rope) -> dict[str, Any]:
    return {}


def _linear(source: Source, rope: Rope) -> dict[str, Setting]:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}


def _llama3_factors(source: Source, rope: Rope) -> dict[str, list[float]]:
    """Llama 3.1's stretching of long wavelengths."""
    size = rotary_size(source.config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).tolist()}


def _yarn(source: Source, rope: Rope) -> dict[str, Setting]:
    """YaRN (arXiv:2309.00071). llama.cpp multiplies by 0.1 ln(factor) + 1 itself; the file says what comes on top."""
    for key, legal in _YARN_FIXED.items():
        if rope.get(key) not in legal:
            raise refuse(source, f"{key!r} of the rotary positions in config.json", legal[-1], rope[key])
    factor = float(rope["factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original"]),
        "rope.scaling.attn_factor": 1.0 if wanted is None else float(wanted) / scale(1),
    }


def _longrope(source: Source, rope: Rope) -> dict[str, Setting]:
    """LongRoPE (arXiv:2402.13753): one set of factors up to the original length, another beyond."""
    original = int(rope["original"])
    if original < SMALLEST_CACHE:
        raise refuse(
            source,
            "'original_max_position_embeddings' in config.json: it takes the long factors for any larger cache",
            f"at least {SMALLEST_CACHE}, its smallest cache",
            original,
        )
    factor = rope.get("factor") or source.config["max_position_embeddings"] / original
    wanted = rope.get("attention_factor")
    if wanted is None:
        wanted = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(wanted),
    }


def _longrope_factors(source: Source, rope: Rope) -> dict[str, list[float]]:
    found = {}
    for kind in ("long", "short"):
        factors = rope.get(f"{kind}_factor")
        expected = rotary_size(source.config) // 2
        if not isinstance(factors, list) or len(factors) != expected:
            raise refuse(source, f"'{kind}_factor' of the rotary positions", f"{expected} numbers", factors)
        found[f"rope_factors_{kind}.weight"] = [float(factor) for factor in factors]
    return found


_KINDS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Setting]], Callable[..., dict[str, list[float]]]]] = {
    "default": ((), _nothing, _nothing),
    "linear": (("factor",), _linear, _nothing),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _nothing, _llama3_factors),
    "yarn": (("factor",), _yarn, _nothing),
    "longrope": ((), _longrope, _longrope_factors),
}
"""For each kind: the numbers that config.json must give, its metadata, its vectors."""
