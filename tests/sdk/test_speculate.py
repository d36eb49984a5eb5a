"""The verb: prompts in, one table out; each text compared with the plain one, and what cannot be measured refused."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markov import MarkovSession, chain

from edgewright.errors import BadInput, EdgewrightError, RecipeError
from edgewright.export.runtimes.session import Capabilities, Logits
from edgewright.speculate import Speculation, speculate
from edgewright.speculative.prompts import evenly, held_out_prompts, read_prompts

TABLE = chain(60, 3)
NEAR = TABLE + 0.7 * chain(60, 103)
WORDS = [f"<{token}>" for token in range(60)]


class NoisySession(MarkovSession):
    """Several tokens at once are computed with other roundings than one."""

    noise = 0.0

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        rows = super().append(tokens, logits)
        if rows is None or len(tokens) == 1:
            return rows
        sign = np.where(np.arange(rows.size).reshape(rows.shape) % 2 == 0, 1, -1)
        return (rows + self.noise * sign).astype(np.float32)


class ForgetfulSession(MarkovSession):
    """Its cache is not cut back right: after a rewind the first rows are those of another token."""

    def rewind(self, length: int) -> None:
        self.stale = 0 < length < self.length
        super().rewind(length)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        rows = super().append(tokens, logits)
        if rows is not None and self.stale:
            rows = np.roll(rows, 1, axis=1)
        self.stale = False
        return rows


@dataclass
class Bench:
    """What the two paths open, of which sizes their weights are, and the vocabulary that each has."""

    target: MarkovSession
    draft: MarkovSession
    bytes: dict[str, int]
    words: dict[str, list[str | None]]
    opened: list[str]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Bench:
    target = MarkovSession(TABLE, path=Path("target"))
    draft = MarkovSession(NEAR, path=Path("draft"))
    bench = Bench(target, draft, {"target": 1000, "draft": 50}, {"target": list(WORDS), "draft": list(WORDS)}, [])

    def opened(path: Path, *, threads: int | None = None, shares_cores: bool = False) -> MarkovSession:
        bench.opened.append(path.name)
        return bench.target if path.name == "target" else bench.draft

    monkeypatch.setattr("edgewright.export.runtimes.open_session", opened)
    monkeypatch.setattr("edgewright.inventory.weight_bytes", lambda path: bench.bytes[path.name])
    monkeypatch.setattr("edgewright.vocabulary.token_table", lambda path: bench.words[path.name])
    return bench


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "code.txt").write_text("def f<|endoftext|>class A<|endoftext|>  \n<|endoftext|>import os")
    with lzma.open(tmp_path / "chat.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"turns": [f"hello {number}", "again"]}) + "\n" for number in range(3))
    return tmp_path


def everything(files: Path) -> list[str]:
    return [str(files / "code.txt"), str(files / "chat.jsonl.xz")]


def test_one_table(pair: Bench, files: Path) -> None:
    found = speculate("target", "draft", prompts=everything(files), gamma=[2, 4], ngram=3, max_new_tokens=30)
    labels = [(row.proposer, row.gamma, row.prompts, row.texts) for row in found.rows]
    sets = [("all", 6), ("chat", 3), ("code", 3)]
    assert labels == [(name, gamma, *each) for name in ("draft", "ngram") for gamma in (2, 4) for each in sets]
    for row in found.rows:
        assert row.token_identity == 1 and row.outside_noise == 0
        assert row.counts.tokens == 30 * row.texts
        assert row.speedup > 0 and row.tokens_per_s > 0
        assert row.cost_ratio == (0.05 if row.proposer == "draft" else 0)
    whole = [row for row in found.rows if row.prompts == "all"]
    assert found.best in whole[:2] and found.best.speedup == max(row.speedup for row in whole[:2])
    shown = found.to_json()
    assert shown == json.loads(json.dumps(shown))
    assert {"acceptance_rate", "block_efficiency", "mbsu", "speedup", "token_identity", "gamma", "by_position"} <= set(
        shown
    )
    for row in shown["rows"]:  # type: ignore[attr-defined]
        tau = 1 + row["drafted_per_round"] * row["acceptance_rate"]
        assert row["block_efficiency"] == pytest.approx(tau, abs=1e-12)
        ratio = 0.05 if row["proposer"] == "draft" else 0.0
        assert row["mbsu"] == pytest.approx(tau / (ratio * row["drafted_per_round"] + 1), abs=1e-12)
        b = row["by_position"]
        assert 1 <= len(b) <= row["gamma"] and all(rate is None or 0 <= rate <= 1 for rate in b)
    assert found.measured_cost_ratio is not None and found.measured_cost_ratio > 0
    assert [row.to_json()["mbsu_measured"] for row in whole[2:]] == [row.to_json()["mbsu"] for row in whole[2:]]


def test_turns_change(pair: Bench, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, draft, draft alone; and the other way round for the next prompt; after a warm-up."""
    order: list[str] = []
    for kind in ("_write_plainly", "_write", "_write_alone", "_plain"):
        method = vars(__import__("edgewright.speculative.contest", fromlist=["Contest"]).Contest)[kind]

        def logged(*given: Any, method: Callable[..., Any] = method, kind: str = kind) -> Any:
            order.append(kind)
            return method(*given)

        monkeypatch.setattr(f"edgewright.speculative.contest.Contest.{kind}", logged)
    speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=5)
    turn = ["_write_plainly", "_plain", "_write", "_write_alone"]
    assert order == ["_plain", *turn, "_write_alone", "_write", "_write_plainly", "_plain", *turn]


