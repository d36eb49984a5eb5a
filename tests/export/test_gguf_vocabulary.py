"""Vocabularies against llama.cpp's own test vectors and on many languages; chat templates; what cannot be expressed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import save_family

from edgewright.errors import BadInput
from edgewright.export.gate.texts import REAL
from edgewright.export.gguf.file import open_gguf
from edgewright.export.gguf.vocabulary import PRE_TOKENIZERS, read_vocabulary
from edgewright.export.runtimes import open_session
from edgewright.export.source import load_source
from edgewright.export.to_gguf import write

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tokenizers"

TEXTS = (
    *REAL.values(),
    "",
    "a",
    "  two spaces, then\ttabs\t\tand\n\n\nlines\r\n  ",
    "I'm you're we'll they'd SHE'S don't 'tis",
    "camelCaseAndHTTPServer snake_case 3.14159e-10 0xFF 1_000_000 12345678 ½ ² ٣",
    "naïve café e\u0301\u0302 ﬁ \u200b\ufeff\u00a0x",
    "<|end|> <s> </s> [PAD300] <0x41>",
)


def shared(name: str) -> Path:
    """A folder of real tokenizers; skips where it is not there."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"the tokenizer {name} is not beside the repository")
    return SHARED / name


def with_tokenizer(family: str, directory: Path, size: int, build: Callable[[Path], None]) -> Path:
    """A tiny model of a family with a tokenizer of so many tokens, which `build` puts into its directory."""
    model = save_family(family, directory, {"vocab_size": size, "num_hidden_layers": 1, "num_key_value_heads": 4})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    build(model)
    return model


def disagreements(model: Path, file: Path, texts: tuple[str, ...] = TEXTS) -> list[str]:
    """The texts that the runtime splits or puts together otherwise than the checkpoint's tokenizer."""
    found = []
    with open_session(model, threads=1) as reference, open_session(file, threads=1) as candidate:
        for text in texts:
            tokens = reference.tokenize(text)
            if candidate.tokenize(text) != tokens or candidate.detokenize(tokens) != reference.detokenize(tokens):
                found.append(text)
    return found


