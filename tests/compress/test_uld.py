"""Distillation across tokenizers: what is compared, where two tokenizers have read the same, and a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from loss_table import differences, logits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import edgewright
from edgewright.compress.cross_tokenizer import CrossTokenizerTeacher, aligned, byte_table, documents
from edgewright.compress.losses import uld
from edgewright.compress.teacher import OnlineTeacher
from edgewright.compress.uld import uld_rows
from edgewright.data.tokenizer import Encoder, load_encoder
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.objective import ModelInputs

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

TEXTS = [
    "def read(path):\n    return open(path).read()\n\n\n" * 4,
    "Der Bär trägt Öl über die Straße; naïve café \u2013 \U0001f43b\U0001f33b \u6f22\u5b57 ok",
    "   spaces   and\ttabs\n\n   then words again and again, words again",
]


def test_names_of_tokens_do_not_matter_and_sizes_may_differ() -> None:
    student, teacher = logits(5, 12, 0), logits(5, 20, 1)
    mixed = teacher[:, torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    assert float(uld(student, mixed)) == pytest.approx(float(uld(student, teacher)), rel=1e-12)
    turned = student[:, torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    assert float(uld(turned, student)) == pytest.approx(0.0, abs=1e-14)
    q, t = (each.softmax(-1).sort(-1, descending=True).values for each in (student, teacher))
    expected = ((q - t[:, :12]).abs().sum(-1) + t[:, 12:].sum(-1)).mean()
    torch.testing.assert_close(uld(student, teacher), expected)
    torch.testing.assert_close(uld(teacher, student), expected)


@pytest.mark.parametrize("columns", [7, 12, 20])
def test_the_form_of_rows_is_the_plain_one_for_either_vocabulary(columns: int) -> None:
    student, teacher = logits(4, 12, 0).requires_grad_(), logits(4, columns, 1)
    value = uld(student, teacher, temperature=2.0)
    value.backward()
    with torch.no_grad():
        loss, slope = uld_rows((student / 2.0).log_softmax(-1), (teacher / 2.0).log_softmax(-1))
    torch.testing.assert_close(4.0 * loss.mean(), value.detach())
    torch.testing.assert_close(slope * 2.0 / 4, student.grad)
    expected = differences(lambda z: uld(z, teacher, temperature=2.0), student)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-6)


def byte_level(vocabulary: int, *, trim: bool) -> Encoder:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return Encoder(
        tokenizer=tokenizer, vocab_size=vocabulary, start_id=0, eos_id=0, adds_space=False, drops_space=False
    )


def sentence_pieces(vocabulary: int) -> Encoder:
    """As Llama 2's: spaces are part of words, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:1] + TEXTS[2:], trainer)
    return Encoder(tokenizer=tokenizer, vocab_size=vocabulary, start_id=1, eos_id=2, adds_space=True, drops_space=True)


