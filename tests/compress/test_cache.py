"""Targets on disk: the bytes, what comes back of them, and every way in which a cache can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from overflow import overflow_at

import edgewright
from edgewright.check import check
from edgewright.compress.cache import (
    CachedSamples,
    CachedTopK,
    CacheKey,
    decode_sampled,
    encode_sampled,
    open_cache,
    read_manifest,
    sampled_sections,
)
from edgewright.compress.cache_format import (
    Layout,
    Piece,
    from_bits,
    from_bytes,
    joined,
    to_bits,
    to_bytes,
    write_piece,
)
from edgewright.compress.cache_stage import expected_entries
from edgewright.compress.targets import Sampled
from edgewright.data.tokenizer import load_encoder
from edgewright.errors import BadInput, RecipeError
from edgewright.objective import ModelInputs
from edgewright.student import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402

CACHE = """
  - {name: said, type: cache, teacher: {type: stage, stage: base}, targets: TARGETS, precision: fp32}
evaluate: null"""
SAMPLED = "{type: sampled, samples: 20}"
TOP_K = "{type: top_k, k: 8}"
SMALL_PIECES = 64 * 40
"""Tokens, so that the tiny corpus has several pieces."""


def cache_recipe(folder: Path, targets: str = SAMPLED) -> Path:
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("\nevaluate: null", CACHE.replace("TARGETS", targets)))
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewright.compress.cache_stage.PIECE_TOKENS", SMALL_PIECES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by what is kept."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgewright.compress.cache_stage.PIECE_TOKENS", SMALL_PIECES)
        for kind, targets in (("sampled", SAMPLED), ("top_k", TOP_K)):
            folder = tmp_path_factory.mktemp(kind)
            edgewright.run(cache_recipe(folder, targets), f"output_dir={folder / 'run'}", say=lambda line: None)
            runs[kind] = folder / "run"
    return runs


def copied(run: Path, to: Path) -> Path:
    """A run directory and its recipe, to be damaged."""
    shutil.copytree(run.parent, to, dirs_exist_ok=True)
    return to / "run"


def key_of(run: Path) -> CacheKey:
    return CacheKey(**read_manifest(run / "stages/said/cache")["key"])


def opened(run: Path) -> CachedSamples | CachedTopK:
    return open_cache(run / "stages/said/cache", key_of(run))


def stream(run: Path) -> np.ndarray:
    return np.fromfile(run / "data/train.bin", np.uint16).astype(np.int64)


def asked(run: Path, sequences: list[int], length: int = 64) -> ModelInputs:
    tokens = stream(run)
    ids = torch.from_numpy(np.stack([tokens[n * length : (n + 1) * length] for n in sequences]))
    return ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None, sequences=tuple(sequences))


@torch.no_grad()
def teacher_probabilities(run: Path, sequence: int) -> torch.Tensor:
    """[64, V], documents kept apart, by a forward of transformers' own for every document."""
    model = load_model(run / "stages/base/model").eval()
    tokens = stream(run)[sequence * 64 : (sequence + 1) * 64]
    borders = [0, *(i for i in range(1, 64) if tokens[i] == 0), 64]
    parts = []
    for begin, end in zip(borders, borders[1:], strict=False):
        parts.append(model(input_ids=torch.from_numpy(tokens[begin:end])[None]).logits[0].double())
    return torch.cat(parts).softmax(-1)


@pytest.mark.parametrize(
    ("vocabulary", "samples", "entries", "most"),
    [(4096, 50, 14.6, 28.1), (32000, 50, 12, 28.7), (131072, 50, 12, 31.8), (151936, 50, 12, 33.3)],
)
def test_a_token_takes_as_many_bits_as_its_draws_and_ids_need(
    vocabulary: int, samples: int, entries: float, most: float
) -> None:
    """Under the bar of 40 bytes, whichever vocabulary."""
    layout = Layout(kind="sampled", most=samples, vocab_size=vocabulary)
    size = layout.bytes_per_token(entries, 512)
    assert (samples - 1 + entries * layout.id_bits) / 8 < size < most