def test_gpt2_splits_as_the_test_vectors_of_llama_cpp_say(tmp_path):
    files, vectors = shared("gpt2"), shared("ggml_vocab")

    def build(model: Path) -> None:
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(files / name, model / name)

    model = save_family("gpt2", tmp_path / "model", {"vocab_size": 50257, "n_layer": 1, "n_embd": 32})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    build(model)
    write(load_source(model), tmp_path / "m.gguf", quant="q8_0")
    texts = (vectors / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    right = (vectors / "ggml-vocab-gpt-2.gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) > 40
    with open_session(tmp_path / "m.gguf", threads=1) as session:
        for text, line in zip(texts, right, strict=False):
            assert session.tokenize(text) == [int(token) for token in line.split()], text
    assert disagreements(model, tmp_path / "m.gguf", (*TEXTS, *texts)) == []


def trained(name: str, *, ignore_merges: bool) -> Any:
    """A byte-level tokenizer with one of the known pre-tokenizers, trained on the texts that it is tested on."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    make = {
        "ByteLevel": lambda step: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]),
        "Digits": lambda step: pre_tokenizers.Digits(individual_digits=True),
        "Split": lambda step: pre_tokenizers.Split(Regex(step["regex"]), "isolated"),
    }
    steps = next(steps for known, steps, _ in PRE_TOKENIZERS if known == name)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([make[step["type"]](step) for step in steps])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(5)], trainer)
    return tokenizer


def saved(tokenizer: Any) -> Callable[[Path], None]:
    def build(model: Path) -> None:
        tokenizer.save(str(model / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))

    return build


COMBINING = {REAL["multilingual"], "naïve café e\u0301\u0302 ﬁ \u200b\ufeff\u00a0x"}
SPLIT_OTHERWISE = {"gpt-4o": COMBINING, "tekken": COMBINING}
"""llama.cpp's rules for these two leave out combining marks and know capitals of a to z only."""


@pytest.mark.parametrize(("name", "ignore_merges"), [(name, ignore) for name, _, ignore in PRE_TOKENIZERS])
def test_many_languages_are_split_as_the_checkpoint_does(tmp_path, name, ignore_merges):
    tokenizer = trained(name, ignore_merges=ignore_merges)
    model = with_tokenizer("llama", tmp_path / "model", tokenizer.get_vocab_size(), saved(tokenizer))
    source = load_source(model)
    assert read_vocabulary(source).pre == name
    write(source, tmp_path / "m.gguf", quant="f32")
    assert set(disagreements(model, tmp_path / "m.gguf")) == SPLIT_OTHERWISE.get(name, set())
    assert (read_vocabulary(source).note is not None) == (name in SPLIT_OTHERWISE)


def sentencepiece_like(*, prefix: bool, all_merges: bool) -> Any:
    """BPE with byte fallback and a space marker, as Gemma has it; with `all_merges` those that pieces imply."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    space = "\u2581"
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", space)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prefix else replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # while training: no merges across lines
    special = ["<unk>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text for text in REAL.values() for _ in range(5)], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] < 2]
    content["pre_tokenizer"] = json.loads(pre_tokenizers_of_gemma())
    if all_merges:
        vocabulary = content["model"]["vocab"]
        content["model"]["merges"] = [
            [token[:cut], token[cut:]]
            for token, _ in sorted(vocabulary.items(), key=lambda entry: entry[1])
            if not token.startswith("<0x") and token not in special
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_tokens([AddedToken("<turn>", normalized=False)])
    return tokenizer


def pre_tokenizers_of_gemma() -> str:
    return json.dumps({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False})


@pytest.mark.parametrize(
    ("prefix", "all_merges", "kind"), [(False, True, "llama"), (True, True, "llama"), (False, False, "gemma4")]
)
def test_sentencepiece_like_vocabularies(tmp_path, prefix, all_merges, kind):
    tokenizer = sentencepiece_like(prefix=prefix, all_merges=all_merges)
    model = with_tokenizer("llama", tmp_path / "model", tokenizer.get_vocab_size(), saved(tokenizer))
    vocabulary = read_vocabulary(load_source(model))
    assert (vocabulary.model, vocabulary.add_space_prefix) == (kind, prefix)
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    assert (
        disagreements(model, tmp_path / "m.gguf", (*TEXTS, "one<turn>two <turn> three", " begins with a space")) == []
    )


def test_merges_that_llama_cpp_would_not_follow_are_refused(tmp_path):
    tokenizer = sentencepiece_like(prefix=True, all_merges=False)
    model = with_tokenizer("llama", tmp_path / "model", tokenizer.get_vocab_size(), saved(tokenizer))
    with pytest.raises(BadInput, match=r"its merges.*EW-506"):
        read_vocabulary(load_source(model))


def test_mistral_differs_where_a_text_begins_with_a_space_and_says_so(tmp_path):
    files = shared("mistral_v1")

    def build(model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(files / name, model / name)

    model = with_tokenizer("mistral", tmp_path / "model", 32000, build)
    written = write(load_source(model), tmp_path / "m.gguf", quant="q8_0")
    assert [note for note in written.notes if "begins with a space" in note] == written.notes != []
    spaced = (" ", "  x", " begins with a space", "\u2581marker")
    texts = (*TEXTS, "ends with a space ", "\n begins with a line")
    found = disagreements(model, tmp_path / "m.gguf", (*texts, *spaced))
    assert set(found) == {text for text in (*texts, *spaced) if text.startswith((" ", "\u2581"))}


def test_the_chat_template_and_all_ends_are_in_the_file(tmp_path):
    model = save_family("llama", tmp_path / "model", {"eos_token_id": [0, 5, 9]})
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    assert open_gguf(tmp_path / "m.gguf").settings["tokenizer.chat_template"] == template
    with open_session(tmp_path / "m.gguf", threads=1) as session:
        assert session.eos_ids >= {0, 5, 9}
    (model / "chat_template.jinja").write_text("beside {{ messages }}")
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    assert open_gguf(tmp_path / "m.gguf").settings["tokenizer.chat_template"] == "beside {{ messages }}"


def test_added_tokens_that_swallow_spaces_are_refused(tmp_path):
    model = save_family("llama", tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    added = {"id": 289, "content": "<turn>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    text = next(text for text, index in content["model"]["vocab"].items() if index == 289)
    content["added_tokens"].append({**added, "content": text, "special": False})
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"'lstrip' of the added token.*EW-506"):
        read_vocabulary(load_source(model))


def test_a_name_that_means_something_to_llama_cpp_is_left_out(tmp_path):
    model = save_family("phi3", tmp_path / "Phi-3-mini")
    write(load_source(model), tmp_path / "m.gguf", quant="f32")
    assert "general.name" not in open_gguf(tmp_path / "m.gguf").settings
    with open_session(tmp_path / "m.gguf", threads=1) as session:
        assert session.vocab_size > 256