def test_drawn_text(pair: Bench, files: Path) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "max_new_tokens": 30}
    one, same, other, greedy = (
        speculate("target", "draft", prompts=everything(files), **settings, **more)
        for more in ({}, {}, {"seed": 1}, {"greedy_draft": True})
    )
    assert one.best.token_identity is None and one.divergences == () and one.to_json()["outside_noise"] is None
    assert one.best.counts == same.best.counts != other.best.counts
    assert greedy.best.counts != one.best.counts


def test_plain_decoding_keeps_what_a_session_beside_it_takes_away(
    pair: Bench, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's threads stop after each run where two sessions take turns; a model alone lets them spin."""
    alone, sessions = MarkovSession(TABLE, path=Path("target")), [pair.target, pair.draft]
    shared: list[bool] = []

    def opened(path: Path, *, threads: int | None = None, shares_cores: bool = False) -> MarkovSession:
        shared.append(shares_cores)
        return sessions.pop(0) if shares_cores else alone

    monkeypatch.setattr("edgewright.export.runtimes.open_session", opened)
    monkeypatch.setattr(MarkovSession, "runtime", "onnx")
    found = speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=8)
    assert shared == [True, True, False] and found.best.token_identity == 1
    assert {len(pair.target.appends), len(alone.appends)}.isdisjoint({0})
    assert all(count == 1 for count, logits in alone.appends if logits == "all"), "it checks no drafts"


def test_a_target_without_a_draft(pair: Bench, files: Path) -> None:
    found = speculate("target", prompts=everything(files), ngram=2)
    shown = found.to_json()
    assert (shown["draft"], shown["cost_ratio"], shown["proposer"], pair.opened) == (None, None, "ngram", ["target"])


def test_rounding_is_told_from_errors(pair: Bench, files: Path) -> None:
    """Texts part where two logits are nearly equal: within the noise. With a broken cache they part anywhere."""
    table = TABLE.copy()
    order = table.argsort(axis=1)
    rows = np.arange(60)
    table[rows, order[:, -2]] = table[rows, order[:, -1]] - 1e-3
    pair.target, pair.target.path = NoisySession(table), Path("target")
    NoisySession.noise = 0.01
    found = speculate("target", "draft", prompts=everything(files), max_new_tokens=30)
    assert found.best.token_identity is not None and found.best.token_identity < 1 and found.best.outside_noise == 0
    assert found.divergences and not any("wrong" in text for text in found.warnings)
    for parting in found.divergences:
        each = parting.divergence
        assert (
            each.within_noise
            and each.margin == pytest.approx(1e-3, rel=1e-2)
            and each.noise == pytest.approx(0.01, 0.1)
        )
    pair.target = ForgetfulSession(TABLE, path=Path("target"))
    pair.target.stale = False
    broken = speculate("target", "draft", prompts=everything(files), max_new_tokens=30)
    assert broken.best.outside_noise and broken.best.outside_noise == len(broken.divergences)
    assert any("is wrong there" in text for text in broken.warnings)
    assert all(not each.divergence.within_noise and each.divergence.noise == 0 for each in broken.divergences)