@pytest.mark.parametrize("width", [1, 3, 8, 12, 17, 32])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_integers_come_back_from_any_number_of_bits(width: int, count: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << width, count)
    packed = to_bits(values, width)
    assert len(packed) == -(-count * width // 8)
    assert (from_bits(packed, count, width) == values).all()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_integers_come_back_from_any_number_of_bytes(width: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << (8 * width), 1000)
    assert (from_bytes(to_bytes(values, width), width) == values).all()


@pytest.mark.parametrize("samples", [1, 2, 50, 255])
def test_draws_come_back_with_their_counts(samples: int, tmp_path: Path) -> None:
    layout = Layout(kind="sampled", most=samples, vocab_size=300)
    ids = torch.randint(0, 300, (40, samples), generator=torch.Generator().manual_seed(samples))
    ids[:5] = 299  # all the same, the largest
    places, payload = joined(sampled_sections([encode_sampled(ids[:24]), encode_sampled(ids[24:])], 8, layout))
    header = {"fingerprint": "", "first": 0, "sections": places}
    write_piece(tmp_path / "piece", header, payload)
    piece = Piece(tmp_path / "piece", "", 0)
    back, counted = np.zeros((40, 300), np.int64), 0
    for row in (3, 0, 4, 1, 2):  # eight tokens each
        counts, found, times = decode_sampled(piece, row, 8, layout)
        np.add.at(back, (8 * row + np.repeat(np.arange(8), counts), found), times)
        counted += len(found)
    last = 8 + 5 / 2  # the end of the last sequence; half a byte of each
    assert len(payload) == pytest.approx(40 * layout.bytes_per_token(counted / 40, 8), abs=last)
    expected = np.zeros((40, 300), np.int64)
    np.add.at(expected, (np.repeat(np.arange(40), samples), ids.numpy().reshape(-1)), 1)
    assert (back == expected).all() and counted == (expected > 0).sum()


def test_the_expected_number_of_entries_is_what_draws_give() -> None:
    logits = 3 * torch.randn(64, 400, generator=torch.Generator().manual_seed(0))
    for samples, temperature in ((10, 1.0), (50, 1.0), (50, 2.0)):
        drawn = [
            len(set(row.tolist()))
            for seed in range(30)
            for row in Sampled.of(
                logits, samples, temperature=temperature, generator=torch.Generator().manual_seed(seed)
            ).ids
        ]
        assert float(expected_entries(logits, samples, temperature).mean()) == pytest.approx(np.mean(drawn), rel=0.01)


def test_top_k_targets_are_the_teachers_of_their_very_tokens(finished: dict[str, Path]) -> None:
    """In an order of its own, across pieces, against a forward that knows nothing of packing."""
    run = finished["top_k"]
    source, order = opened(run), [41, 3, 80, 0]
    assert source.manifest["pieces"] >= 3
    found = source.targets(asked(run, order), torch.float32)
    for number, sequence in enumerate(order):
        expected = teacher_probabilities(run, sequence)
        rows = slice(number * 64, (number + 1) * 64)
        ids, probabilities = found.ids[rows], found.log_probs[rows].exp().double()
        torch.testing.assert_close(expected.gather(-1, ids), probabilities, rtol=2e-3, atol=1e-6)
        assert (expected.topk(8).values.sum(-1) - probabilities.sum(-1)).abs().max() < 1e-3
        torch.testing.assert_close(1 - expected.topk(8).values.sum(-1), found.tail[rows].double(), rtol=2e-3, atol=1e-5)
    total = found.log_probs.exp().sum(-1) + found.tail
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_sampled_targets_have_the_teachers_distribution_as_their_mean(finished: dict[str, Path]) -> None:
    """Over many tokens: sum (weight - t) / sqrt(t (1 - t) / N) is normal, for frequent tokens of the teacher."""
    run = finished["sampled"]
    found = opened(run).targets(asked(run, [5, 60]), torch.float32)
    dense = torch.zeros(128, 300, dtype=torch.double)
    dense.scatter_add_(-1, found.ids, found.weights.double())
    assert dense.sum(-1) == pytest.approx(1.0)
    t = torch.cat([teacher_probabilities(run, 5), teacher_probabilities(run, 60)])
    variance = t * (1 - t) / 20
    summed = (dense - t).sum(0)[1:] / variance.sum(0)[1:].sqrt()
    assert 0.8 < float(summed.square().mean()) < 1.25  # chi square over 299 tokens: sd 0.08
    assert float((dense - t).square().sum() / variance.sum()) == pytest.approx(1.0, abs=0.15)


def test_any_order_micro_batch_and_chunk_find_the_same_targets(finished: dict[str, Path]) -> None:
    run = finished["sampled"]
    source = opened(run)
    whole = source.targets(asked(run, [7, 2, 50]), torch.float32)
    dense = torch.zeros(192, 300).scatter_add_(-1, whole.ids, whole.weights)
    for number, sequence in enumerate([7, 2, 50]):
        alone = source.targets(asked(run, [sequence]), torch.float32)
        again = torch.zeros(64, 300).scatter_add_(-1, alone.ids, alone.weights)
        assert torch.equal(again, dense[number * 64 : (number + 1) * 64])


def test_the_manifest_tells_the_size_and_sampled_is_small(finished: dict[str, Path]) -> None:
    for run in finished.values():
        folder = run / "stages/said/cache"
        manifest = read_manifest(folder)
        assert manifest["bytes"] == sum(path.stat().st_size for path in folder.glob("*.targets"))
        assert (
            manifest["tokens"] == manifest["sequences"] * 64 and manifest["sequences"] == (len(stream(run)) - 1) // 64
        )
    top_k = read_manifest(finished["top_k"] / "stages/said/cache")
    assert top_k["bytes"] / top_k["tokens"] == pytest.approx(8 * 4 + 2, rel=0.05)


def test_killed_pieces_are_made_again_with_the_same_bytes_and_others_are_left(finished, tmp_path) -> None:
    run = copied(finished["sampled"], tmp_path)
    folder = run / "stages/said/cache"
    names = sorted(path.name for path in folder.glob("*.targets"))
    before = {name: (folder / name).read_bytes() for name in names}
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(before[names[1]][:-7])  # truncated
    damaged = bytearray(before[names[2]])
    damaged[-3] ^= 255
    (folder / names[2]).write_bytes(damaged)
    (folder / "cache.json").unlink()
    times = {name: (folder / name).stat().st_mtime_ns for name in names[3:]}
    said: list[str] = []
    edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", say=said.append)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert {name: (folder / name).stat().st_mtime_ns for name in names[3:]} == times
    assert any(names[1] in line for line in said) and any("SHA-256" in line for line in said)


def damaged_piece(folder: Path, how: str) -> None:
    path = folder / "00001.targets"
    content = path.read_bytes()
    foreign = content.replace(read_manifest(folder)["fingerprint"].encode(), b"0" * 64)
    path.write_bytes({"cut": content[:-1], "foreign": foreign, "magic": b"x" + content[1:], "empty": b""}[how])


@pytest.mark.parametrize("how", ["cut", "foreign", "magic", "empty"])
def test_the_student_stage_names_the_first_bad_piece(finished, tmp_path, how) -> None:
    run = copied(finished["top_k"], tmp_path)
    damaged_piece(run / "stages/said/cache", how)
    source = opened(run)
    with pytest.raises(BadInput) as raised:
        source.prepare(load_model(run / "stages/base/model"), torch.device("cpu"))
    assert raised.value.code == "EW-791" and raised.value.where.endswith("00001.targets")


def test_damage_inside_a_piece_is_seen_when_it_is_read(finished, tmp_path) -> None:
    run = copied(finished["sampled"], tmp_path)
    path = run / "stages/said/cache/00000.targets"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput) as raised:
        opened(run).targets(asked(run, [0]), torch.float32)
    assert raised.value.code == "EW-791"
    assert Piece(path, read_manifest(path.parent)["fingerprint"], 0).header.first == 0


