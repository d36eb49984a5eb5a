"""Any local causal LM is a source: defaults, names, orientation, tokenizers, rounded and packed weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, save_family
from lattices import random_lattice
from safetensors.torch import load_file, save_file

import edgewright
from edgewright.errors import BadInput
from edgewright.export.lattice import SIDECAR, LatticeTensor, round_int, save_sidecar
from edgewright.export.layout import BitNet
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.source import load_source, weights_sha256
from edgewright.export.targets import reader_of

# transformers compiles parts of packed BitNet, and torch's compiler imports something that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

TOKENIZERS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tokenizers"


def tokenizer(name: str) -> Path:
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"the tokenizer {name} is not beside the repository")
    return TOKENIZERS / name


def edited(model: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(model, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    return target


def configured(model: Path, target: Path, **changes: object) -> Path:
    """A copy with another config.json; None takes a key out."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


# ---------------------------------------------------------------- names and settings


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_its_weights_under_their_state_dict_names(family, tiny_model):
    from transformers import AutoModelForCausalLM

    source = load_source(tiny_model(family))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    state = model.state_dict()
    tied = model.config.tie_word_embeddings
    assert set(source.names) == set(state) - ({source.architecture.head} if tied else set())
    assert source.tied == tied
    assert source.embedding in source.names and source.head in source.names
    assert np.array_equal(source.tensor(source.embedding), model.get_input_embeddings().weight.detach().numpy())
    for name in source.linears:
        layer = model.get_submodule(name.removesuffix(".weight"))
        rows = getattr(layer, "out_features", None) or layer.nf
        assert source.matrix(name).shape[0] == rows
        assert source.shape(name) == tuple(state[name].shape)


def test_defaults_that_a_config_leaves_out_are_filled_in(tiny_model, tmp_path):
    gpt2 = load_source(configured(tiny_model("gpt2"), tmp_path / "a", tie_word_embeddings=None))
    assert gpt2.tied
    assert gpt2.config["hidden_size"] == gpt2.config["n_embd"] == 64
    assert gpt2.config["activation_function"] == "gelu_new"
    llama = load_source(configured(tiny_model("llama"), tmp_path / "b", tie_word_embeddings=None, hidden_act=None))
    assert not llama.tied
    assert llama.config["hidden_act"] == "silu"


def test_what_a_config_says_counts(tiny_model, tmp_path):
    model = configured(tiny_model("llama"), tmp_path / "a", torch_dtype="float16", rms_norm_eps=0.25)
    assert load_source(model).config["rms_norm_eps"] == 0.25


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": None}, "None"),
        ({"model_type": "t5"}, "t5"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_other_models_are_refused_by_name(changes, found, tiny_model, tmp_path):
    with pytest.raises(BadInput, match="EW-327") as error:
        load_source(configured(tiny_model("llama"), tmp_path / "a", **changes))
    assert found in str(error.value)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])
def test_checkpoints_of_the_bare_model_get_the_full_names(family, prefix, tiny_model, tmp_path):
    def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        short = {name.removeprefix(prefix): value for name, value in tensors.items()}
        masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        return short | (masks if family == "gpt2" else {"layers.0.rotary_emb.inv_freq": torch.ones(4)})

    whole, short = load_source(tiny_model(family)), load_source(edited(tiny_model(family), tmp_path / "a", bare))
    assert short.names == whole.names
    for name in whole.names:
        assert np.array_equal(short.tensor(name), whole.tensor(name))


def test_missing_and_unknown_tensors_are_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    gone = edited(model, tmp_path / "a", lambda all: {k: v for k, v in all.items() if "layers.1.mlp.up" not in k})
    with pytest.raises(BadInput, match=r"EW-324\]\n.*layers\.1\.mlp\.up_proj\.weight.*\n.*is missing"):
        load_source(gone)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    with pytest.raises(BadInput, match=r"EW-329\]\n.*\n.*q_proj\.bias"):
        load_source(edited(model, tmp_path / "b", lambda tensors: tensors | bias))