def test_the_end_token_is_a_token_of_the_comparison(pair: Bench, files: Path) -> None:
    pair.target.eos_ids = pair.draft.eos_ids = frozenset(range(0, 60, 7))
    found = speculate("target", "draft", prompts=everything(files), max_new_tokens=40)
    assert found.best.token_identity == 1 and found.best.counts.tokens < 40 * 6


def test_long_prompts(pair: Bench, files: Path) -> None:
    (files / "long.txt").write_text("x" * 600)
    with pytest.raises(BadInput, match=r"long\.txt:1: .*EW-808") as stop:
        speculate("target", "draft", prompts=files / "long.txt")
    assert "--max-prompt-tokens 448" in str(stop.value) and "601 of the prompt + 64 new" in str(stop.value)
    found = speculate("target", "draft", prompts=files / "long.txt", max_prompt_tokens=448)
    assert found.notes == ("1 of 1 prompts were cut to their last 448 tokens",)


def test_a_draft_that_sees_less(pair: Bench, files: Path) -> None:
    pair.draft.context_length = 3
    found = speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=20)
    assert found.best.token_identity == 1 and found.best.counts.drafted == 0
    assert (found.measured_cost_ratio, found.to_json()["mbsu_measured"]) == (None, None)
    assert found.to_json()["acceptance_rate"] is None


# --- vocabularies ---


@pytest.mark.parametrize(
    ("token", "text", "named"), [(0, "<x>", "token 0"), (31, "<32>", "token 31"), (59, "<x>", "token 59")]
)
def test_another_vocabulary_is_refused_with_the_first_token(
    pair: Bench, files: Path, token: int, text: str, named: str
) -> None:
    pair.words["draft"][token] = text
    with pytest.raises(RecipeError, match=f"{named} is not the same") as stop:
        speculate("target", "draft", prompts=files / "code.txt")
    assert stop.value.code == "EW-800" and repr(text) == stop.value.found and WORDS[token] in str(stop.value.expected)


def test_padding_and_further_tokens_are_noted(pair: Bench, files: Path) -> None:
    pair.words["draft"] = [*WORDS[:50], *[None] * 10]
    found = speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=5)
    assert found.notes == ("the target has 10 tokens beyond the draft's, which it can neither propose nor read",)
    pair.words["draft"], pair.words["target"] = [*WORDS, None], [*WORDS[:55]]
    found = speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=5)
    assert found.notes == ("the draft has 5 tokens beyond the target's, which it can only propose in vain",)


def test_special_tokens_count(pair: Bench, files: Path) -> None:
    pair.draft.start_id = 5
    with pytest.raises(RecipeError, match="the token that starts a text"):
        speculate("target", "draft", prompts=files / "code.txt")
    pair.draft.start_id, pair.target.eos_ids, pair.draft.eos_ids = 0, frozenset({1}), frozenset({2})
    with pytest.raises(RecipeError, match="the token that ends a text"):
        speculate("target", "draft", prompts=files / "code.txt")
    pair.draft.eos_ids = frozenset({1, 2})
    found = speculate("target", "draft", prompts=files / "code.txt")
    assert "do not end texts with all the same tokens" in found.notes[0]


# --- what is refused ---