def test_no_damaged_bit_of_a_piece_goes_unseen(tmp_path: Path) -> None:
    """Wherever it is, in the header too, which has no digest: the piece is refused, or says the same."""
    layout = Layout(kind="sampled", most=3, vocab_size=50)
    ids = torch.randint(0, 50, (4, 3), generator=torch.Generator().manual_seed(0))
    places, payload = joined(sampled_sections([encode_sampled(ids)], 2, layout))
    path = tmp_path / "piece"
    write_piece(path, {"fingerprint": "ab", "first": 8, "sections": places}, payload)
    content = path.read_bytes()

    def said() -> list[list[int]]:
        piece = Piece(path, "ab", 8)
        return [part.tolist() for row in range(2) for part in decode_sampled(piece, row, 2, layout)]

    whole, refused = said(), 0
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert said() == whole
        except BadInput as error:
            assert error.code == "EW-791"
            refused += 1
    assert refused > 0.9 * 8 * len(content)


def test_a_piece_under_the_name_of_another_is_refused(finished, tmp_path) -> None:
    """Copied from one machine to another, say: what it says is of other sequences."""
    run = copied(finished["top_k"], tmp_path)
    folder = run / "stages/said/cache"
    (folder / "00001.targets").write_bytes((folder / "00000.targets").read_bytes())
    with pytest.raises(BadInput, match="begins with sequence 0 instead of") as raised:
        opened(run).prepare(load_model(run / "stages/base/model"), torch.device("cpu"))
    assert raised.value.code == "EW-791"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tokens": "0"}, "training text"),
        ({"tokenizer": "0"}, "the tokenizer"),
        ({"sequence_length": 128}, "sequence_length"),
        ({"restart_at_documents": False}, "restart_at_documents"),
    ],
)
def test_a_cache_of_other_data_is_refused_by_name(finished, change, word) -> None:
    run = finished["sampled"]
    key = CacheKey(**{**read_manifest(run / "stages/said/cache")["key"], **change})
    with pytest.raises(RecipeError) as raised:
        open_cache(run / "stages/said/cache", key)
    assert raised.value.code == "EW-794" and word in raised.value.what


