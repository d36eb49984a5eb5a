"""GGUF files: bit-exact weights, complete metadata, the tokenizer, and the refusal of what llama.cpp cannot compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgewright.errors import BadInput
from edgewright.export.gguf.vocabulary import read_vocabulary
from edgewright.export.parity import differences
from edgewright.export.source import load_source
from edgewright.export.to_gguf import place, write

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"

TEXTS = (
    "",
    " ",
    "def f(x):\n\treturn x**2  # 1234567\n\n\n",
    "I'm you're we'll they'd SHE'S  don't",
    "naïve café Привет 你好世界 שלום 🙂👍🏽 ½ ²",
    "a\u00a0b\u200bc\u3000d e\r\nf\rg",
    "<|end|> <s> </s> <unk> [PAD300] <0x41>",
    "x" * 300 + " " * 70 + "\n" * 9,
    "3.14159e-10 0xFF 1_000_000 $9.99 100%",
    "\u0301\u0302e\u0301 \ufffd \x00 \x1f~",
)


def edited(model: Path, target: Path, change: Callable[[dict[str, Any]], None], file: str = "config.json") -> Path:
    """A copy of a model directory with one JSON file changed."""
    shutil.copytree(model, target)
    value = json.loads((target / file).read_text())
    change(value)
    (target / file).write_text(json.dumps(value))
    return target


def saved_llama(directory: Path, tokenizer_of: Path, **settings: Any) -> Path:
    """A small random Llama with the tokenizer of another model; every tensor, biases too, is random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "tie_word_embeddings": True}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "bos_token_id": None, "eos_token_id": 0, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, directory / name)
    return directory


def largest_difference(model: Path, file: Path, tokens: int = 100) -> float:
    """Largest logit difference between torch and llama.cpp over a fixed text."""
    from edgewright.export.runtimes import open_session

    text = [int(token) for token in np.random.default_rng(0).integers(1, 300, tokens)]
    with open_session(model, threads=1) as reference, open_session(file, threads=1) as candidate:
        right, found = reference.append(text, "all"), candidate.append(text, "all")
    assert right is not None and found is not None
    return float(np.abs(right - found).max())


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0", "tq1_0", "tq2_0"])
def test_ternary_weights_arrive_bit_exact_in_every_type(ternary_model, tmp_path, quant):
    source = load_source(ternary_model)
    assert len(source.lattice) == 14
    written = write(source, tmp_path / "m.gguf", quant=quant)
    assert written.fallbacks == []
    assert written.lattice == dict.fromkeys(source.lattice, "exact")
    assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


@pytest.mark.parametrize(("quant", "bits"), [("tq2_0", 2.07), ("tq1_0", 1.69)])
def test_linear_weights_are_as_small_as_promised(ternary_model, tmp_path, quant, bits):
    write(load_source(ternary_model), tmp_path / "m.gguf", quant=quant)
    linear = [
        t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name.startswith("blk.") and len(t.shape) == 2
    ]
    assert len(linear) == 14
    assert sum(int(tensor.n_bytes) for tensor in linear) * 8 / sum(int(tensor.n_elements) for tensor in linear) <= bits


def test_what_no_block_holds_is_stored_wider_and_counted(awkward_model, tmp_path):
    source = load_source(awkward_model)
    written = write(source, tmp_path / "m.gguf", quant="tq2_0")
    quants = {fallback.tensor: fallback.quant for fallback in written.fallbacks}
    assert len(quants) == 14
    assert set(quants.values()) == {"f16"}
    assert all("no multiple of the block of 256" in fallback.reason for fallback in written.fallbacks)
    assert set(written.lattice.values()) == {"exact"}
    assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


def test_a_group_that_ternary_blocks_cannot_hold_stays_exact_in_a_wider_type(ternary_model, tmp_path):
    from edgewright.export.lattice import LatticeTensor, save_sidecar

    name = "model.layers.0.mlp.up_proj.weight"
    directory = tmp_path / "model"
    shutil.copytree(ternary_model, directory)
    lattice = load_source(directory).lattice
    whole = lattice[name]
    lattice[name] = LatticeTensor(
        codes=whole.codes, scales=np.repeat(whole.scales, 2, axis=1), group=128, bits=2, levels="ternary"
    )
    save_sidecar(directory, lattice)
    source = load_source(directory)
    written = write(source, tmp_path / "m.gguf", quant="tq2_0")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "q2_0")]
    assert written.lattice[name] == "exact"
    assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


