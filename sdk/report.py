"""The report of a run: one HTML page that needs no network, and the table that ends a run in the terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgewright import report_figures as figures
from edgewright import report_text as say
from edgewright import report_view as view
from edgewright._verbs import VerbModule
from edgewright.bench_pack import read_result
from edgewright.files import write_json, write_text
from edgewright.planner.record import Compared
from edgewright.report_data import DEVICES, ArtifactResult, Results, RunRecord, StageRecord, read_run

PAGE_NAME = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportResult:
    """Where the page is, and the numbers in it.

    Args:
        path: the page.
        name: of the run.
        finished: whether the run has its results; a page can be made before that.
        machine: what the numbers were measured on.
        artifacts: every exported file, in the recipe's order.
        warnings: of the run, and what could not be read of it.
    """

    path: Path
    name: str
    finished: bool
    machine: dict[str, object]
    artifacts: tuple[ArtifactResult, ...]
    warnings: tuple[str, ...]
    compared: tuple[Compared, ...] = ()
    """What was planned, and what came of it."""
    devices: tuple[dict[str, Any], ...] = ()
    """What packs measured on other devices, as their `result.json` says."""

    def to_json(self) -> dict[str, object]:
        """The object of `report --json`: paths as seen from the working directory, null where nothing was measured."""
        return {
            "schema_version": 1,
            "path": str(self.path),
            "name": self.name,
            "finished": self.finished,
            "machine": self.machine,
            "artifacts": [
                {**artifact.model_dump(mode="json"), "path": str(self.path.parent / artifact.path)}
                for artifact in self.artifacts
            ],
            "plan": [each.to_json() for each in self.compared],
            "devices": list(self.devices),
            "warnings": list(self.warnings),
        }


def report(run_dir: str | Path, *, add: Sequence[str | Path] = ()) -> ReportResult:
    """Write `report.html` into a run directory: everything that the run measured, on one page without any network.

    A run that is still going gets a page of what is there so far.

    Args:
        run_dir: the directory that `run` wrote to.
        add: `result.json` of packs that were measured on other devices; they are kept in the run, one per device.

    Raises:
        BadInput: EW-392 for what is no run directory, EW-393 for a file of it that cannot be understood, EW-394 for
            what is no result of a pack.
        OutOfResources: EW-401, the disk is full.
    """
    results = [read_result(Path(path)) for path in add]
    run = read_run(Path(run_dir))
    if results:
        for result in results:
            name = re.sub(r"[^\w.-]+", "-", result["device"]).strip("-.") or "device"
            (run.directory / DEVICES).mkdir(exist_ok=True)
            write_json(run.directory / DEVICES / f"{name}.json", result)
        run = read_run(run.directory)
    path = run.directory / PAGE_NAME
    write_text(path, render(run))
    return ReportResult(
        path=path,
        name=run.name,
        finished=run.finished,
        machine=_machine(run),
        artifacts=run.results.artifacts,
        warnings=tuple(_warnings(run)),
        compared=run.compared,
        devices=tuple(run.devices),
    )


def render(run: RunRecord) -> str:
    """The whole page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("edgewright"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(page=_page(run))


def _page(run: RunRecord) -> dict[str, Any]:
    """All that the template shows."""
    rows = view.rows(run)
    pareto = figures.pareto(run.results.artifacts)
    stages = [_stage(run, stage) for stage in run.stages]
    drawn = [*([pareto] if pareto else []), *(figure for stage in stages for figure in stage["figures"])]
    page = {
        "run": run,
        "version": version("edgewright"),
        "status": view.status(run),
        "chips": view.chips(run),
        "headline": view.headline(run),
        "warnings": _warnings(run),
        "rows": rows,
        "columns": view.COLUMNS,
        "proved": [row for row in rows if row.proved],
        "gate_columns": view.GATE_COLUMNS,
        "checkpoints": view.checkpoints(run),
        "drafts": view.drafts(run),
        "devices": view.devices(run),
        "stages": stages,
        "compared": view.compared(run),
        "data": view.facts(run.results.data),
        "sources": view.sources(run),
        "machine": view.facts(_machine(run)),
        "environment": view.facts(run.environment),
        "has_pareto": pareto is not None,
        "has_origin": bool(run.recipe_text or run.environment or _machine(run)),
        "figures": drawn,
        **_trusted(with_plots=bool(drawn)),
    }
    return {**page, "sections": _sections(page)}


def _sections(page: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchors and titles of the sections that have something in them."""
    sections = (
        ("files", "Files", page["rows"] or page["checkpoints"]),
        ("trade-off", "Size, quality, speed", page["has_pareto"]),
        ("devices", "Other devices", page["devices"]),
        ("training", "Training", page["stages"]),
        ("plan", "Predicted and measured", page["compared"]),
        ("gates", "Proof", page["proved"]),
        ("samples", "Samples", page["run"].results.samples),
        ("data", "Data", page["data"]),
        ("sources", "Where each number was made", page["sources"]),
        ("recipe", "Recipe and machine", page["has_origin"]),
    )
    return [(anchor, title) for anchor, title, content in sections if content]


def _stage(run: RunRecord, stage: StageRecord) -> dict[str, Any]:
    titles = {
        "Loss while training, smoothed": figures.training_loss(stage),
        "Quality on held-out text": figures.held_out(stage),
    }
    drawn = {title: figure for title, figure in titles.items() if figure is not None}
    return {
        "name": stage.name,
        "facts": view.stage_facts(stage),
        "events": view.stage_events(stage),
        "plots": [(figure["id"], title) for title, figure in drawn.items()],
        "figures": list(drawn.values()),
    }


def _trusted(*, with_plots: bool) -> dict[str, Any]:
    """Style and scripts, which are ours and go into the page unescaped; the plot library only where there is a plot."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    templates = files("edgewright") / "templates"
    css, js = ((templates / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return {"css": Markup(css), "js": Markup(js), "plotly": Markup(get_plotlyjs() if with_plots else "")}


def _machine(run: RunRecord) -> dict[str, object]:
    """What measured: as the results say, else as the run's environment does."""
    if run.results.machine:
        return run.results.machine
    machine = run.environment.get("machine", run.environment)
    return machine if isinstance(machine, dict) else {}


def _warnings(run: RunRecord) -> list[str]:
    return [*run.results.warnings, *run.problems]


def format_table(results: Mapping[str, object]) -> str:
    """The table that ends a run: one line for each file of `results.json`, as plain text.

    Args:
        results: the object of `results.json`.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("file", overflow="fold")
    titles = ("size", "bits per\nbyte", "KL to its\ncheckpoint", "first\ntoken", "tokens/s", "peak\nmemory", "gate")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for each in Results.model_validate(results).artifacts:
        table.add_row(
            each.name,
            say.size(each.bytes),
            say.bits(each.bits_per_byte),
            say.small(each.kl),
            say.milliseconds(each.ttft_ms),
            say.rate(each.tokens_per_s, each.tokens_per_s_sd),
            say.size(each.peak_memory),
            each.gate or say.MISSING,
        )
    text = io.StringIO()
    Console(file=text, width=160, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())


sys.modules[__name__].__class__ = VerbModule