def test_a_weight_that_is_there_twice_is_refused(tiny_model, tmp_path):
    """Under the names of the full model and of the bare one: nobody knows which counts."""
    name = "model.layers.0.mlp.up_proj.weight"
    twice = edited(
        tiny_model("llama"), tmp_path / "a", lambda tensors: tensors | {name.removeprefix("model."): tensors[name] + 1}
    )
    with pytest.raises(BadInput, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' twice \[EW-329\]"):
        load_source(twice)


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_head_that_is_stored_all_the_same(other, tiny_model, tmp_path):
    """Equal to the embedding it is the embedding; another one counts, as in transformers."""
    from transformers import AutoModelForCausalLM

    def both(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = tensors["model.embed_tokens.weight"].clone()
        head[3, 3] += 1 if other else 0
        return tensors | {"lm_head.weight": head}

    model = edited(tiny_model("qwen3"), tmp_path / "a", both)
    source = load_source(model)
    assert source.tied is not other
    assert source.head == ("lm_head.weight" if other else "model.embed_tokens.weight")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).lm_head.weight
    assert np.array_equal(source.matrix(source.head), theirs.detach().numpy())


def test_a_tied_model_may_be_stored_by_its_head_alone(tiny_model, tmp_path):
    def by_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {{"model.embed_tokens.weight": "lm_head.weight"}.get(k, k): v for k, v in tensors.items()}

    source = load_source(edited(tiny_model("qwen3"), tmp_path / "a", by_head))
    assert source.tied
    whole = load_source(tiny_model("qwen3"))
    assert np.array_equal(source.tensor(source.embedding), whole.tensor(whole.embedding))


def test_conv1d_lattices_are_found_the_right_way_round(tiny_model, tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight"
    lattice = random_lattice("int4", 96, 64, None, 3)  # a scale per output
    model = edited(
        tiny_model("gpt2"), tmp_path / "a", lambda tensors: tensors | {name: torch.from_numpy(lattice.dequantize().T)}
    )
    source = load_source(model)
    assert set(source.lattice) == {name}
    assert np.array_equal(source.lattice[name].codes, lattice.codes)
    assert np.array_equal(source.matrix(name), lattice.dequantize())
    assert source.tensor(name).shape == (64, 96)


# ---------------------------------------------------------------- tokenizers


def test_vocab_and_merges_are_a_tokenizer(tiny_model, tmp_path):
    from tokenizers import Tokenizer

    files = tokenizer("gpt2")
    model = save_family("gpt2", tmp_path / "a", {"vocab_size": 50257})
    (model / "tokenizer.json").unlink()
    for file in files.iterdir():
        shutil.copyfile(file, model / file.name)
    source = load_source(model)
    assert len(source.tokenizer["model"]["vocab"]) == 50257
    (tmp_path / "out").mkdir()
    source.write_tokenizer(tmp_path / "out")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "Hello, world's  naïve"
    assert written.encode(text).ids == [15496, 11, 995, 338, 220, 41492]  # of the reference implementation
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
    with TorchSession(model, threads=1) as session:
        assert session.tokenize(text) == written.encode(text).ids


def test_a_sentencepiece_model_alone_is_refused_by_name(tiny_model, tmp_path):
    files = tokenizer("mistral_v1")
    model = tmp_path / "a"
    shutil.copytree(tiny_model("llama"), model)
    (model / "tokenizer.json").unlink()
    shutil.copyfile(files / "tokenizer.model", model / "tokenizer.model")
    with pytest.raises(BadInput, match=r"EW-328\]\n.*\n  found: .*tokenizer\.model"):
        load_source(model)


# ---------------------------------------------------------------- rounded and packed weights


QUANTIZED = ("q_proj", "up_proj", "down_proj")


def with_lattice(model: Path, target: Path, dtype: torch.dtype) -> tuple[Path, dict[str, LatticeTensor]]:
    """A model whose weights in the files are those of an 8-bit lattice, rounded; and the lattice beside them."""
    source = load_source(model)
    lattice = {
        name: round_int(source.matrix(name), bits=8, group=None, scale_dtype=np.float16)
        for name in source.linears
        if any(part in name for part in QUANTIZED)
    }

    def rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        exact = {name: torch.from_numpy(each.dequantize()) for name, each in lattice.items()}
        return {name: value.to(dtype) for name, value in (tensors | exact).items()}

    path = edited(model, target, rounded)
    save_sidecar(path, lattice)
    return path, lattice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_lattice_beside_rounded_weights_is_the_model(dtype, tiny_model, tmp_path):
    path, lattice = with_lattice(tiny_model("llama"), tmp_path / "a", dtype)
    source = load_source(path)
    assert source.restored == set(lattice)
    for name, each in lattice.items():
        assert np.array_equal(source.matrix(name), each.dequantize())
    with TorchSession(path, threads=1, source=source) as exact, TorchSession(path, threads=1) as rounded:
        for name, each in lattice.items():
            assert np.array_equal(exact.model.state_dict()[name].numpy(), each.dequantize())
        assert not np.array_equal(exact.append([5, 6, 7]), rounded.append([5, 6, 7]))
    name = min(lattice)
    lattice[name].codes[5, 5] += 1 if lattice[name].codes[5, 5] < 100 else -1
    save_sidecar(path, lattice)
    with pytest.raises(BadInput, match=r"EW-321\]\n.*\n  found: 1 of"):
        load_source(path)


def packed_by_hand(model: Path, target: Path, linear_class: str, dense_codes: bool = False) -> tuple[Path, dict]:
    """Packed BitNet as other tools write it."""
    source = load_source(model)
    lattice = {
        name: random_lattice("ternary", *source.matrix(name).shape, None, seed, per_tensor=True)
        for seed, name in enumerate(source.linears)
        if name != source.head
    }
    layout = BitNet(inverse=linear_class == "bitlinear")

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for seed, (name, each) in enumerate(lattice.items()):
            each.scales[...] = 2.0 ** -(seed % 5)
            codes, scale = layout.pack(each)
            tensors[name] = torch.from_numpy(each.codes).float() if dense_codes else torch.from_numpy(codes)
            tensors[name.removesuffix("weight") + "weight_scale"] = torch.from_numpy(scale.copy())
        return tensors

    edited(model, target, pack)
    settings = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = settings | {"modules_to_not_convert": ["lm_head"]}
    (target / "config.json").write_text(json.dumps(config))
    return target, lattice


@pytest.mark.parametrize(
    ("linear_class", "dense_codes"), [("bitlinear", False), ("autobitlinear", False), ("autobitlinear", True)]
)
def test_packed_bitnet_is_read_in_both_conventions(linear_class, dense_codes, tiny_model, tmp_path):
    path, lattice = packed_by_hand(tiny_model("llama"), tmp_path / "a", linear_class, dense_codes)
    source = load_source(path)
    assert source.lattice.keys() == lattice.keys() == source.restored
    for name, each in lattice.items():
        assert np.array_equal(source.lattice[name].codes, each.codes)
        assert np.array_equal(source.tensor(name), each.dequantize())
    with TorchSession(path, threads=1) as theirs, TorchSession(path, threads=1, source=source) as ours:
        tokens = [5, 60, 7, 90, 11]
        left, right = theirs.append(tokens, logits="all"), ours.append(tokens, logits="all")
        assert left is not None and right is not None
        assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.99  # theirs rounds activations to 8 bits


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
def test_bitsandbytes_checkpoints_are_read_as_it_reads_them(kind, tiny_model, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**settings, bnb_4bit_use_double_quant=kind == "nf4 nested")
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"), quantization_config=config, dtype=torch.float32)
    path = tmp_path / "a"
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model("gpt2") / file, path / file)
    source = load_source(path)
    assert len(source.restored) == 8
    for name in source.restored:
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        if kind == "int8":
            theirs = functional.int8_vectorwise_dequant(weight.CB, weight.SCB).numpy()
            assert np.allclose(source.matrix(name), theirs, rtol=3e-7, atol=0)
        elif source.matrix(name).shape[1] % 64 == 0:  # its CPU kernel misreads other shapes
            assert np.array_equal(source.matrix(name), functional.dequantize_4bit(weight, weight.quant_state).numpy())


def test_other_quantizations_are_refused_by_name(tiny_model, tmp_path):
    fp4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    for index, (settings, name) in enumerate(
        [({"quant_method": "gptq", "bits": 4}, "gptq"), (fp4, "bitsandbytes fp4"), (online, "bitnet online")]
    ):
        path = configured(tiny_model("llama"), tmp_path / str(index), quantization_config=settings)
        with pytest.raises(BadInput, match=rf"of the kind {name} is not read.*EW-326"):
            load_source(path)


def test_damaged_packed_weights_are_named(tiny_model, tmp_path):
    path, _ = packed_by_hand(tiny_model("llama"), tmp_path / "a", "bitlinear")
    name = "model.layers.0.mlp.up_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {name: torch.full_like(tensors[name], 0xFF)}

    with pytest.raises(BadInput, match=r"up_proj\.weight.*EW-326"):
        load_source(edited(path, tmp_path / "b", damage))
    short = edited(path, tmp_path / "c", lambda tensors: tensors | {name: tensors[name][:-1]})
    with pytest.raises(BadInput, match=r"up_proj\.weight.*EW-326"):
        load_source(short)


def test_the_sidecar_is_no_weight_file(tiny_model, tmp_path):
    path, _ = with_lattice(tiny_model("llama"), tmp_path / "a", torch.float32)
    source = load_source(path)
    assert not source.restored
    assert source.sha256 == weights_sha256(path)
    assert all(file.name != SIDECAR for file in source.files.values())


def test_a_sidecar_that_is_the_weight_is_part_of_the_fingerprint(tiny_model, tmp_path):
    """Two sidecars may round to the same files, and are two models."""
    path, lattice = with_lattice(tiny_model("llama"), tmp_path / "a", torch.bfloat16)
    first = load_source(path)
    name = min(lattice)
    scales = lattice[name].scales
    rounded = torch.from_numpy(lattice[name].dequantize()).to(torch.bfloat16)
    scales[0] = np.nextafter(scales[0], np.float32(np.inf))
    assert torch.equal(torch.from_numpy(lattice[name].dequantize()).to(torch.bfloat16), rounded)
    save_sidecar(path, lattice)
    second = load_source(path)
    assert first.restored == second.restored and weights_sha256(path) not in (first.sha256, second.sha256)
    assert first.sha256 != second.sha256


# ---------------------------------------------------------------- token embeddings on a lattice


@pytest.fixture(scope="module")
def embedded(ternary_model, tmp_path_factory) -> Callable[[str], tuple[Path, LatticeTensor]]:
    """The tied ternary model with a token embedding on a lattice as well, without a sidecar."""
    made: dict[str, tuple[Path, LatticeTensor]] = {}

    def model(levels: str) -> tuple[Path, LatticeTensor]:
        if levels not in made:
            name = "model.embed_tokens.weight"
            shape = tuple(load_file(ternary_model / "model.safetensors")[name].shape)
            lattice = random_lattice(levels, *shape, None if levels == "ternary" else 32, 11)
            fours = np.arange(lattice.scales.size).reshape(lattice.scales.shape) % 4
            lattice.scales[...] = (1 + fours) * {"ternary": 2.0**-5, "int4": 2.0**-8, "int8": 2.0**-12}[levels]
            values = torch.from_numpy(lattice.dequantize())
            target = tmp_path_factory.mktemp("embedded") / levels
            made[levels] = edited(ternary_model, target, lambda tensors: tensors | {name: values}), lattice
        return made[levels]

    return model


@pytest.mark.parametrize("levels", ["ternary", "int4", "int8"])
def test_a_token_embedding_on_a_lattice_is_found(levels, embedded):
    path, lattice = embedded(levels)
    source = load_source(path)
    found = source.lattice[source.embedding]
    assert source.tied and found.levels == levels
    assert np.array_equal(found.dequantize(), lattice.dequantize())


@pytest.mark.parametrize(
    ("levels", "to", "quant", "embedding_quant", "package"),
    [
        ("int8", "gguf", "q8_0", "q8_0", "llama_cpp"),
        ("int4", "gguf", "q4_0", "q4_0", "llama_cpp"),
        ("ternary", "gguf", "tq2_0", "q4_0", "llama_cpp"),
        ("ternary", "gguf", "tq2_0", None, "llama_cpp"),
        ("int4", "onnx", "ternary", "int4", "onnxruntime"),
        pytest.param("int8", "onnx", "ternary", "int8", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("ternary", "onnx", "ternary", None, "onnxruntime", marks=pytest.mark.slow),
        pytest.param("int4", "genai", "ternary", "int4", "onnxruntime_genai", marks=pytest.mark.slow),
        pytest.param("ternary", "genai", "ternary", None, "onnxruntime_genai", marks=pytest.mark.slow),
        pytest.param("int4", "openvino", "ternary", "int4", "openvino_genai", marks=pytest.mark.slow),
        pytest.param("ternary", "openvino", "ternary", None, "openvino_genai", marks=pytest.mark.slow),
        ("ternary", "hf", "nf4", None, "torch"),
    ],
)
def test_it_comes_back_bit_for_bit(levels, to, quant, embedding_quant, package, embedded, tmp_path):
    pytest.importorskip(package)
    path, lattice = embedded(levels)
    source = load_source(path)
    settings = {} if embedding_quant is None else {"embedding_quant": embedding_quant}
    made = edgewright.export(path, to=to, quant=quant, out=tmp_path / "out", verify=True, threads=1, **settings)
    assert np.array_equal(dict(reader_of(to).read_weights(made.path, source))[source.embedding], lattice.dequantize())
