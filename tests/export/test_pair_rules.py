"""Pairs that a runtime would refuse, or take and decode wrongly, are refused before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pair_models import permute_vocabulary, save_draft, save_target, set_json

from edgewright.errors import RecipeError
from edgewright.export import export
from edgewright.export.pairs.rules import RULES, check_pair
from edgewright.export.source import load_source

ALL = tuple(RULES)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("rules") / "target")


@pytest.fixture(scope="module")
def draft(target: Path) -> Path:
    return save_draft(target, target.parent / "draft")


@pytest.fixture
def other(draft: Path, tmp_path: Path) -> Path:
    """A copy of the draft, to be spoiled."""
    return Path(shutil.copytree(draft, tmp_path / "other"))


def refused(target: Path, draft: Path, to: str, gamma: int = 4) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        check_pair(to, load_source(target), load_source(draft), gamma)
    return caught.value


@pytest.mark.parametrize("to", ALL)
def test_a_pair_that_fits_is_taken_without_a_word(target: Path, draft: Path, to: str) -> None:
    assert check_pair(to, load_source(target), load_source(draft), 4) == []


@pytest.mark.parametrize("to", ALL)
def test_another_order_of_the_vocabulary(target: Path, other: Path, to: str) -> None:
    token, text, found = permute_vocabulary(other)
    error = refused(target, other, to)
    assert error.code == "EW-823"
    assert error.expected == f"token {token} is {ascii(text)}, as in the target"
    assert error.found == ascii(found)
    assert RULES[to].runtime in error.what


@pytest.mark.parametrize("to", ALL)
def test_another_end_of_text(target: Path, other: Path, to: str) -> None:
    set_json(other / "config.json", eos_token_id=1)
    (other / "generation_config.json").unlink()
    error = refused(target, other, to)
    assert error.code == "EW-825" and "end a text" in error.what
    assert "[0]" in str(error.expected) and "[1]" in str(error.found)


def wider(target: Path, directory: Path, rows: int) -> Path:
    """The draft with further rows that only pad."""

    def pad(model):  # type: ignore[no-untyped-def]
        model.resize_token_embeddings(model.config.vocab_size + rows)

    return save_draft(target, directory, change=pad)


@pytest.mark.parametrize(("to", "rows", "fits"), [(to, 8, to == "gguf") for to in ALL] + [("gguf", 129, False)])
def test_another_width_of_logits(target: Path, tmp_path: Path, to: str, rows: int, fits: bool) -> None:
    padded = wider(target, tmp_path / "wide", rows)
    if fits:
        (note,) = check_pair(to, load_source(target), load_source(padded), 4)
        assert "logits of" in note
        return
    error = refused(target, padded, to)
    assert error.code == "EW-824" and "resize_token_embeddings" in str(error.fix)


@pytest.mark.parametrize("to", ALL)
def test_a_draft_that_is_larger(target: Path, draft: Path, to: str) -> None:
    assert refused(draft, target, to).code == "EW-821"


@pytest.mark.parametrize(("to", "most"), [("genai", 16), ("gguf", 64), ("openvino", 64), ("hf", 64)])
def test_gamma_outside_the_limits_of_a_runtime(target: Path, draft: Path, to: str, most: int) -> None:
    check_pair(to, load_source(target), load_source(draft), most)
    for gamma in (0, most + 1):
        error = refused(target, draft, to, gamma)
        assert error.code == "EW-822" and error.expected == f"gamma from 1 to {most}"


@pytest.mark.parametrize("to", ALL)
def test_a_draft_whose_context_ends_first(target: Path, other: Path, to: str) -> None:
    set_json(other / "config.json", max_position_embeddings=128)
    if RULES[to].same_context:
        assert refused(target, other, to).code == "EW-827"
    else:
        (note,) = check_pair(to, load_source(target), load_source(other), 4)
        assert "128" in note


@pytest.mark.parametrize("to", ALL)
def test_layers_that_see_a_window(tiny_model, to: str) -> None:  # type: ignore[no-untyped-def]
    source = load_source(tiny_model("mistral-window"))
    if RULES[to].windows:
        check_pair(to, source, source, 4)
        return
    with pytest.raises(RecipeError, match="window") as caught:
        check_pair(to, source, source, 4)
    assert caught.value.code == "EW-826"


def test_a_tokenizer_that_puts_more_around_a_text(target: Path, other: Path) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(other / "tokenizer.json"))
    for to in ALL:
        assert refused(target, other, to).code == "EW-825"


@pytest.mark.parametrize("to", ["onnx", "best"])
def test_a_target_without_a_loop_for_drafts(target: Path, draft: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(RecipeError) as caught:
        export(target, to=to, quant=None if to == "best" else "fp32", out=tmp_path / "out", draft=draft)
    assert caught.value.code == "EW-820"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"gamma": 3}, {"draft_quant": "fp32"}, {"draft": "d", "budget_mb": 1.0}, {"draft": "d", "calibrate": ["x"]}],
)
def test_options_that_do_not_go_together(target: Path, tmp_path: Path, options: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(RecipeError) as caught:
        export(target, to="genai", quant="fp32", out=tmp_path / "out", **options)
    assert caught.value.code == "EW-831"


@pytest.mark.parametrize(("to", "quant"), [("genai", "fp32"), ("gguf", "f32"), ("openvino", "fp32"), ("hf", "fp32")])
def test_what_is_refused_leaves_no_folder(target: Path, other: Path, tmp_path: Path, to: str, quant: str) -> None:
    permute_vocabulary(other)
    with pytest.raises(RecipeError, match="EW-823"):
        export(target, to=to, quant=quant, out=tmp_path / "out" / "pair", draft=other)
    assert not (tmp_path / "out").exists()