PAIRS = {
    "byte levels": lambda: (byte_level(300, trim=True), byte_level(420, trim=True)),
    "to pieces": lambda: (byte_level(300, trim=False), sentence_pieces(340)),
    "from pieces": lambda: (sentence_pieces(340), byte_level(420, trim=True)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_belong_together_where_the_same_text_was_read(pair: str, text: str) -> None:
    """Whole documents: what both have read decodes to the same text, and most places that could are found."""
    ours, theirs = PAIRS[pair]()
    ids = [ours.start_id, *ours.tokenizer.encode(text, add_special_tokens=False).ids, ours.eos_id]
    read, places = aligned(ids, ours, theirs)
    assert len(places) == len(ids) and places[0] == 0 and places[-1] == -1
    assert read[0] == theirs.start_id
    found = 0
    for count, place in enumerate(places[1:-1], 1):
        if place < 0:
            continue
        left = ours.tokenizer.decode(ids[1 : count + 1], skip_special_tokens=False)
        right = theirs.tokenizer.decode(read[1 : place + 1], skip_special_tokens=False)
        assert left.strip("\ufffd ") == right.strip("\ufffd ")
        found += 1
    assert found >= 0.25 * min(len(ids), len(read))


def test_a_piece_that_is_cut_inside_a_character_still_finds_its_places() -> None:
    ours, theirs = byte_level(258, trim=True), byte_level(420, trim=True)
    ids = ours.tokenizer.encode(TEXTS[1], add_special_tokens=False).ids
    whole = TEXTS[1].encode()
    cut = next(index for index, byte in enumerate(whole) if byte & 0xC0 == 0x80)
    read, places = aligned(ids[cut : len(ids) - 1], ours, theirs)
    assert theirs.tokenizer.decode(read[1:]) in TEXTS[1]
    assert places[0] <= 0 and sum(place > 0 for place in places) > 10
    assert len(byte_table()) == 256


@pytest.mark.parametrize("pair", PAIRS)
def test_a_document_of_which_a_row_has_no_text_has_a_place_for_its_start_alone(pair: str) -> None:
    """As where a row ends with the token that starts the next document, or with its end alone."""
    ours, theirs = PAIRS[pair]()
    assert aligned([ours.start_id], ours, theirs) == ([theirs.start_id], [0])
    read, places = aligned([ours.start_id, ours.eos_id], ours, theirs)
    assert (read, places) == ([theirs.start_id], [0, -1])


def test_rows_are_taken_apart_at_documents() -> None:
    ours = byte_level(300, trim=True)
    assert list(documents([5, 6, 0, 7, 0, 8], ours)) == [(0, [5, 6]), (2, [0, 7]), (4, [0, 8])]
    assert list(documents([0, 7], ours)) == [(0, [0, 7])]


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and a teacher of another run with another tokenizer."""
    folder = tmp_path_factory.mktemp("uld")
    recipe = write_recipe(folder)
    edgewright.run(recipe, "data.tokenizer.vocab_size=280", f"output_dir={folder / 'other'}")
    return recipe, folder / "other/stages/base/model"


def losses(teacher: Path, *functions: str) -> str:
    listed = ", ".join(f"{{function: {function}}}" for function in functions)
    return (
        f"stages.base.objective={{type: distill, teacher: {{type: checkpoint, model: {teacher}}}, losses: [{listed}]}}"
    )


def test_a_student_learns_from_a_teacher_with_other_tokens(two_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, teacher = two_tokenizers
    said: list[str] = []
    run = tmp_path / "run"
    edgewright.run(recipe, losses(teacher, "uld", "cross_entropy"), f"output_dir={run}", say=said.append)
    assert any("in its own tokens" in line for line in said)
    assert len(curve(run)) == 12
    source = CrossTokenizerTeacher(OnlineTeacher(teacher), run / "stages/base/model", teacher)
    source.prepare(None, torch.device("cpu"))  # type: ignore[arg-type]
    ours = load_encoder(run / "stages/base/model")
    text = (recipe.parent / "corpus/bisect.py").read_text()
    ids = torch.tensor([ours.start_id, *ours.tokenizer.encode(text, add_special_tokens=False).ids])[:128].view(2, 64)
    targets = source.targets(
        ModelInputs(input_ids=ids, labels=ids, position_ids=None, attention_mask=None), torch.float32
    )
    found = targets.rows(slice(0, 128))
    assert found.values.shape == (128, 280) and float(found.present.float().mean()) > 0.4
    assert bool(found.finite().all()) and bool((found.values[~found.present] == 0).all())


def test_other_losses_than_uld_are_refused_for_other_tokens(two_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, teacher = two_tokenizers
    with pytest.raises(RecipeError, match="EW-130"):
        edgewright.run(recipe, losses(teacher, "forward_kl"), f"output_dir={tmp_path / 'one'}")
    for other in ("forward_kl", "minilm"):
        with pytest.raises(RecipeErrors) as raised:
            edgewright.check(recipe, losses(teacher, "uld", other))
        assert [error.code for error in raised.value.errors] == ["EW-781"]
        assert f"{other} cannot use" in raised.value.message()


def test_the_mean_of_several_models_has_to_be_of_the_tokens_of_the_data(
    two_tokenizers: tuple[Path, Path],
) -> None:
    recipe, teacher = two_tokenizers
    one = f"{{type: checkpoint, model: {teacher}}}"
    several = losses(teacher, "uld", "cross_entropy").replace(one, f"{{type: ensemble, members: [{one}, {one}]}}")
    report = edgewright.check(recipe, several)
    assert {error.code for error in report.errors} == {"EW-130"}
    with pytest.raises(RecipeErrors) as raised:
        edgewright.check(recipe, several.replace("cross_entropy", "minilm"))
    assert [error.code for error in raised.value.errors] == ["EW-781"]