def test_scales_that_fp16_lacks_are_rounded_and_named(ternary_model, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "model"
    shutil.copytree(ternary_model, directory)
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name].sign() * 0.1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    source = load_source(directory)
    written = write(source, tmp_path / "m.gguf", quant="tq2_0")
    assert written.lattice.pop(name) == "scales rounded to float16"
    assert set(written.lattice.values()) == {"exact"}
    assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


def test_weights_too_large_for_the_type_are_refused(tmp_path, ternary_model):
    from safetensors.torch import load_file, save_file

    model = saved_llama(tmp_path / "model", ternary_model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e8
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for quant in ("f16", "q8_0", "q4_0"):
        with pytest.raises(BadInput, match=r"up_proj.*too large.*EW-508"):
            write(load_source(model), tmp_path / "m.gguf", quant=quant)
    write(load_source(model), tmp_path / "m.gguf", quant="f32")


def test_weights_that_are_not_finite_are_refused(tmp_path, ternary_model):
    from safetensors.torch import load_file, save_file

    model = saved_llama(tmp_path / "model", ternary_model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.norm\.weight.*EW-323"):
        write(load_source(model), tmp_path / "m.gguf", quant="f32")


def test_metadata_is_complete(ternary_model, tmp_path):
    source = load_source(ternary_model)
    write(source, tmp_path / "m.gguf", quant="tq2_0")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": ternary_model.name,
        "general.file_type": gguf.LlamaFileType.MOSTLY_TQ2_0,
        "general.quantization_version": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": source.config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}


# ---------------------------------------------------------------- what llama.cpp computes


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": False, "head_dim": 32},
        {"num_key_value_heads": 4, "rms_norm_eps": 0.3},
        {"vocab_size": 333},
    ],
    ids=["theta", "linear", "llama3", "bias", "untied-wide-heads", "no-groups-eps", "padded-vocabulary"],
)
def test_logits_are_those_of_torch(ternary_model, tmp_path, settings):
    model = saved_llama(tmp_path / "model", ternary_model, **settings)
    source = load_source(model)
    written = write(source, tmp_path / "m.gguf", quant="f32")
    assert largest_difference(model, tmp_path / "m.gguf") <= 1e-3
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == []


def test_rope_theta_of_older_checkpoints(ternary_model, tmp_path):
    model = saved_llama(
        tmp_path / "model", ternary_model, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )

    def older(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]

    write(load_source(edited(model, tmp_path / "older", older)), tmp_path / "m.gguf", quant="f32")
    assert largest_difference(model, tmp_path / "m.gguf") <= 1e-3


def test_the_trained_model_tells_its_story(stories, tmp_path):
    from edgewright.export.runtimes import open_session

    expected = (stories / "expected_greedy.txt").read_text().strip()
    write(load_source(stories), tmp_path / "m.gguf", quant="f32")
    with open_session(tmp_path / "m.gguf", threads=1) as session:
        told = session.detokenize(session.native_generate([session.start_id], 200, stop_at_eos=False)).strip()
    assert len(told) > 400
    assert expected.startswith(told)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16}}, "beta_fast"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"intermediate_size": 511}, "another shape"),
        ({"num_hidden_layers": 1}, "does not know"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "low_freq_factor"),
    ],
)
def test_models_that_llama_cpp_cannot_hold_are_refused_by_name(ternary_model, tmp_path, change, named):
    model = edited(ternary_model, tmp_path / "model", lambda config: config.update(change))
    with pytest.raises(BadInput, match=r"EW-(324|327|329|505)") as error:  # some already when the source is opened
        write(load_source(model), tmp_path / "m.gguf", quant="f32")
    assert named in str(error.value)


