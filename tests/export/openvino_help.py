"""What the tests of OpenVINO folders share: reference logits and greedy texts, and the check of what a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgewright.export.artifact import Written, digest
from edgewright.export.openvino import reader as openvino_reader
from edgewright.export.openvino.package import load
from edgewright.export.runtimes.openvino import OpenVinoSession
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.source import Source

TOLERANCE = 1e-4
"""Of logits that are computed in float32."""

Write = Callable[..., Written]


def tokens_of(source: Source, count: int = 60) -> list[int]:
    """Random tokens of a model."""
    return [int(token) for token in np.random.default_rng(3).integers(2, source.config["vocab_size"], count)]


def torch_logits(model: Path, tokens: list[int]) -> np.ndarray:
    with TorchSession(model, threads=1) as reference:
        rows = reference.append(tokens, "all")
        assert rows is not None
        return rows


def torch_greedy(model: Path, prompt: list[int], count: int) -> list[int]:
    with TorchSession(model, threads=1) as reference:
        return reference.native_generate(prompt, count, stop_at_eos=False)


def rows_of(session: OpenVinoSession, tokens: list[int]) -> np.ndarray:
    """The logits of a text read whole, from an empty cache."""
    session.rewind(0)
    rows = session.append(tokens, "all")
    assert rows is not None
    return rows


def check_weights(folder: Path, source: Source, written: Written) -> None:
    """The independent reader finds every tensor, as laid out; lattices and vectors bit for bit."""
    found = dict(openvino_reader.read_weights(folder, source))
    assert set(found) == set(source.names)
    for name, values in found.items():
        if values.ndim == 1:
            np.testing.assert_array_equal(values, source.tensor(name), err_msg=name)
        else:
            assert digest(values) == written.digests[name], name
    for name, tensor in source.lattice.items():
        np.testing.assert_array_equal(found[name], tensor.dequantize(), err_msg=name)


def stored_types(folder: Path, source: Source) -> dict[str, set[str]]:
    """Element types of the constants that each matrix is made of, by its name."""
    found = {}
    for node in load().Core().read_model(folder / "openvino_model.xml").get_ops():
        if node.get_friendly_name() in source.files:
            below, types = [node], set()
            while below:
                one = below.pop()
                below += [place.get_node() for place in one.input_values()]
                if one.get_type_name() == "Constant":
                    types.add(one.get_output_element_type(0).get_type_name())
            found[node.get_friendly_name()] = types
    return found