def test_a_larger_draft(pair: Bench, files: Path) -> None:
    pair.bytes["draft"] = 1001
    with pytest.raises(RecipeError, match="EW-804"):
        speculate("target", "draft", prompts=files / "code.txt")
    assert pair.opened == []
    pair.bytes["draft"] = 1000
    assert speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=4).cost_ratio == 1


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("lacking", ["logits", "rewind"])
def test_a_runtime_that_cannot(pair: Bench, files: Path, role: str, lacking: str) -> None:
    able = {"logits": True, "rewind": True, "fp32_compute": True, lacking: False}
    vars(pair)[role].capabilities = Capabilities(**able)
    with pytest.raises(BadInput, match=f"this {role} cannot be used.*EW-802"):
        speculate("target", "draft", prompts=files / "code.txt")


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"gamma": 0}, "EW-803"),
        ({"gamma": [2, 65]}, "EW-803"),
        ({"gamma": []}, "EW-803"),
        ({"temperature": -1.0}, "EW-801"),
        ({"top_p": 0.0}, "EW-801"),
        ({"seed": -1}, "EW-801"),
        ({"ngram": 0}, "EW-190"),
        ({"ngram": 17}, "EW-190"),
        ({"max_new_tokens": 0}, "EW-190"),
        ({"limit": 0}, "EW-190"),
        ({"draft": None}, "EW-190"),
    ],
)
def test_senseless_settings_are_refused_before_anything_is_opened(
    pair: Bench, files: Path, settings: dict[str, Any], code: str
) -> None:
    with pytest.raises(RecipeError, match=code):
        speculate("target", **{"draft": "draft", "prompts": files / "code.txt"} | settings)
    assert pair.opened == []


# --- prompts ---


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "completion": "no"},
        {"turns": ["b", "no"]},
        {"turns": "c"},
        {"messages": [{"role": "system", "content": "no"}, {"role": "user", "content": "d"}]},
        {"question": "e"},
        {"instruction": "f"},
        {"text": "g"},
        {"prompt": "  "},
    ]
    (tmp_path / "all.v2.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    found = read_prompts([tmp_path / "*.jsonl"])
    assert "".join(prompt.text for prompt in found) == "abcdefg"
    assert {prompt.set for prompt in found} == {"all.v2"}
    assert found[2].where == f"{tmp_path / 'all.v2.jsonl'}:5"
    assert [prompt.text for prompt in read_prompts([tmp_path / "*.jsonl"], limit=2)] == ["a", "b"]


def test_few_prompts_are_taken_evenly(tmp_path: Path) -> None:
    for name, count in (("chat", 9), ("code", 2), ("text", 9)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(count)))
    taken = [prompt.text for prompt in evenly(read_prompts([tmp_path / "*.txt"]), 7)]
    assert taken == ["chat 0", "code 0", "text 0", "chat 1", "code 1", "text 1", "chat 2"]
    assert len(evenly(read_prompts([tmp_path / "*.txt"]), 100)) == 20


def test_every_file_is_a_set_with_a_name_of_its_own(tmp_path: Path) -> None:
    """What all sets together are called is the name of none: its row would be lost, and taken for the whole."""

    def sets(*names: str) -> list[str]:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("a\n")
        return [prompt.set for prompt in read_prompts([tmp_path / name for name in names])]

    assert sets("chat.txt", "code.md") == ["chat", "code"]
    assert sets("chat.v1.txt", "chat.v2.txt") == ["chat.v1", "chat.v2"]
    assert sets("chat.txt", "chat.md") == ["chat.md", "chat.txt"]
    assert sets("all.txt", "code.txt") == ["all.txt", "code.txt"]
    assert sets("one/chat.txt", "two/chat.txt") == [str(tmp_path / "one/chat.txt"), str(tmp_path / "two/chat.txt")]


def test_the_kind_of_a_file_is_its_last_suffix(tmp_path: Path) -> None:
    (tmp_path / "CHAT.JSONL").write_text('{"prompt": "a"}\n')
    (tmp_path / "chat.jsonl.txt").write_text("no JSON\n")
    assert [prompt.text for prompt in read_prompts([tmp_path / "CHAT.JSONL", tmp_path / "chat.jsonl.txt"])] == [
        "a",
        "no JSON",
    ]