def test_missing_weights_are_named(ternary_model, tmp_path):
    model = edited(ternary_model, tmp_path / "model", lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(BadInput, match="EW-324.*\n.*model\\.layers\\.2\\."):
        place(load_source(model), "f32", "f32")


# ---------------------------------------------------------------- tokenizers


def retrained(model: Path, target: Path, pre: Any, *, ignore_merges: bool = False) -> Path:
    """A model whose tokenizer splits text in another way."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    shutil.copytree(model, target)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["I'm 1234 12 don't\n\n  x SHE'S ok " * 30, "def f(x):\n    return x " * 30], trainer)
    tokenizer.save(str(target / "tokenizer.json"))
    return target


def pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    from edgewright.export.gguf.vocabulary import PRE_TOKENIZERS

    steps = next(steps for known, steps, _ in PRE_TOKENIZERS if known == name)
    make = {
        "ByteLevel": lambda step: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]),
        "Digits": lambda step: pre_tokenizers.Digits(individual_digits=True),
        "Split": lambda step: pre_tokenizers.Split(Regex(step["regex"]), "isolated"),
    }
    built = [make[step["type"]](step) for step in steps]
    return built[0] if len(built) == 1 else pre_tokenizers.Sequence(built)


def assert_same_tokens(model: Path, file: Path) -> None:
    from edgewright.export.runtimes import open_session

    with open_session(model, threads=1) as reference, open_session(file, threads=1) as candidate:
        for text in TEXTS:
            tokens = reference.tokenize(text)
            assert candidate.tokenize(text) == tokens, text
            assert candidate.detokenize(tokens) == reference.detokenize(tokens), text
        assert (candidate.start_id, candidate.eos_ids) == (reference.start_id, reference.eos_ids)


@pytest.mark.parametrize(
    ("name", "ignore_merges"), [("gpt-2", False), ("smollm", False), ("llama-bpe", True), ("qwen2", False)]
)
def test_text_is_split_as_the_checkpoint_does(ternary_model, tmp_path, name, ignore_merges):
    model = retrained(ternary_model, tmp_path / "model", pre_tokenizer(name), ignore_merges=ignore_merges)
    source = load_source(model)
    assert read_vocabulary(source).pre == name
    write(source, tmp_path / "m.gguf", quant="tq2_0")
    assert_same_tokens(model, tmp_path / "m.gguf")


def test_sentencepiece_style_text_is_split_as_the_checkpoint_does(stories, tmp_path):
    source = load_source(stories)
    vocabulary = read_vocabulary(source)
    assert (vocabulary.model, vocabulary.add_bos, vocabulary.add_space_prefix) == ("llama", True, True)
    assert vocabulary.types.count(gguf.TokenType.BYTE) == 256
    write(source, tmp_path / "m.gguf", quant="q8_0")
    assert_same_tokens(stories, tmp_path / "m.gguf")


def test_a_real_sentencepiece_vocabulary(ternary_model, tmp_path):
    folder = SHARED / "tokenizers" / "mistral_v1"
    if not folder.is_dir():
        pytest.skip("the tokenizer mistral_v1 is not beside the repository")
    model = saved_llama(tmp_path / "model", ternary_model, vocab_size=32000, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, model / name)
    write(load_source(model), tmp_path / "m.gguf", quant="q8_0")
    from edgewright.export.runtimes import open_session

    texts = [text for text in TEXTS if not text.startswith(" ")]  # it puts no second space in front of a space
    with open_session(model, threads=1) as reference, open_session(tmp_path / "m.gguf", threads=1) as candidate:
        for text in texts:
            assert candidate.tokenize(text) == reference.tokenize(text), text


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORD_PIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"[UNK]": 0},
}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "EW-506", "pre-tokenizer"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "EW-506", "pre-tokenizer"),
        ({"normalizer": {"type": "Lowercase"}}, "EW-506", "normalizer"),
        ({"model": WORD_PIECE}, "EW-506", "WordPiece"),
    ],
)
def test_unknown_tokenizers_are_refused(ternary_model, tmp_path, change, code, named):
    model = edited(ternary_model, tmp_path / "model", lambda value: value.update(change), "tokenizer.json")
    with pytest.raises(BadInput, match=code) as error:
        read_vocabulary(load_source(model))
    assert named in str(error.value)


def test_a_tokenizer_file_that_is_none_is_refused(ternary_model, tmp_path):
    model = edited(ternary_model, tmp_path / "model", lambda value: value["model"].pop("vocab"), "tokenizer.json")
    with pytest.raises(BadInput, match=r"tokenizer\.json.*EW-325"):
        load_source(model)


def test_a_tokenizer_of_another_model_is_refused(ternary_model, tmp_path):
    def longer(value: dict[str, Any]) -> None:
        value["model"]["vocab"]["zzz"] = 320

    model = edited(ternary_model, tmp_path / "longer", longer, "tokenizer.json")
    with pytest.raises(BadInput, match=r"'zzz' has id 320"):
        read_vocabulary(load_source(model))
    model = edited(ternary_model, tmp_path / "endless", lambda value: value.pop("eos_token"), "tokenizer_config.json")
    model = edited(model, tmp_path / "endless2", lambda value: value.update(eos_token_id=None))
    with pytest.raises(BadInput, match="end-of-text"):
        read_vocabulary(load_source(model))


def test_a_padded_vocabulary_is_filled_with_unused_tokens(ternary_model, tmp_path):
    source = load_source(ternary_model)
    vocabulary = read_vocabulary(replace(source, config=source.config | {"vocab_size": 384}))
    assert len(vocabulary.tokens) == 384
    assert vocabulary.types.count(gguf.TokenType.UNUSED) == 384 - source.config["vocab_size"]
