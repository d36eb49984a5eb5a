"""From a corpus to packed tokens: layout, reuse, damage, bad corpora, counts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from edgewright.data import (
    Corpus,
    Counts,
    DataConfig,
    FilesData,
    HfData,
    StdlibData,
    iterate_documents,
    prepare_data,
)
from edgewright.data.shards import StreamWriter
from edgewright.data.split import HashSplit
from edgewright.data.text import is_held_out
from edgewright.data.tokenizer import load_encoder
from edgewright.errors import BadInput, NeedsNetwork, OutOfResources

NAMES = [f"f{number:02}.txt" for number in range(40)]
SMALL = {"tokenizer": {"type": "train", "vocab_size": 300}, "sequence_length": 16, "held_out": 0.2}


def silent(line: str) -> None:
    pass


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_text(
            f"File {number}: " + f"the value of {number} is {number * number}. " * (3 + number % 5)
        )


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "my")
    return tmp_path / "my"


def small(folder: Path, **changes: object) -> FilesData:
    return FilesData.model_validate({"files": f"{folder}/*.txt", **SMALL, **changes})


def prepare(config: object, directory: Path) -> tuple[Corpus, list[str]]:
    lines: list[str] = []
    return prepare_data(config, directory, say=lines.append), lines  # type: ignore[arg-type]


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_streams_hold_every_document_once_with_separators(corpus_dir: Path, tmp_path: Path) -> None:
    corpus, _ = prepare(small(corpus_dir), tmp_path / "data")
    encoder = load_encoder(corpus.tokenizer_dir)
    for stream, held_out in ((corpus.train, False), (corpus.held_out, True)):
        texts = [(corpus_dir / name).read_text() for name in NAMES if is_held_out(name, 0.2) == held_out]
        expected = [corpus.eos_id]
        for text in texts:
            expected += [*encoder.encode([text])[0].tolist(), corpus.eos_id]
        assert stream.tokens.tolist() == expected
        assert (stream.documents, stream.bytes) == (len(texts), sum(map(len, texts)))
        assert isinstance(stream.tokens, np.memmap) and stream.tokens.dtype == np.uint16
    assert corpus.report["documents"] == 40
    assert corpus.report["tokens"] == len(corpus.train) + len(corpus.held_out)
    assert corpus.report["bytes_per_token"] == corpus.report["bytes"] / corpus.report["tokens"]


def test_a_tokenizer_with_its_own_start_token(corpus_dir: Path, tmp_path: Path) -> None:
    first, _ = prepare(small(corpus_dir), tmp_path / "first")
    settings = first.tokenizer_dir / "tokenizer_config.json"
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((first.tokenizer_dir / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_text(json.dumps({**json.loads(settings.read_text()), "bos_token": "a"}))
    config = small(corpus_dir, tokenizer={"type": "pretrained", "path": str(other)})
    second, _ = prepare(config, tmp_path / "second")
    bos, eos = second.start_id, second.eos_id
    assert bos != eos == 0
    documents = " ".join(map(str, first.train.tokens.tolist()[1:-1])).split(" 0 ")
    expected = " ".join(f"{bos} {document} {eos}" for document in documents)
    assert second.train.tokens.tolist() == list(map(int, expected.split()))


def test_a_corpus_is_known_by_its_contents(corpus_dir: Path, tmp_path: Path) -> None:
    """So that a run goes on after its files were copied or touched, and not with other text."""
    first, _ = prepare(small(corpus_dir), tmp_path / "data")
    os.utime(corpus_dir / NAMES[0], (1, 1))
    second, lines = prepare(small(corpus_dir), tmp_path / "data")
    assert "changed" in lines[0] and second.fingerprint == first.fingerprint
    (corpus_dir / NAMES[0]).write_text("other text")
    third, _ = prepare(small(corpus_dir), tmp_path / "data")
    assert third.fingerprint != first.fingerprint


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    folder = tmp_path / "my"
    write_corpus(folder)
    for name in NAMES:
        if is_held_out(name, 0.2):
            (folder / name).write_text("qqzzqqzz " * 200)
    corpus, _ = prepare(small(folder), tmp_path / "data")
    vocabulary = load_encoder(corpus.tokenizer_dir).tokenizer.get_vocab()
    assert not [token for token in vocabulary if "qq" in token]
    assert [token for token in vocabulary if "value" in token]


def test_a_second_call_reuses_and_gives_the_same(corpus_dir: Path, tmp_path: Path) -> None:
    first, _ = prepare(small(corpus_dir), tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    second, lines = prepare(small(corpus_dir, sequence_length=8), tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    assert "nothing to do" in lines[-1]
    assert (second.fingerprint, second.report) == (first.fingerprint, first.report)
    assert np.array_equal(first.train.tokens, second.train.tokens)


def test_preparing_twice_gives_the_same_bytes_wherever_it_lies(corpus_dir: Path, tmp_path: Path) -> None:
    prepare(small(corpus_dir), tmp_path / "one")
    moved = corpus_dir.rename(tmp_path / "moved")
    prepare(small(moved), tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "index.json").read_text()


def test_changed_sources_and_settings_are_noticed(corpus_dir: Path, tmp_path: Path) -> None:
    first, _ = prepare(small(corpus_dir), tmp_path / "data")
    (corpus_dir / NAMES[0]).write_text("something else, and quite a bit of it")
    second, lines = prepare(small(corpus_dir), tmp_path / "data")
    assert "changed" in lines[0] and second.fingerprint != first.fingerprint
    third, lines = prepare(small(corpus_dir, held_out=0.4), tmp_path / "data")
    assert "changed" in lines[0] and third.held_out.documents > second.held_out.documents
    (corpus_dir / NAMES[1]).unlink()
    fourth, lines = prepare(small(corpus_dir, held_out=0.4), tmp_path / "data")
    assert "changed" in lines[0] and fourth.report["documents"] == 39


@pytest.mark.parametrize("damage", ["train.bin", "held_out.bin", "tokenizer/tokenizer.json", "index.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damaged_files_are_made_again(corpus_dir: Path, tmp_path: Path, damage: str, how: str) -> None:
    data = tmp_path / "data"
    prepare(small(corpus_dir), data)
    good = hashes(data)
    file = data / damage
    content = file.read_bytes()
    middle = len(content) // 2
    if how == "flip":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x81]) + content[middle + 1 :])
    elif how == "cut":
        file.write_bytes(content[:middle])
    else:
        file.unlink()
    _, lines = prepare(small(corpus_dir), data)
    assert lines[0].startswith("preparing the corpus")
    assert hashes(data) == good


@pytest.mark.parametrize("writes", [1, 5, 30])
def test_an_interrupted_preparation_is_done_again(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    data = tmp_path / "data"
    prepare(small(corpus_dir), data)
    good = hashes(data)
    (corpus_dir / "new.txt").write_text("one more document")
    left = [writes]
    whole = StreamWriter.add

    def add(self: StreamWriter, ids: np.ndarray) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        whole(self, ids)

    monkeypatch.setattr(StreamWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        prepare(small(corpus_dir), data)
    monkeypatch.undo()
    assert not (data / "index.json").exists() and not list(data.glob("*.tmp"))
    (corpus_dir / "new.txt").unlink()
    prepare(small(corpus_dir), data)
    assert hashes(data) == good


def test_a_full_disk_is_no_traceback(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: StreamWriter, ids: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StreamWriter, "add", full)
    with pytest.raises(OutOfResources, match="disk is full") as caught:
        prepare(small(corpus_dir), tmp_path / "data")
    assert caught.value.exit_code == 4


def test_what_is_dropped_is_counted_and_said(corpus_dir: Path, tmp_path: Path) -> None:
    (corpus_dir / "blank.txt").write_text("\n \n")
    (corpus_dir / "twin.txt").write_text((corpus_dir / NAMES[3]).read_text())
    (corpus_dir / "bad.txt").write_bytes(b"fine but for one byte \xff at the end of it")
    (corpus_dir / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(BadInput, match=r"bad\.txt:1:23.*EW-201"):
        prepare(small(corpus_dir), tmp_path / "data")
    corpus, lines = prepare(small(corpus_dir, on_bad_text="skip"), tmp_path / "data")
    names = ("documents", "blank", "duplicates", "skipped", "replaced")
    assert [corpus.report[name] for name in names] == [40, 1, 1, 2, 0]
    assert "1 blank, 1 duplicates, 2 skipped" in lines[-1]
    (corpus_dir / "image.txt").unlink()
    corpus, _ = prepare(small(corpus_dir, on_bad_text="replace"), tmp_path / "data")
    assert [corpus.report[name] for name in names] == [41, 1, 1, 0, 1]


def one_file(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "EW-210"), (b"\n\n \n\t\n", "EW-210"), (b"a", "EW-211"), (b"\x7fELF\0\0", "EW-202")]
)
def test_corpora_without_use(tmp_path: Path, content: bytes, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(small(one_file(tmp_path / "my", content)), tmp_path / "data")
    assert caught.value.code == code and caught.value.exit_code == 3
    assert caught.value.fix and not (tmp_path / "data" / "index.json").exists()


def test_a_corpus_of_nothing_but_bad_documents(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "my", b"\xff text")
    with pytest.raises(BadInput, match="1 skipped"):
        prepare(small(folder, on_bad_text="skip"), tmp_path / "data")


def test_no_text_left_for_training(corpus_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"40 documents kept, [\d,]+ bytes; data.held_out is 0.9999") as caught:
        prepare(small(corpus_dir, held_out=0.9999), tmp_path / "data")
    assert caught.value.code == "EW-211" and not (tmp_path / "data" / "index.json").exists()


LINES = [f"Line {number} says that {number} is {'odd' if number % 2 else 'even'}.\n" for number in range(400)]


def decoded(corpus: Corpus, side: str) -> str:
    """The documents of a split, read back from its tokens."""
    stream = corpus.train if side == "train" else corpus.held_out
    return str(load_encoder(corpus.tokenizer_dir).tokenizer.decode(stream.tokens.tolist(), skip_special_tokens=True))


def test_one_long_document_is_enough(tmp_path: Path) -> None:
    """Names cannot divide it, so its end is held out; the evaluation finds the same text."""
    config = small(one_file(tmp_path / "my", "".join(LINES).encode()), held_out=0.1)
    corpus, lines = prepare(config, tmp_path / "data")
    train, held_out = decoded(corpus, "train"), decoded(corpus, "held_out")
    assert train + held_out == "".join(LINES)
    assert train.endswith("\n") and 0.1 <= len(held_out) / len(train + held_out) < 0.11
    for stream, text in ((corpus.train, train), (corpus.held_out, held_out)):
        assert (stream.documents, stream.bytes) == (1, len(text))
        assert stream.tokens.tolist().count(corpus.eos_id) == 2, "the context of a document stays whole"
    assert [text for _, text in iterate_documents(config, split="held_out", rule=corpus.split)] == [held_out]
    assert [text for _, text in iterate_documents(config, split="train", rule=corpus.split)] == [train]
    assert corpus.report["split"] == {"rule": "tail", "training_bytes": len(train)}
    assert corpus.report["documents"] == 1 and corpus.report["bytes"] == len(train + held_out)
    assert f"held out are the last {len(held_out):,} of" in lines[1]
    again, lines = prepare(config, tmp_path / "data")
    assert "nothing to do" in lines[0] and again.split == corpus.split and again.fingerprint == corpus.fingerprint
    other, _ = prepare(config, tmp_path / "other")
    assert hashes(tmp_path / "other") == hashes(tmp_path / "data") and other.fingerprint == corpus.fingerprint


def test_a_few_documents_are_enough(corpus_dir: Path, tmp_path: Path) -> None:
    for name in NAMES:
        if is_held_out(name, 0.2):
            (corpus_dir / name).unlink()
    config = small(corpus_dir)
    corpus, _ = prepare(config, tmp_path / "data")
    left = [name for name in NAMES if not is_held_out(name, 0.2)]
    train = list(iterate_documents(config, split="train", rule=corpus.split))
    held_out = list(iterate_documents(config, split="held_out", rule=corpus.split))
    assert [name for name, _ in train] == left[: len(train)]
    assert held_out[0][0] == f"{train[-1][0]}@{len(train[-1][1])}"
    assert [name for name, _ in held_out[1:]] == left[len(train) :]
    assert "".join(text for _, text in train + held_out) == "".join((corpus_dir / name).read_text() for name in left)
    assert (corpus.train.documents, corpus.held_out.documents) == (len(train), len(held_out))


def test_the_tokenizer_does_not_learn_from_the_held_out_end(tmp_path: Path) -> None:
    text = "".join(LINES) + "qqzzqqzz " * 150
    corpus, _ = prepare(small(one_file(tmp_path / "my", text.encode()), held_out=0.1), tmp_path / "data")
    vocabulary = load_encoder(corpus.tokenizer_dir).tokenizer.get_vocab()
    assert "qq" in decoded(corpus, "held_out") and not [token for token in vocabulary if "qq" in token]


def test_an_index_from_before_splits_were_remembered(corpus_dir: Path, tmp_path: Path) -> None:
    first, _ = prepare(small(corpus_dir), tmp_path / "data")
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    del index["split"]
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    second, lines = prepare(small(corpus_dir), tmp_path / "data")
    assert "nothing to do" in lines[0] and second.split == first.split == HashSplit(held_out=0.2)
    assert (second.report, second.fingerprint) == (first.report, first.fingerprint)


def test_one_document_shorter_than_a_sequence(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "my", b"A few words, and then some more of them.")
    with pytest.raises(BadInput, match="the held-out split is shorter than one sequence") as caught:
        prepare(small(folder), tmp_path / "data")
    assert caught.value.code == "EW-212" and "tokens in 1 documents" in str(caught.value)
    assert "give more text" in str(caught.value.fix)


@pytest.mark.parametrize("split", ["training", "held-out"])
def test_shorter_than_a_sequence(corpus_dir: Path, tmp_path: Path, split: str) -> None:
    held_out = 0.2 if split == "held-out" else 0.8  # so that this split is the short one
    corpus, _ = prepare(small(corpus_dir, held_out=held_out), tmp_path / "data")
    length = len(corpus.train if split == "training" else corpus.held_out)
    prepare(small(corpus_dir, held_out=held_out, sequence_length=length - 1), tmp_path / "data")
    with pytest.raises(BadInput, match=f"the {split} split is shorter than one sequence") as caught:
        prepare(small(corpus_dir, held_out=held_out, sequence_length=length), tmp_path / "data")
    assert caught.value.code == "EW-212"


def test_patterns(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no file matches") as caught:
        prepare(small(tmp_path / "gone"), tmp_path / "data")
    assert caught.value.code == "EW-203"
    with pytest.raises(BadInput, match="a folder"):
        FilesData(files=str(corpus_dir)).fingerprint()
    (corpus_dir / "deep" / "er").mkdir(parents=True)
    (corpus_dir / "deep" / "er" / "x[1].md").write_text("x")
    names = [name for name, _ in iterate_documents(f"{corpus_dir}/**/*.md")]
    assert names == ["deep/er/x[1].md"]
    assert [name for name, _ in iterate_documents(str(corpus_dir / "deep" / "er" / "x[1].md"))] == ["x[1].md"]
    monkeypatch.chdir(corpus_dir)
    counts = Counts()
    names = [name for name, _ in iterate_documents(["f0*.txt", "./f01.txt", "**/*.md"], counts=counts)]
    assert names == ["deep/er/x[1].md", *NAMES[:10]]
    assert counts.duplicates == 0, "a file that two patterns match is one file"
    (corpus_dir / "table.xlsx").write_text("x")
    with pytest.raises(BadInput, match="EW-204"):
        FilesData(files="*").fingerprint()


def test_documents_for_evaluation(corpus_dir: Path) -> None:
    config = small(corpus_dir)
    everything = dict(iterate_documents(config))
    assert list(everything) == NAMES
    held_out = dict(iterate_documents(config, split="held_out"))
    train = dict(iterate_documents(config, split="train"))
    assert held_out.keys() == {name for name in NAMES if is_held_out(name, 0.2)}
    assert everything == {**train, **held_out} and len(train) + len(held_out) == len(NAMES)


def test_memory_does_not_grow_with_a_document_of_one_line(corpus_dir: Path, tmp_path: Path) -> None:
    tokenizer = {"type": "pretrained", "path": str(prepare(small(corpus_dir), tmp_path / "first")[0].tokenizer_dir)}

    def peak(megabytes: int) -> int:
        (corpus_dir / "line.txt").write_bytes(b"value " * (megabytes * 166_000))
        tracemalloc.start()
        corpus, _ = prepare(small(corpus_dir, tokenizer=tokenizer), tmp_path / f"data{megabytes}")
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert corpus.report["bytes"] > megabytes * 900_000
        return highest

    assert peak(14) < peak(7) + (2 << 20)
    for name in NAMES:
        (corpus_dir / name).unlink()  # so that the end of the one document is held out
    assert peak(14) < peak(7) + (2 << 20)


def test_the_standard_library(tmp_path: Path) -> None:
    documents = {name: len(text) for name, text in iterate_documents(StdlibData())}
    assert len(documents) > 300 and sum(documents.values()) > 5_000_000
    assert {"json/decoder.py", "argparse.py"} <= documents.keys()
    assert list(documents) == sorted(documents)
    parts = {part for name in documents for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [part for part in parts if part.startswith(("_sysconfigdata", "config-"))]


def test_the_recipe_section() -> None:
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_python({"type": "stdlib"}) == StdlibData()
    config = adapter.validate_python({"type": "files", "files": ["a/*.txt", "b.md"], "tokenizer": {"type": "train"}})
    assert adapter.validate_json(adapter.dump_json(config)) == config
    for wrong in (
        {"type": "stdlib", "file": "a"},
        {"type": "files"},
        {"type": "files", "files": []},
        {"type": "web"},
        {"type": "stdlib", "held_out": 0.0},
        {"type": "stdlib", "tokenizer": {"type": "pretrained"}},
        {"type": "stdlib", "tokenizer": {"type": "train", "vocab_size": 256}},
        {"type": "hf"},
        {"type": "hf", "path": "a", "hub": "b/c"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_nothing_is_downloaded_unless_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NeedsNetwork, match="allow_download") as caught:
        prepare(HfData(hub="somebody/something"), tmp_path)
    assert caught.value.code == "EW-901" and caught.value.exit_code == 9
    with pytest.raises(BadInput, match="EW-203"):
        prepare(HfData(path=tmp_path / "gone"), tmp_path)


def test_a_local_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    rows = {"text": [f"document {number} " * 5 for number in range(50)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "splits"))
    file = tmp_path / "folder" / "a.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(file))
    for path in (tmp_path / "saved", tmp_path / "splits", file, file.parent):
        assert [text for _, text in iterate_documents(HfData(path=path))] == rows["text"]
    for path in (tmp_path / "splits", file.parent):
        with pytest.raises(BadInput, match="EW-209"):
            list(iterate_documents(HfData(path=path, split="nothing")))
    with pytest.raises(BadInput, match="in the column 'body'"):
        list(iterate_documents(HfData(path=file, text_key="body")))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match="EW-209"):
        list(iterate_documents(HfData(path=file)))


def test_importing_takes_nothing_heavy() -> None:
    script = (
        "import sys, edgewright.data; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