def test_only_line_ends_part_prompts(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("one\x0cpage\r\ntwo\u2028lines\r\n\r\nthree".encode())
    found = read_prompts([tmp_path / "lines.txt"])
    assert [(each.text, each.where[-1]) for each in found] == [
        ("one\x0cpage", "1"),
        ("two\u2028lines", "2"),
        ("three", "4"),
    ]


def test_text_prompts_keep_their_line(files: Path) -> None:
    (files / "two.txt").write_text("one\ntwo\n<|endoftext|>\nthree")
    assert [(each.text, each.where[-1]) for each in read_prompts([files / "two.txt"])] == [
        ("one\ntwo", "1"),
        ("three", "3"),
    ]


def test_a_text_file_without_separators_holds_a_prompt_a_line(files: Path) -> None:
    (files / "lines.txt").write_text("one\n\n two words\n")
    assert [(each.text, each.where[-1]) for each in read_prompts([files / "lines.txt"])] == [
        ("one", "1"),
        (" two words", "3"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.txt", b"", "EW-806"),
        ("blank.jsonl", b"\n\n", "EW-806"),
        ("spaces.txt", b"  <|endoftext|>\n", "EW-806"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "EW-807"),
        ("keys.jsonl", b'{"completion": "a"}\n', "EW-807"),
        ("number.jsonl", b'{"prompt": 7}\n', "EW-807"),
        ("turns.jsonl", b'{"turns": []}\n', "EW-807"),
        ("user.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "EW-807"),
        ("latin.txt", b"caf\xe9 and more text after it", "EW-807"),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}\n', "EW-807"),
        ("half.jsonl", b'{"prompt": "\\ud83d"}\n', "EW-807"),
        ("archive.jsonl.xz", b"no archive", "EW-205"),
        ("table.csv", b"a,b", "EW-204"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EdgewrightError, match=code) as stop:
        read_prompts([tmp_path / name])
    assert name in str(stop.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(EdgewrightError, match="EW-203"):
        read_prompts([tmp_path / "none.txt"])


def test_held_out_code_needs_no_file() -> None:
    found = held_out_prompts(3)
    assert len({prompt.text for prompt in found}) == 3 and all(0 < len(prompt.text) <= 256 for prompt in found)


# --- the command line ---


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    import signal

    from edgewright.cli import main

    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["speculate", *words])
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, *capfd.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_command(pair: Bench, files: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    words = [
        "--target",
        "target",
        "--draft",
        "draft",
        "--prompts",
        *everything(files),
        "--gamma",
        "2,4",
        "--ngram",
        "3",
    ]
    code, out, err = command(*words, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["schema_version"] == 1 and len(shown["rows"]) == 12 and math.isfinite(shown["speedup"])
    code, out, _ = command(*words, "--temperature", "0.8", "--limit", "2")
    assert code == 0 and "draft 4 chat (2)" in out and "accepted by position (draft" in out and "temperature 0.8" in out


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--gamma", "two"], 2, "EW-100"),
        (["--gamma", "0"], 2, "EW-803"),
        (["--prompts", "none.txt"], 3, "EW-203"),
    ],
)
def test_wrong_commands(
    pair: Bench, command: Callable[..., tuple[int, str, str]], words: list[str], code: int, named: str
) -> None:
    found, _, err = command("--target", "target", "--draft", "draft", *words)
    assert found == code and named in err


def test_divergences_are_printed(pair: Bench, files: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    pair.target = ForgetfulSession(TABLE, path=Path("target"))
    pair.target.stale = False
    code, out, _ = command("--target", "target", "--draft", "draft", "--prompts", *everything(files))
    assert code == 0 and "OUTSIDE twice the noise 0" in out and "warning: draft, gamma 4:" in out


def test_the_result_is_typed(pair: Bench, files: Path) -> None:
    assert isinstance(speculate("target", "draft", prompts=files / "code.txt", max_new_tokens=3), Speculation)
