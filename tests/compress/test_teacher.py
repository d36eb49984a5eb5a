"""Teachers that run: what they are held in, several of them, and what they refuse."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edgewright.compress.teacher import Ensemble, OnlineTeacher, open_frozen, packable
from edgewright.data.tokenizer import load_encoder
from edgewright.errors import Unsafe
from edgewright.objective import ModelInputs

CPU = torch.device("cpu")
VOCABULARY = 61
TOKENIZER = Path(__file__).resolve().parents[2] / "examples/teacher/tokenizer.json"


def save(directory: Path, *, seed: int = 0, vocabulary: int = VOCABULARY, hidden: int = 128) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    shutil.copy(TOKENIZER, directory)  # the guard asks for one; none of these tests reads it
    return model


def inputs(rows: int = 2, length: int = 12) -> ModelInputs:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return ModelInputs(
        input_ids=ids, labels=ids, position_ids=None, attention_mask=None, sequences=tuple(range(7, 7 + rows))
    )


def logits(source: OnlineTeacher | Ensemble, given: ModelInputs, chunk: int = 5) -> torch.Tensor:
    """All of them, asked for in chunks."""
    targets, count = source.targets(given, torch.float32), given.input_ids.numel()
    return torch.cat([targets.rows(slice(b, min(b + chunk, count))).values for b in range(0, count, chunk)])


def prepared(source: OnlineTeacher | Ensemble) -> OnlineTeacher | Ensemble:
    source.prepare(None, CPU)
    return source


@torch.no_grad()
def test_an_online_teacher_says_what_the_model_says_and_keeps_nothing(tmp_path: Path) -> None:
    model = save(tmp_path / "t")
    given = inputs()
    source = prepared(OnlineTeacher(tmp_path / "t"))
    expected = model(input_ids=given.input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits(source, given), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in source.open().parameters())


@torch.no_grad()
@pytest.mark.parametrize("resident", ["all", "one"])
def test_an_ensembles_logits_are_the_mean_of_its_members(tmp_path: Path, resident: str) -> None:
    models = [save(tmp_path / str(seed), seed=seed) for seed in range(3)]
    given = inputs()
    source = prepared(Ensemble([OnlineTeacher(tmp_path / str(seed)) for seed in range(3)], resident=resident))
    expected = torch.stack([model(input_ids=given.input_ids).logits for model in models]).double().mean(0).flatten(0, 1)
    torch.testing.assert_close(logits(source, given).double(), expected, rtol=1e-5, atol=1e-5)
    in_memory = [member.model() is not None for member in source.members]
    assert in_memory == [resident == "all"] * 3


@torch.no_grad()
def test_members_that_are_alike_are_one_teacher_and_padding_of_one_is_dropped(tmp_path: Path) -> None:
    model = save(tmp_path / "a")
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "padded")
    shutil.copy(TOKENIZER, tmp_path / "padded")
    given = inputs()
    alone = logits(prepared(OnlineTeacher(tmp_path / "a")), given)
    source = prepared(Ensemble([OnlineTeacher(tmp_path / "padded"), OnlineTeacher(tmp_path / "a")]))
    together = logits(source, given)
    assert together.shape[-1] == VOCABULARY
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def stored_bytes(model: PreTrainedModel) -> int:
    """Of the weights and what unpacks them."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            total += sum(scale.numel() * scale.element_size() for scale in scales)
    return total


@torch.no_grad()
def test_narrow_teachers_take_less_and_say_nearly_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "t", hidden=256)
    given = inputs()
    wide = logits(prepared(OnlineTeacher(tmp_path / "t")), given).log_softmax(-1)
    sizes, divergences = {}, {}
    for weights in ("fp32", "bf16", "int8", "nf4"):
        source = prepared(OnlineTeacher(tmp_path / "t", weights=weights))
        narrow = logits(source, given).log_softmax(-1)
        divergences[weights] = float((wide.exp() * (wide - narrow)).sum(-1).mean())
        sizes[weights] = stored_bytes(source.open())
    assert sizes["bf16"] == sizes["fp32"] / 2
    assert sizes["int8"] < 0.55 * sizes["bf16"] and sizes["nf4"] < 0.35 * sizes["bf16"]
    assert divergences["fp32"] == pytest.approx(0, abs=1e-6)
    assert divergences["bf16"] < divergences["int8"] < divergences["nf4"] < 0.02
    assert "cast" not in caplog.text  # not a line for every product


