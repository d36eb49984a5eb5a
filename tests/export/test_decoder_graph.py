"""The decoder graph: right in every way to run it, and every weight under its own name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from families import FAMILIES, save_family

from edgewright.errors import BadInput, GateFailed
from edgewright.export.onnx import decoder_graph, traced_graph
from edgewright.export.onnx.files import save_graph
from edgewright.export.onnx.nodes import OPSET
from edgewright.export.source import Source, load_source

LENGTH, PADDED = 60, 7
"""Tokens of a text, longer than any window; and those of its second row that are padding, on the left."""


BUILDS = {"chosen": decoder_graph.build, "traced": traced_graph.build}
"""The graph that an export takes, written where the family is known; and that of the trace."""


class Graph:
    """A graph on the disk, and the text that it is asked about: two rows, the second left-padded."""

    def __init__(self, checkpoint: Path, directory: Path, kind: str = "chosen") -> None:
        import onnxruntime

        self.source: Source = load_source(checkpoint)
        self.path = save_graph(BUILDS[kind](self.source), directory)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self.tokens = np.random.default_rng(3).integers(2, 280, (2, LENGTH))
        self.mask = np.ones((2, LENGTH), np.int64)
        self.mask[1, :PADDED] = 0
        self.positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)

    def expected(self) -> np.ndarray:
        """What transformers says, in float32."""
        import torch

        from edgewright.student import load_model

        tensors = {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}
        with torch.no_grad():
            output = load_model(self.source.directory)(**{key: torch.from_numpy(each) for key, each in tensors.items()})
        logits: np.ndarray = output.logits.numpy()
        return logits

    def run(self, steps: list[int]) -> np.ndarray:
        """Logits of the text in pieces of these lengths, each with the cache that the last one left."""
        names = [output.name for output in self.session.get_outputs()]
        cache = {
            value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        rows, start = [], 0
        for count in steps:
            piece = slice(start, start + count)
            feeds = {"input_ids": self.tokens[:, piece], "position_ids": self.positions[:, piece]}
            feeds |= {"attention_mask": self.mask[:, : start + count]} | cache
            found = dict(zip(names, self.session.run(None, feeds), strict=True))
            cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
            rows.append(found["logits"])
            start += count
        return np.concatenate(rows, axis=1)

    def worst(self, steps: list[int]) -> float:
        """Largest difference of a logit of a token that is no padding, relative to the spread of the logits."""
        right = self.expected()
        difference = np.abs(self.run(steps) - right)
        difference[1, :PADDED] = 0
        return float(difference.max() / right.std())


@pytest.fixture(scope="module")
def graph_of(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Graph]:
    """`graph_of(family, kind)`, a key of `BUILDS`, made once."""
    made: dict[tuple[str, str], Graph] = {}

    def of(family: str, kind: str = "chosen") -> Graph:
        if (family, kind) not in made:
            made[family, kind] = Graph(tiny_model(family), tmp_path_factory.mktemp("graph"), kind)
        return made[family, kind]

    return of


NEVER_WRITTEN = ("bitnet", "gpt2", "opt", "phi3-longrope")
FAST = (("qwen3", "traced"), ("gpt2", "chosen"))
"""Of what is traced, which takes seconds, what is looked at every time: tied, with wide heads and grouped keys; and
transposed weights with biases and learned positions."""

CASES = [(family, kind) for family in FAMILIES for kind in BUILDS if family not in NEVER_WRITTEN or kind == "chosen"]


def is_slow(family: str, kind: str) -> bool:
    return (family, kind) not in FAST and (kind == "traced" or family in NEVER_WRITTEN)


each_graph = pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(*case, marks=[pytest.mark.slow] if is_slow(*case) else []) for case in CASES]
)


@each_graph
def test_prefill_pieces_and_decoding_of_a_left_padded_batch(
    graph_of: Callable[..., Graph], family: str, kind: str
) -> None:
    graph = graph_of(family, kind)
    assert graph.worst([LENGTH]) < 1e-5
    if family != "phi3-longrope":  # whose rotation depends on how many tokens are seen at once, also in transformers
        assert graph.worst([40, 8, *[1] * (LENGTH - 48)]) < 1e-5
        assert graph.worst([1] * LENGTH) < 1e-5


@each_graph
def test_every_weight_bears_its_name_once_and_has_its_values(
    graph_of: Callable[..., Graph], family: str, kind: str
) -> None:
    graph = graph_of(family, kind)
    model = onnx.load(graph.path)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in graph.source.names:
        value = graph.source.tensor(name)
        turned = stored[name].shape != value.shape or not np.array_equal(stored[name], value)
        assert np.array_equal(stored[name].T if turned else stored[name], value), name
    left = [value for name, value in stored.items() if name not in graph.source.files]
    assert max(value.size for value in left) <= 128  # rotary frequencies and shapes


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[pytest.mark.slow] if is_slow(family, kind) else [])
     for family, kind in CASES if kind == "traced"],
)  # fmt: skip
def test_what_is_written_is_what_is_traced(graph_of: Callable[..., Graph], family: str) -> None:
    written, traced = graph_of(family), graph_of(family, "traced")
    names = [[(value.name, value.type) for value in graph.session.get_inputs()] for graph in (written, traced)]
    assert names[0] == names[1]
    for steps in ([LENGTH], [40, 8, *[1] * (LENGTH - 48)]):
        difference = np.abs(written.run(steps) - traced.run(steps))
        difference[1, :PADDED] = 0
        assert difference.max() <= 2e-5


@pytest.mark.parametrize("kind", BUILDS)
def test_linear_weights_lie_in_out(graph_of: Callable[..., Graph], kind: str) -> None:
    graph = graph_of("qwen3", kind)
    model = onnx.load(graph.path, load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    products = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    for name in graph.source.linears:
        assert name in products
        assert shapes[name] == graph.source.matrix(name).shape[::-1]


@pytest.mark.parametrize("kind", BUILDS)
def test_fused_operators_stand_in_the_graph(graph_of: Callable[..., Graph], kind: str) -> None:
    model = onnx.load(graph_of("qwen3", kind).path, load_external_data=False)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [OPSET]
    kinds = {node.op_type for node in model.graph.node}
    assert {"Attention", "RotaryEmbedding", "RMSNormalization"} <= kinds
    assert "LayerNormalization" in {node.op_type for node in onnx.load(graph_of("gpt2").path).graph.node}


def test_no_path_of_this_machine_is_in_the_graph(graph_of: Callable[..., Graph]) -> None:
    content = graph_of("gpt2").path.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


@pytest.mark.parametrize("kind", BUILDS)
def test_equal_weights_keep_their_names(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = save_family("llama", tmp_path / "model", {"num_hidden_layers": 2, "intermediate_size": 64})
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name].fill_(1)
        elif "gate_proj" in name or "up_proj" in name or "q_proj" in name:
            tensors[name] = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    graph = Graph(checkpoint, tmp_path / "graph", kind)
    model = onnx.load(graph.path, load_external_data=False)
    assert set(tensors) <= {tensor.name for tensor in model.graph.initializer}
    assert graph.worst([LENGTH]) < 1e-5


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    from families import save_byte_tokenizer
    from transformers import MambaConfig, MambaForCausalLM

    size = save_byte_tokenizer(tmp_path, bos=True)
    config = MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, state_size=4, bos_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="EW-523"):
        decoder_graph.build(load_source(tmp_path))


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_weight_of_another_shape_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    import dataclasses

    source = load_source(save_family("llama", tmp_path / "model", {"num_hidden_layers": 1}))
    shapes = {**source.architecture.shapes, name: (3, *source.shape(name)[1:])}
    broken = dataclasses.replace(source, architecture=dataclasses.replace(source.architecture, shapes=shapes))
    with pytest.raises(GateFailed, match=rf"{name}.*EW-521"):
        BUILDS[kind](broken)
