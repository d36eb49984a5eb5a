"""The report: what it reads, what it says, that the page is whole and safe, and the terminal's table."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgewright import report_figures as figures
from edgewright import report_text as say
from edgewright import report_view as view
from edgewright.errors import BadInput
from edgewright.report import format_table, report
from edgewright.report_data import ArtifactResult, read_run
from edgewright.report_labels import POSITIONS, Point, place


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that writes run directories."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import fake_run

    return fake_run


@pytest.fixture
def run_dir(fake: Any, tmp_path: Path) -> Path:
    return fake.make_run(tmp_path / "demo")


class Page(HTMLParser):
    """Text, ids, links and the nesting of a page; plots' JSON apart."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name == "href" and (value or "").startswith("#"):
                self.anchors.append((value or "")[1:])
            elif name in ("src", "href", "data", "action"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self.text += data


def test_json_has_the_names_that_scripts_rely_on(run_dir: Path) -> None:
    result = json.loads(json.dumps(report(run_dir).to_json()))
    assert result["schema_version"] == 1 and result["finished"] is True
    assert result["machine"]["cpu"] == "AMD EPYC (x86_64)"
    names = (
        "path to quant bytes bits_per_byte kl ttft_ms prompt_tokens_per_s tokens_per_s tokens_per_s_sd peak_memory gate"
    )
    assert len(result["artifacts"]) == 8
    for artifact in result["artifacts"]:
        assert set(names.split()) <= set(artifact)
        assert artifact["gate"] == "passed"
    ternary = next(each for each in result["artifacts"] if each["quant"] == "tq2_0")
    assert (ternary["bytes"], ternary["bits_per_byte"], ternary["tokens_per_s"]) == (3_211_264, 1.4431, 866)
    assert ternary["bits_per_byte_ci"] == pytest.approx(0.0104)


def test_what_was_not_measured_is_null_and_a_dash(run_dir: Path) -> None:
    path = run_dir / "results.json"
    results = json.loads(path.read_text())
    results["artifacts"] = [{"name": "a", "path": "a.gguf", "to": "gguf", "quant": "f16", "kl": float("nan")}]
    path.write_text(json.dumps(results))
    (artifact,) = report(run_dir).to_json()["artifacts"]  # type: ignore[misc]
    assert artifact["kl"] is None and artifact["tokens_per_s"] is None and artifact["gate"] is None
    (row,) = view.rows(read_run(run_dir))
    assert {row.size, row.kl, row.speed, row.memory, row.bits_per_byte, row.perplexity} == {say.MISSING}
    assert row.kl_parts == ""


def test_the_gate_table_tells_the_width_from_the_runtime(run_dir: Path) -> None:
    first, *_ = read_run(run_dir).results.artifacts
    assert first.kl is not None
    page = Page(report(run_dir).path.read_text(encoding="utf-8"))
    assert f"weights {say.small(first.kl / 4)}, runtime {say.small(first.kl / 2)}" in page.text
    assert f"{1 + first.kl:.4f}×" in page.text


def test_the_page_is_whole_and_loads_nothing(run_dir: Path) -> None:
    html = report(run_dir).path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.anchors) <= set(page.ids) and len(page.anchors) == 8
    assert "default-src 'none'" in html
    drawn = [figure["id"] for figure in _figures(html)]
    assert drawn == ["pareto", "loss-student", "held-out-student"]
    assert set(drawn) <= set(page.ids)
    assert html.count("plotly.js v") == 1  # inlined once
    assert not list(run_dir.glob(".*.tmp"))


def test_the_page_says_what_was_won_and_what_it_cost(run_dir: Path) -> None:
    page = Page(report(run_dir).path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    for words in (
        "The best compressed file, student-tq2_0 (GGUF tq2_0), compared with teacher-f16 (GGUF f16):",
        "2.7×", "8.76 MB → 3.21 MB", "1.9×", "451 → 866 tokens/s", "+4.5 %", "1.381 → 1.443", "8/8",
        "4.33 M parameters", "ternary", "distill", "data: stdlib",
        "866 ± 12", "1.443 ± 0.010", "+0.001 by exporting", "28.4 ms", "124 MB", "✓ passed",
        "bit-exact", "98.10 %", "llama.cpp quantizes activations", "duplicates", "3.76",
        "edgewright verify exports/student-tq2_0/student-tq2_0.gguf --against stages/student/model",
        "--prompt 128 --generate 64 --repeats 5", "granularity: row", "onnxruntime-genai",
    ):  # fmt: skip
        assert words in text, words


def test_text_of_models_and_recipes_cannot_become_markup(run_dir: Path, fake: Any) -> None:
    results = fake.results()
    results["name"] = "<script>alert(1)</script>"
    results["samples"] = [{"artifact": "x<y", "prompt": "</pre><img src=x>", "text": "</script><script>alert(2)//"}]
    results["artifacts"][0]["name"] = "</script><b>bold"
    (run_dir / "results.json").write_text(json.dumps(results))
    html = report(run_dir).path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [] and page.loads == []
    assert "alert(1)" in page.text and "</script><script>alert(2)//" in page.text
    assert not [script for script in page.scripts if "alert(" in script]
    assert "&lt;b&gt;bold" in _figures(html)[0]["data"][2]["text"][0]


def test_plotly_accepts_every_figure(run_dir: Path) -> None:
    """With the colours filled in, as the page's script does it."""
    go = pytest.importorskip("plotly.graph_objects")
    for figure in _figures(report(run_dir).path.read_text(encoding="utf-8")):
        for narrow in (False, True):
            filled = json.loads(re.sub(r"var\(--sans\)", "Arial", json.dumps(figure)))
            filled = json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(filled)))
            traces = [
                {key: value for key, value in trace.items() if not key.startswith("narrow_")}
                for trace in filled["data"]
            ]
            go.Figure(data=traces, layout={**filled["layout"], **(filled["narrow"] if narrow else {})})