@torch.no_grad()
def test_scales_of_four_bits_are_one_byte_and_stay_so(tmp_path: Path) -> None:
    """4 bits a weight, a byte for 64, a float for 256 of those; also after the first forward."""
    save(tmp_path / "t", hidden=256)
    source = prepared(OnlineTeacher(tmp_path / "t", weights="nf4"))
    logits(source, inputs())
    layers = [module for module in source.open().modules() if type(module).__name__ == "Linear4bit"]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(stored_bytes(layer) for layer in layers)
    assert stored == weights * (0.5 + 1 / 64 + 4 / 64 / 256)
    assert stored < 0.26 * 2 * weights and {layer.weight.quant_state.absmax.dtype for layer in layers} == {torch.uint8}


@torch.no_grad()
def test_layers_of_any_height_are_held_in_four_bits(tmp_path: Path) -> None:
    """Some kernels want multiples of 32; here two key heads of 8."""
    model = save(tmp_path / "t", hidden=128)
    linear = torch.nn.Linear(128, 24, bias=False, dtype=torch.bfloat16)
    model.model.layers[0].self_attn.extra = linear
    from edgewright.compress.teacher import pack_linears

    x, wide = torch.randn(5, 128, dtype=torch.bfloat16), linear.weight.detach().clone()
    pack_linears(model.to(torch.bfloat16), "nf4", CPU)
    extra = model.model.layers[0].self_attn.extra
    assert type(extra).__name__ == "Linear4bit"
    assert float((extra(x) - x @ wide.T).square().mean() / (x @ wide.T).square().mean()) < 0.02


@torch.no_grad()
def test_scales_in_one_byte_change_next_to_nothing() -> None:
    """The shipped teacher on text: held in 4 bits with scales of one byte and in float32, against bfloat16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    shipped = Path(__file__).parents[2] / "examples/teacher"
    ids = torch.from_numpy(load_encoder(shipped).encode([Path(__file__).read_text()])[0].astype("int64"))[None, :512]
    given = ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
    said = {
        kind: logits(prepared(OnlineTeacher(shipped, weights=kind)), given).log_softmax(-1) for kind in ("bf16", "nf4")
    }
    plain = open_frozen(shipped, "bf16", CPU)
    for _, linear in packable(plain, plain.get_output_embeddings()):
        linear.weight.data = dequantize_4bit(*quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4"))
    said["float32 scales"] = logits(prepared(OnlineTeacher(model=plain)), given).log_softmax(-1)
    apart = {kind: float((said["bf16"].exp() * (said["bf16"] - other)).sum(-1).mean()) for kind, other in said.items()}
    between = float((said["nf4"].exp() * (said["nf4"] - said["float32 scales"])).sum(-1).mean())
    assert apart["nf4"] == pytest.approx(apart["float32 scales"], rel=0.2), apart
    assert between < 0.1 * apart["nf4"] and apart["nf4"] < 0.1, (between, apart)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_the_output_head_stays_wide(tmp_path: Path, weights: str) -> None:
    save(tmp_path / "t")
    model = open_frozen(tmp_path / "t", weights, CPU)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a list of mapped files")
def test_packed_weights_leave_nothing_of_the_file_in_memory() -> None:
    """Embeddings that stay wide would keep the whole of it mapped."""
    shipped = Path(__file__).parents[2] / "examples/teacher"
    mapped = {}
    for weights in ("bf16", "nf4"):
        model = open_frozen(shipped, weights, CPU)
        gc.collect()
        mapped[weights] = str(shipped / "model.safetensors") in Path("/proc/self/maps").read_text()
        del model
    assert mapped == {"bf16": True, "nf4": False}


def test_pickles_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "t")
    (tmp_path / "t/pytorch_model.bin").write_bytes(b"\x80\x04]\x94.")
    with pytest.raises(Unsafe) as unsafe:
        prepared(OnlineTeacher(tmp_path / "t"))
    assert unsafe.value.code == "EW-315"


def test_code_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "t")
    config = json.loads((tmp_path / "t/config.json").read_text())
    (tmp_path / "t/config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(Unsafe) as unsafe:
        prepared(OnlineTeacher(tmp_path / "t", weights="nf4"))
    assert unsafe.value.code == "EW-313"
