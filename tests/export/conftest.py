"""Small Llama checkpoints for the export tests, and what the GenAI builder makes of them (slow: once)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import save_byte_tokenizer

from edgewright.export.artifact import Written
from edgewright.export.source import Source, load_source

STORIES = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "stories260K"


@pytest.fixture(scope="session")
def stories() -> Path:
    """The trained 260K model; skips where it is not there."""
    if not STORIES.is_dir():
        pytest.skip("the trained model stories260K is not beside the repository")
    return STORIES.resolve()


def make_ternary(weight: np.ndarray, group: int | None, *, per_tensor: bool = False) -> np.ndarray:
    """Absmean ternary with scales that fp16 and bf16 hold."""
    import torch

    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group or columns)
    mean = np.abs(weight).mean(keepdims=True)[..., None] if per_tensor else np.abs(groups).mean(axis=2, keepdims=True)
    scale = torch.from_numpy(mean).to(torch.bfloat16).to(torch.float16).float().numpy()
    return (np.clip(np.rint(groups / scale), -1, 1) * scale).astype(np.float32).reshape(rows, columns)


@pytest.fixture(scope="session")
def ternary_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, no BOS, 128 divides all dimensions; scales per tensor (layer 0's attention), per 256 (down_proj) or row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("ternary_model")
    vocabulary = save_byte_tokenizer(directory, bos=False)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("norm.weight"):
            value.uniform_(0.8, 1.2)
        elif "_proj" in name:
            kind = {"per_tensor": "layers.0.self_attn" in name, "group": 256 if "down_proj" in name else None}
            value.copy_(torch.from_numpy(make_ternary(4 * value.numpy(), **kind)))  # type: ignore[arg-type]
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def awkward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, with BOS, bf16 weights, heads of 24, no dimension that 32 divides; layer 1 is ternary, its v_proj not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("awkward_model")
    vocabulary = save_byte_tokenizer(directory, bos=True)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=72,
        head_dim=24,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=0,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    for name, value in model.state_dict().items():
        if "layers.1" in name and "_proj" in name and "v_proj" not in name:
            value.copy_(torch.from_numpy(make_ternary(value.numpy(), None)))
        elif "_proj" in name or "lm_head" in name:
            value.mul_(4)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the vendor's own builder makes of a model, in fp32, for the CPU."""
    pytest.importorskip("onnxruntime_genai")
    directory = tmp_path_factory.mktemp("built") / model.name
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(directory)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(tmp_path_factory.mktemp("cache"))]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    subprocess.run(command, env=quiet | {"HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="session")
def ternary_built(ternary_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The builder's fp32 folder of `ternary_model`."""
    return _built(ternary_model, tmp_path_factory)


@pytest.fixture(scope="session")
def awkward_built(awkward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The builder's fp32 folder of `awkward_model`."""
    return _built(awkward_model, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)` saves the tiny model of a family (a key of `FAMILIES`) once; a test must not change it."""
    from families import save_family

    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp("families") / family)
        return made[family]

    return model


@pytest.fixture(scope="session")
def write_openvino(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """`to_openvino.write` that traces each model once: the graph does not depend on the width."""
    pytest.importorskip("openvino_genai")
    from edgewright.export import to_openvino
    from edgewright.export.onnx.decoder_graph import save

    traced: dict[Path, Path] = {}

    def once(source: Source, directory: Path) -> Path:
        if source.directory not in traced:
            traced[source.directory] = save(source, tmp_path_factory.mktemp("traced"))
        return traced[source.directory]

    def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(to_openvino, "save", once)
            return to_openvino.write(source, directory, quant=quant, embedding_quant=embedding_quant)

    return write


def _openvino_folder(
    model: Path, quant: str, write: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / quant
    assert write(load_source(model), folder, quant=quant).fallbacks == []
    return folder


@pytest.fixture(scope="session")
def openvino_ternary(
    ternary_model: Path, write_openvino: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`ternary_model` as an OpenVINO folder of u2 weights."""
    return _openvino_folder(ternary_model, "ternary", write_openvino, tmp_path_factory)


@pytest.fixture(scope="session")
def openvino_fp32(
    ternary_model: Path, write_openvino: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`ternary_model` as an OpenVINO folder of fp32 weights."""
    return _openvino_folder(ternary_model, "fp32", write_openvino, tmp_path_factory)