def student_of(cache: Path, folder: Path, *, more_text: str = "") -> Path:
    """A recipe whose only stage learns from a cache of another run."""
    path = write_recipe(folder)
    with (folder / "corpus/sched.py").open("a") as file:
        file.write(more_text)
    losses = "[{function: rs_kd, weight: 0.9}, {function: cross_entropy, weight: rest}]"
    lesson = f"    objective: {{type: distill, teacher: {{type: cache, path: {cache}}}, losses: {losses}}}\n"
    path.write_text(path.read_text().replace("    optimizer:", lesson + "    optimizer:", 1))
    return path


@pytest.mark.parametrize(
    ("more_text", "change", "words"),
    [
        ("x = 1\n" * 50, "name=tiny", "the tokens of the training text and the tokenizer are"),
        ("", "data.sequence_length=32", "data.sequence_length is"),
        ("", "data.held_out=0.4", "training text"),
    ],
)
def test_check_refuses_a_cache_of_other_data_as_the_run_does(finished, tmp_path, more_text, change, words) -> None:
    cache = finished["sampled"] / "stages/said/cache"
    recipe = student_of(cache, tmp_path, more_text=more_text)
    (error,) = check(recipe, change).errors
    with pytest.raises(RecipeError) as raised:
        edgewright.run(recipe, change, f"output_dir={tmp_path / 'run'}", say=lambda line: None)
    assert error.code == raised.value.code == "EW-794"
    assert error.message() == raised.value.message() and words in error.what


def test_check_takes_a_cache_of_the_same_data_and_says_what_it_did_not_read(finished, tmp_path, monkeypatch) -> None:
    recipe = student_of(finished["sampled"] / "stages/said/cache", tmp_path)
    report = check(recipe)
    assert report.ok and not any("too much" in each.found for each in report.checks)
    monkeypatch.setattr("edgewright.ahead.MOST_TEXT", 100)
    report = check(recipe)
    assert report.ok and any(each.status == "note" and "too much to be read" in each.found for each in report.checks)
    (error,) = check(recipe, "data.sequence_length=32").errors
    assert error.code == "EW-794", "what needs no text is compared in any case"


def test_a_half_written_cache_says_how_far_it_is(finished, tmp_path) -> None:
    run = copied(finished["sampled"], tmp_path)
    key = key_of(run)
    (run / "stages/said/cache/cache.json").unlink()
    with pytest.raises(BadInput) as raised:
        open_cache(run / "stages/said/cache", key)
    assert raised.value.code == "EW-793" and "pieces and no cache.json" in raised.value.found


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": None}, {"pieces": None}, {"pieces": "1"}, {"sequences": 0}, {"made": {}}, {"layout": []}],
)
def test_a_damaged_manifest_is_said_to_be_one(finished, tmp_path, change) -> None:
    run = copied(finished["sampled"], tmp_path)
    path = run / "stages/said/cache/cache.json"
    manifest = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))
    with pytest.raises(BadInput) as raised:
        read_manifest(path.parent)
    assert raised.value.code == "EW-793" and raised.value.found == "a damaged file"


