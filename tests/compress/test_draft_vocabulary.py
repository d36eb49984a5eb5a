"""The vocabulary surgeon: rows go where the target has their texts; there and back is the model that it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import edgewright
from edgewright.compress.draft_vocabulary import MEAN, align, moved, texts_of
from edgewright.errors import RecipeError
from edgewright.student import load_model

END = "<|endoftext|>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("o", "n")]


def words(*, extra: int = 0) -> list[str]:
    return [END, *BYTES, *("".join(pair) for pair in MERGES), *(f"<|extra_{n}|>" for n in range(extra))]


def write_model(folder: Path, texts: list[str], *, rows: int, seed: int, tied: bool = True, hidden: int = 32) -> Path:
    """A random Llama whose tokens have the numbers of a list."""
    folder.mkdir(parents=True)
    number = {text: token for token, text in enumerate(texts)}
    merges = [pair for pair in MERGES if "".join(pair) in number]
    tokenizer = Tokenizer(models.BPE(vocab=number, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([text for text in texts if text.startswith("<|")])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": END, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    torch.manual_seed(seed)
    end = number[END]
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def shuffled(texts: list[str], seed: int = 0) -> list[str]:
    return [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]


def reordered(model: PreTrainedModel, ours: Path, theirs: Path, rows: int) -> dict[str, torch.Tensor]:
    order = align(texts_of(ours), texts_of(theirs), model.config.vocab_size, rows)
    return moved(model, torch.from_numpy(order.rows))


def test_there_and_back_is_the_model_that_it_was(tmp_path: Path) -> None:
    """By the texts of tokens, padding rows too."""
    one = write_model(tmp_path / "one", words(), rows=272, seed=0)
    other = write_model(tmp_path / "other", shuffled(words()), rows=272, seed=1)
    model = load_model(one)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(reordered(model, one, other, 272))
    assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    model.load_state_dict(reordered(model, other, one, 272))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


STAGE = """
version: 1
name: aligned
data:
  type: files
  files: text.txt
  tokenizer: {{type: pretrained, path: target}}
  sequence_length: 16
  held_out: 0.2
target: {target}
stages:
  - name: draft
    student: {{type: draft_vocabulary, source: {{type: checkpoint, model: {source}}},
      target: {{type: checkpoint, model: target}}{more}}}
    optimizer: {{type: adamw, learning_rate: 1e-9, weight_decay: 0.0}}
    budget: {{max_steps: 1}}
    training: {{per_device_train_batch_size: 2, eval_steps: 0, eval_sequences: 2}}
evaluate: null
bench: null
"""


def recipe(folder: Path, source: Path, target: Path, more: str = "") -> Path:
    (folder / "text.txt").write_text("the thin man and the other one in a tin\n" * 60 + END + "anon\n" * 60)
    path = folder / "recipe.yaml"
    path.write_text(STAGE.format(source=source, target=target, more=more))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_model_says_the_same_texts_with_the_targets_numbers(tmp_path: Path, tied: bool) -> None:
    source = write_model(tmp_path / "small", words(), rows=263, seed=0, tied=tied)
    target = write_model(tmp_path / "large", shuffled(words()), rows=288, seed=1, hidden=64)
    path = recipe(tmp_path, source, target)
    report = edgewright.check(path)
    assert report.ok, report.errors
    assert any("263 of the target's 263 tokens are there" in check.found for check in report.checks)
    said: list[str] = []
    edgewright.run(path, f"output_dir={tmp_path / 'run'}", say=said.append)
    start = tmp_path / "run/stages/draft/start"
    record = json.loads((start / "start.json").read_text())
    assert (record["tokens"], record["shared"], record["padding"]) == (263, 263, 25)
    assert record["share_of_text"] == 1.0 and record["first_missing"] is None
    before, after = load_model(source).eval(), load_model(start).eval()
    assert after.config.vocab_size == 288 and after.config.eos_token_id == load_model(target).config.eos_token_id
    numbers = {text: token for token, text in texts_of(target).items()}
    old = {text: token for token, text in texts_of(source).items()}
    names = ["the", "in", "t", END, "on"]
    with torch.no_grad():
        ours = before(torch.tensor([[old[name] for name in names]])).logits[0]
        theirs = after(torch.tensor([[numbers[name] for name in names]])).logits[0]
    everything = sorted(old)
    torch.testing.assert_close(
        theirs[:, [numbers[name] for name in everything]], ours[:, [old[name] for name in everything]]
    )
    model = tmp_path / "run/stages/draft/model"
    assert (model / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    shutil.rmtree(tmp_path / "run/stages/draft")
    edgewright.run(path, f"output_dir={tmp_path / 'run'}", say=said.append)
    assert json.loads((start / "start.json").read_text()) == record, "made again it is the same"


def test_real_differences_are_refused_with_the_first_token(tmp_path: Path) -> None:
    texts = words()
    target = write_model(tmp_path / "large", [*texts[:200], "<|new|>", *texts[200:], "<|newer|>"], rows=288, seed=1)
    source = write_model(tmp_path / "small", texts, rows=263, seed=0)
    path = recipe(tmp_path, source, target)
    report = edgewright.check(path)
    (error,) = [error for error in report.errors if error.code == "EW-844"]
    assert "token 200" in error.message() and "<|new|>" in error.message() and "1 more of 265" in error.message()
    with pytest.raises(RecipeError, match="EW-844"):
        edgewright.run(path, f"output_dir={tmp_path / 'run'}", say=lambda _: None)


def test_missing_tokens_may_start_as_the_mean_and_are_counted(tmp_path: Path) -> None:
    texts = words()
    target = write_model(tmp_path / "large", texts, rows=263, seed=1)
    source = write_model(tmp_path / "small", [text for text in texts if text != "the"], rows=262, seed=0)
    path = recipe(tmp_path, source, target, ", missing: mean")
    edgewright.run(path, f"output_dir={tmp_path / 'run'}", say=lambda _: None)
    record = json.loads((tmp_path / "run/stages/draft/start/start.json").read_text())
    assert record["first_missing"] == "the" and record["shared"] == 262 and 0 < record["share_of_text"] < 1
    before, after = load_model(source), load_model(tmp_path / "run/stages/draft/start")
    row = after.get_input_embeddings().weight[texts.index("the")]
    torch.testing.assert_close(row, before.get_input_embeddings().weight.mean(0))


def test_padding_comes_from_padding_where_there_is_some() -> None:
    order = align({0: "a", 1: "b"}, {0: "b", 1: "a"}, 4, 5)
    assert order.rows.tolist() == [1, 0, 2, 3, MEAN] and order.missing == () and order.unmoved == 0