def test_every_colour_of_the_figures_is_a_variable_of_the_page(run_dir: Path) -> None:
    html = report(run_dir).path.read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--[\w-]+)\)", json.dumps(_figures(html))))
    css = html[html.index("<style>") : html.index("</style>")]
    dark = css[css.index("prefers-color-scheme: dark") :]
    assert used and all(f"{name}:" in css for name in used)
    assert all(f"{name}:" in dark.partition("* {")[0] for name in used - {"--sans"})


def test_a_run_that_is_still_going_gets_a_page(fake: Any, tmp_path: Path) -> None:
    directory = fake.make_run(tmp_path / "half", finished=False, steps=120)
    exported = directory / "exports" / "student-tq2_0"
    exported.mkdir(parents=True)
    (exported / "student.gguf").write_bytes(b"GGUF1234")
    entry = {"to": "gguf", "quant": "tq2_0", "bytes": 8, "gate": "skipped"}
    (exported / "edgewright.json").write_text(json.dumps({"schema_version": 1, "artifacts": {"student.gguf": entry}}))
    result = report(directory)
    assert not result.finished and result.warnings == ()  # a cut-off last line is no warning
    (artifact,) = result.to_json()["artifacts"]  # type: ignore[misc]
    assert (artifact["path"], artifact["bytes"], artifact["gate"]) == (
        str(directory / "exports/student-tq2_0/student.gguf"),
        8,
        "skipped",
    )
    text = Page(result.path.read_text(encoding="utf-8")).text
    assert "not finished: stage student, step 120 of 300" in text
    assert [figure["id"] for figure in _figures(result.path.read_text())] == ["loss-student", "held-out-student"]


def test_only_a_recipe_is_enough_and_needs_no_plots(tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text("version: 1\nname: new\n")
    html = report(tmp_path).path.read_text(encoding="utf-8")
    assert "plotly.js" not in html and "not finished" in html and len(html) < 50_000


def test_broken_files_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="EW-392"):
        report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no run directory \[EW-392\]"):
        report(tmp_path / "empty")
    (run_dir / "recipe.resolved.yaml").write_text("a: [")
    with pytest.raises(BadInput, match=r"recipe\.resolved\.yaml.*EW-393"):
        report(run_dir)
    (run_dir / "recipe.resolved.yaml").unlink()
    for text, found in (("{", "JSON"), ("[]", "object"), ('{"artifacts": [{"path": 3}]}', r"artifacts\.0"),
                        ('{"schema_version": 2}', "schema_version 1")):  # fmt: skip
        (run_dir / "results.json").write_text(text)
        with pytest.raises(BadInput, match=f"(?s)results\\.json.*EW-393.*{found}"):
            report(run_dir)


def test_damaged_metrics_are_counted_and_said(run_dir: Path) -> None:
    path = run_dir / "stages" / "student" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[10], lines[20] = "garbage", "17"
    path.write_text("\n".join(lines))
    assert "2 lines of the metrics of stage student could not be read." in report(run_dir).warnings
    assert len(read_run(run_dir).stages[0].steps) == 298


def test_pauses_do_not_count_as_training(run_dir: Path) -> None:
    """Without a sum in the results, time is added up from the steps' own speed."""
    results = json.loads((run_dir / "results.json").read_text())
    (run_dir / "results.json").write_text(json.dumps({**results, "stages": []}))
    stage = read_run(run_dir).stages[0]
    assert stage.seconds == pytest.approx(300 * 2048 / 3600, rel=0.02)
    assert (stage.last_step, stage.total_steps, stage.tokens) == (300, 300, 614_400)


def _file(name: str, size: int, quality: float, speed: float | None, to: str = "gguf", **more: Any) -> ArtifactResult:
    return ArtifactResult(
        name=name, path=name, to=to, bytes=size, bits_per_byte=quality, tokens_per_s=speed, **{"quant": "tq2_0", **more}
    )