def test_a_cache_of_an_older_version_says_what_to_do_and_is_made_anew(finished, tmp_path) -> None:
    """By the stage that wrote it; another run is told to let it."""
    run = copied(finished["sampled"], tmp_path)
    path = run / "stages/said/cache/cache.json"
    whole = (path.parent / "00000.targets").read_bytes()
    old = json.loads(path.read_text()) | {"format": 1, "fingerprint": "0" * 64}
    path.write_text(json.dumps(old))
    for piece in path.parent.glob("*.targets"):
        piece.write_bytes(piece.read_bytes().replace(key_fingerprint(finished["sampled"]), b"0" * 64))
    with pytest.raises(BadInput) as raised:
        open_cache(path.parent, key_of(finished["sampled"]))
    assert raised.value.code == "EW-793" and "older version" in raised.value.what
    assert (raised.value.expected, raised.value.found) == ("sampled targets in format 2", "format 1")
    edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", say=lambda line: None)
    assert (path.parent / "00000.targets").read_bytes() == whole and json.loads(path.read_text())["format"] == 2


def key_fingerprint(run: Path) -> bytes:
    return read_manifest(run / "stages/said/cache")["fingerprint"].encode()


def test_k_above_the_vocabulary_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    recipe = cache_recipe(tmp_path, "{type: top_k, k: 301}")
    with pytest.raises(RecipeError) as raised:
        edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", say=lambda line: None)
    assert raised.value.code == "EW-795" and "300" in str(raised.value.expected)
    (error,) = check(recipe, f"output_dir={tmp_path / 'other'}").errors
    assert (error.code, error.expected) == ("EW-795", raised.value.expected)


def test_check_counts_what_is_still_to_be_written(finished, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))

    def needed(run: Path, k: int) -> int:
        settings = f"output_dir={run}", f"stages.said.targets={{type: top_k, k: {k}}}"
        (error,) = check(finished["top_k"].parent / "tiny.yaml", *settings).errors
        assert error.code == "EW-403"
        return int(str(error.expected).split()[0].replace(",", ""))

    written = sum(path.stat().st_size for path in (finished["top_k"] / "stages/said/cache").glob("*.targets"))
    here, k = finished["top_k"], read_manifest(finished["top_k"] / "stages/said/cache")["layout"]["most"]
    more = (needed(tmp_path / "a", 5 * k) - needed(tmp_path / "b", k)) / 4 / 1.1  # as a cache of k tokens has
    assert more == pytest.approx(written, rel=0.3)
    assert needed(tmp_path / "c", k) - needed(here, k) == pytest.approx(1.1 * written, rel=0.3)


def test_a_teacher_that_says_nan_names_the_document(finished, tmp_path) -> None:
    run = copied(finished["sampled"], tmp_path)
    model = load_model(run / "stages/base/model")
    tokens = stream(run)
    counts = np.bincount(tokens, minlength=300)
    rare = int(np.flatnonzero(counts == 1)[0])
    place = int(np.flatnonzero(tokens == rare)[0])
    overflow_at(model, rare)
    model.save_pretrained(run / "stages/base/model")
    shutil.rmtree(run / "stages/said/cache")
    with pytest.raises(BadInput) as raised:
        edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", say=lambda line: None)
    error = raised.value
    assert error.code == "EW-783" and error.where.endswith(".py")
    assert f"token {place % 64} of sequence {place // 64} " in error.found
    document = error.where.removeprefix("document ")
    text = (tmp_path / "corpus" / Path(document).name).read_text()
    assert rare in load_encoder(run / "data/tokenizer").encode([text])[0]


@pytest.mark.slow
def test_two_processes_write_the_pieces_of_one(tmp_path: Path) -> None:
    """Under torchrun, from the same teacher, byte by byte."""
    edgewright.run(write_recipe(tmp_path), f"output_dir={tmp_path / 'before'}", say=lambda line: None)
    model = tmp_path / "before/stages/base/model"
    recipe = cache_recipe(tmp_path)
    text = recipe.read_text().replace("{type: stage, stage: base}", f"{{type: checkpoint, model: {model}}}", 1)
    recipe.write_text(text.replace("{type: train, vocab_size: 300}", f"{{type: pretrained, path: {model}}}"))
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys\nimport edgewright.compress.cache_stage as stage\nfrom edgewright.cli import main\n"
        f"stage.PIECE_TOKENS = {SMALL_PIECES}\nmain(['run', *sys.argv[1:]])\n"
    )
    several = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", several)):
        words = [*launcher, str(driver), str(recipe), f"output_dir={tmp_path / name}"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    folders = [tmp_path / name / "stages/said/cache" for name in ("one", "two")]
    pieces = [{path.name: path.read_bytes() for path in folder.glob("*.targets")} for folder in folders]
    assert len(pieces[0]) >= 3 and pieces[0] == pieces[1]
    assert read_manifest(folders[0]) == read_manifest(folders[1])
