"""How a model directory says that some of its linear layers are factors.

Its config.json has `model_type: edgewright_factors`, so that no other library takes it for the model that it is not and
fills what it misses with random numbers, and a section `edgewright_factors` with what it really is. The weights of a
factored layer are `<layer>.down.weight`, `<layer>.up.weight`, `<layer>.columns.weight` and `<layer>.bias`; see
`factors.FactoredLinear`. Everything else is as in any Hugging Face directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgewright.compress.factor_mark import KIND, is_marked
from edgewright.errors import BadInput

NOTE = (
    "Linear layers of this model are stored as factors, perhaps with an activation between them, so that no matrix "
    "can replace them. Only edgewright opens this directory; `edgewright export` makes ONNX, GenAI and OpenVINO models "
    "of it."
)


class FactoredLayer(BaseModel):
    """What a factored layer is, beside its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    method: str
    """That trained it."""
    rank: int = Field(gt=0, le=2**20)
    activation: Literal["none", "silu"]
    columns: str | None = None
    """The input columns of the branch beside the factors: one bit for each input, the first the highest bit of the
    first byte, in hexadecimal; None: there is no such branch."""
    mix: float = Field(ge=0, le=1)
    """The weight of the factors' branch; that of the columns' is 1 - mix."""

    @model_validator(mode="after")
    def _columns_are_bits(self) -> FactoredLayer:
        if self.columns is None:
            if self.mix != 1:
                raise ValueError("mix is 1 without columns")
        elif len(self.columns) % 2 or not re.fullmatch("[0-9a-f]*[1-9a-f][0-9a-f]*", self.columns):
            raise ValueError("columns are hexadecimal bytes, not all of them 0")
        return self

    def places(self, width: int) -> np.ndarray:
        """The numbers of the columns, int32, ascending; empty where there are none.

        Args:
            width: inputs of the layer.

        Raises:
            ValueError: there are not as many bits as inputs.
        """
        if self.columns is None:
            return np.empty(0, np.int32)
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.columns), np.uint8))
        if len(bits) != -(-width // 8) * 8 or bits[width:].any():
            raise ValueError(f"{len(bits)} bits of columns for {width} inputs")
        return np.flatnonzero(bits).astype(np.int32)


class FactorSection(BaseModel):
    """The section of config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    note: str = NOTE
    of: str
    """The `model_type` of the model whose layers these are; transformers would take a section with a `model_type` for a
    whole configuration."""
    of_architectures: list[str] | None = None
    layers: dict[str, FactoredLayer] = Field(min_length=1)
    """By the name of the layer."""


def marked(config: Mapping[str, Any], layers: Mapping[str, FactoredLayer]) -> dict[str, Any]:
    """config.json of a model with these factored layers, from that of the plain one."""
    section = FactorSection(of=config["model_type"], of_architectures=config.get("architectures"), layers=dict(layers))
    return {**config, "model_type": KIND, "architectures": [KIND], KIND: section.model_dump(mode="json")}


def factored_layers(config: Mapping[str, Any]) -> dict[str, FactoredLayer]:
    """The factored layers that a config.json names, empty for a plain one; errors as `read_section`."""
    return read_section(config).layers if is_marked(config) else {}


def unmarked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the plain model whose layers are stored as factors, and a plain one as it is.

    Raises:
        BadInput: EW-722, as `read_section`.
    """
    if not is_marked(config):
        return dict(config)
    section = read_section(config)
    plain = {key: value for key, value in config.items() if key not in (KIND, "architectures")}
    plain["model_type"] = section.of
    return plain if section.of_architectures is None else {**plain, "architectures": section.of_architectures}


def read_section(config: Mapping[str, Any]) -> FactorSection:
    """The section of a config.json.

    Raises:
        BadInput: EW-722, the section is missing, or is not as this module writes it.
    """
    try:
        section = FactorSection.model_validate(config.get(KIND))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(f"{'.'.join(map(str, (KIND, *first['loc'])))}: {first['msg']}") from None
    if config.get("model_type") != KIND or section.of == KIND:
        raise _damaged(f"model_type {config.get('model_type')!r} around {section.of!r}")
    return section


def _damaged(found: str) -> BadInput:
    return BadInput(
        "EW-722",
        "config.json does not say which layers of this model are factors, or says it wrongly",
        expected=f"model_type {KIND!r}, and a section of that name as edgewright wrote it",
        found=found[:300],
        fix="copy the model directory again, or let the run write it again",
    )
