"""Tokenizers: training, and any Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgewright.data.text import pieces
from edgewright.data.tokenizer import END_OF_TEXT, TrainTokenizer, load_encoder, train_tokenizer
from edgewright.errors import BadInput

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
TEXT = "".join(f"def name_{number}(value):\n    return value + {number}  # übrig 日本\n\n" for number in range(400))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(pieces([TEXT]), TrainTokenizer(vocab_size=300), directory)
    return directory


def test_training_is_deterministic(trained: Path, tmp_path: Path) -> None:
    train_tokenizer(pieces([TEXT]), TrainTokenizer(vocab_size=300), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_a_trained_tokenizer_is_lossless_on_any_text(trained: Path) -> None:
    encoder = load_encoder(trained)
    assert (encoder.vocab_size, encoder.start_id, encoder.eos_id) == (300, 0, 0)
    assert encoder.dtype is np.uint16
    for text in (TEXT, "  leading", "\t\r\n", "".join(map(chr, range(1, 400))), "😀" * 5):
        (ids,) = encoder.encode([text])
        assert ids.dtype == np.uint16 and 0 not in ids
        assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_special_tokens_are_not_read_out_of_the_text(trained: Path) -> None:
    encoder = load_encoder(trained)
    (ids,) = encoder.encode([f"a{END_OF_TEXT}b"])
    assert 0 not in ids and len(ids) > 3


def test_transformers_opens_it(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained, local_files_only=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 0, 300)
    assert theirs(TEXT[:500])["input_ids"] == load_encoder(trained).encode([TEXT[:500]])[0].tolist()
    assert theirs.decode(theirs(TEXT[:500])["input_ids"]) == TEXT[:500]


def test_the_vocabulary_may_be_smaller_than_wanted(tmp_path: Path) -> None:
    train_tokenizer(["aa aa"], TrainTokenizer(vocab_size=5000), tmp_path)
    assert 257 <= load_encoder(tmp_path).vocab_size < 270


def shared_tokenizer(name: str) -> Path:
    directory = SHARED / name
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"{directory} is not there")
    return directory


@pytest.mark.parametrize("name", ["trained", "stories260K", "tokenizers/mistral_v1"])
def test_pieces_encode_to_the_tokens_of_the_whole(name: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(trained if name == "trained" else shared_tokenizer(name))
    text = (TEXT + "Once upon a time, there was a little girl. She said: 'Why?' \n\n" * 50) * 3
    (whole,) = encoder.encode([text])
    monkeypatch.setattr("edgewright.data.tokenizer.pieces", lambda texts: pieces(texts, limit=400))
    cut = list(encoder.cut([text]))
    assert len(cut) > 100
    assert np.array_equal(np.concatenate(encoder.encode(cut)), whole)


def test_start_and_end_tokens(tmp_path: Path) -> None:
    encoder = load_encoder(shared_tokenizer("stories260K"))
    assert (encoder.vocab_size, encoder.start_id, encoder.eos_id) == (512, 1, 2)


def settings(trained: Path, directory: Path, name: str, content: object) -> Path:
    shutil.copy(trained / "tokenizer.json", directory)
    (directory / name).write_text(json.dumps(content))
    return directory


def test_end_tokens_come_from_the_model_where_the_tokenizer_has_none(trained: Path, tmp_path: Path) -> None:
    directory = settings(trained, tmp_path, "config.json", {"bos_token_id": None, "eos_token_id": [0, 5]})
    encoder = load_encoder(directory)
    assert (encoder.start_id, encoder.eos_id) == (0, 0)


def test_a_token_may_be_written_as_an_object(trained: Path, tmp_path: Path) -> None:
    content = {"eos_token": {"content": END_OF_TEXT}, "bos_token": {"content": "a"}}
    encoder = load_encoder(settings(trained, tmp_path, "tokenizer_config.json", content))
    assert encoder.eos_id == 0 and encoder.start_id != 0


def test_truncation_and_padding_of_a_foreign_tokenizer_are_switched_off(trained: Path, tmp_path: Path) -> None:
    tokenizer = load_encoder(trained).tokenizer
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    settings(trained, tmp_path, "tokenizer_config.json", {"eos_token": END_OF_TEXT})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_encoder(tmp_path).encode(["a b c d e f g h"])[0]) == 15


def test_tokenizers_that_cannot_be_used(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tokenizer.json") as caught:
        load_encoder(tmp_path)
    assert caught.value.code == "EW-220"
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(BadInput, match="EW-220"):
        load_encoder(tmp_path)
    shutil.copy(trained / "tokenizer.json", tmp_path)
    with pytest.raises(BadInput, match="no end-of-text token") as caught:
        load_encoder(tmp_path)
    assert caught.value.code == "EW-221"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInput, match="tokenizer_config.json"):
        load_encoder(tmp_path)