def test_front_and_domination() -> None:
    small, good, fast = _file("small", 10, 2.0, 5), _file("good", 30, 1.0, 5), _file("fast", 30, 2.5, 9)
    beaten, untimed = _file("beaten", 31, 1.0, 5), _file("untimed", 10, 2.0, None)
    files = [good, beaten, small, fast, untimed]
    assert [each.name for each in figures.size_quality_front(files)] == ["small", "good"]
    assert {each.name for each in files if any(figures.dominates(other, each) for other in files)} == {
        "beaten",
        "untimed",
    }
    assert not figures.dominates(small, small)


def test_beaten_files_are_grey(run_dir: Path) -> None:
    front, grey, coloured = _figures(report(run_dir).path.read_text(encoding="utf-8"))[0]["data"]
    assert [text.split("  ")[1] for text in grey["text"]] == [
        "teacher-ort-fp32",
        "teacher-ort-int4",
        "student-ort-ternary",
    ]
    assert grey["marker"]["color"] == "var(--dominated)"
    assert coloured["marker"]["color"] == [412, 451, 693, 866, 745]
    assert front["x"] == sorted(front["x"]) and front["y"] == sorted(front["y"], reverse=True)


def test_the_headline_is_honest_about_losses(run_dir: Path, fake: Any) -> None:
    results = fake.results()
    for each in results["artifacts"]:
        if each["quant"] in ("tq1_0", "tq2_0"):
            each |= {"tokens_per_s": 225.5, "bytes": 20_000_000}
        if each["quant"] == "ternary":
            each["gate"] = "failed"
    (run_dir / "results.json").write_text(json.dumps(results))
    headline = view.headline(read_run(run_dir))
    assert headline is not None and headline.best.quant in ("tq1_0", "tq2_0")
    assert [(tile.value, tile.label) for tile in headline.tiles[:2]] == [("2.3×", "larger"), ("2.0×", "slower")]
    assert (headline.tiles[3].value, headline.tiles[3].detail) == ("7/8", "1 not proven")


def test_names_keep_out_of_each_others_way() -> None:
    """Four files at one place get four sides, and a file at the right edge does not write outside."""
    points = [Point(500, 150, 8, "12345678") for _ in range(4)]
    assert len(set(place(points, width=1000, height=300))) == 4
    (side,) = place([Point(980, 150, 8, "12345678")], width=1000, height=300)
    assert side.endswith("left") and side in POSITIONS


def test_smoothing_and_thinning() -> None:
    line = [float(value) for value in range(400)]
    assert figures.smoothed(line)[:-10] == pytest.approx(line[:-10])  # no lag
    assert figures.smoothed([3.0]) == [3.0]
    noisy = [value % 2 for value in range(400)]
    assert all(abs(value - 0.5) < 0.1 for value in figures.smoothed(noisy)[10:])
    thin = figures.thinned(range(10_000))
    assert len(thin) <= figures.MOST_POINTS and thin[-1] == 9_999 and thin == sorted(thin)
    assert figures.thinned([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (say.size(4_705_000), "4.71 MB"),
        (say.size(999), "999 B"),
        (say.size(None), "–"),
        (say.count(4_330_000), "4.33 M"),
        (say.rate(412.3, 6.4), "412 ± 6"),
        (say.rate(41.2, 0.63), "41.2 ± 0.6"),
        (say.small(3e-7), "3.0e-07"),
        (say.small(0.0143), "0.0143"),
        (say.small(0.0), "0"),
        (say.share(1.0), "100 %"),
        (say.share(0.99999), "99.99 %"),
        (say.signed(-0.0612, 3), "−0.061"),
        (say.signed(-0.0001, 3), "0.000"),
        (say.milliseconds(1310), "1.31 s"),
        (say.duration(0.0385), "0.038 s"),
        (say.duration(0.9999), "1.00 s"),
        (say.duration(4.123), "4.12 s"),
        (say.duration(41.4), "41 s"),
        (say.duration(200), "3 min 20 s"),
        (say.duration(7512), "2 h 05 min"),
        (say.ratio(5.44), "5.4×"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_the_terminal_table_fits_and_says_everything(fake: Any) -> None:
    table = format_table(fake.results())
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    (line,) = [line for line in lines if "student-tq2_0" in line]
    for cell in ("3.21 MB", "1.443", "0.0021", "28.4 ms", "866 ± 12", "124 MB", "passed"):
        assert cell in line
    assert "\x1b" not in table
    for title in ("file", "size", "bits per", "KL to its", "first", "tokens/s", "peak", "gate"):
        assert title in table


def test_the_terminal_table_takes_bench_rows() -> None:
    """Rows of `bench` have no name and no quality."""
    row = {
        "path": "exports/a.gguf",
        "to": "gguf",
        "quant": None,
        "bytes": 10,
        "tokens_per_s": 5.0,
        "tokens_per_s_sd": 0.1,
    }
    line = format_table({"artifacts": [row]}).splitlines()[-1]
    assert line.split()[0] == "a.gguf" and "5.00 ± 0.10" in line and line.count("–") == 5


def _figures(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))
