"""What the results of `quality.py` say: the table, the files, the bars, and the plot of loss against exported bytes."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT
from quality_plot import Point, draw
from quality_runs import ROWS, Row
from quality_scales import SCALES, Scale

from edgewright.files import write_text

Result = dict[str, Any]

TERNARY = (
    "ternary",
    "ternary-linear",
    "ternary-continued",
    "ternary-tequila",
    "ternary-twn",
    "ternary-decay",
    "ternary-seq",
)
"""Rows of ternary training without a teacher: the best of them is held against the bar."""
TAUGHT = ("ternary-distilled", "ternary-continued-distilled")
"""Those with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """The finished runs of a row."""

    row: Row
    results: list[Result]

    def values(self, figure: str) -> list[float]:
        return [result[figure] for result in self.results]

    def mean(self, figure: str) -> float:
        return statistics.mean(self.values(figure))

    def sd(self, figure: str) -> float | None:
        """Between seeds; None for a single one."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def ratio(self, other: Seeds, figure: str) -> float:
        """Of the means over the seeds that both have, over all of them if there are none."""
        mine, theirs = ({r["seed"]: r[figure] for r in seeds.results} for seeds in (self, other))
        common = mine.keys() & theirs.keys()
        if not common:
            return self.mean(figure) / other.mean(figure)
        return sum(mine[seed] for seed in common) / sum(theirs[seed] for seed in common)

    def differs(self, other: Seeds, figure: str) -> bool | None:
        """Whether the means are further apart than the seeds of one row; None where no row has two."""
        spreads = [sd for sd in (self.sd(figure), other.sd(figure)) if sd is not None]
        return abs(self.mean(figure) - other.mean(figure)) > max(spreads) if spreads else None

    def show(self, figure: str, digits: int) -> str:
        """Mean +- standard deviation."""
        sd = self.sd(figure)
        return f"{self.mean(figure):.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def print_all(results: list[Result], scale: Scale, directory: Path) -> bool:
    """Print everything, keep it beside the results; whether every bar that could be judged was met."""
    done = grouped(results)
    if "dense" not in done:
        print("no dense run yet")
        return True
    verdicts = list(bars(done))
    text = "\n".join(
        [
            *introduction(results, done, scale),
            *sweeps(results),
            *table(done),
            *files_table(done),
            "",
            "Bars:",
            *(verdict.line for verdict in verdicts),
        ]
    )
    print(text)
    write_text(directory / "table.md", text + "\n")
    points = [point for seeds in done.values() for point in gguf_points(seeds)]
    if points:
        write_text(directory / "bytes.svg", draw(points))
        print(f"plot: {os.path.relpath(directory / 'bytes.svg', ROOT)}")
    return all(verdict.met is not False for verdict in verdicts)


def grouped(results: list[Result]) -> dict[str, Seeds]:
    """Finished runs by row, in the table's order; those of sweeps left out."""
    finals = [result for result in results if result["factor"] is None]
    found = {row.name: [result for result in finals if result["row"] == row.name] for row in ROWS}
    return {row.name: Seeds(row=row, results=found[row.name]) for row in ROWS if found[row.name]}


def introduction(results: list[Result], done: dict[str, Seeds], scale: Scale) -> Iterator[str]:
    dense = done["dense"].results[0]
    shape, decided = scale.shape(), dense["decisions"]
    yield (
        f"Llama of {scale.parameters:,} parameters, {scale.linear():,} of them in linear layers (hidden "
        f"{shape['hidden_size']}, {shape['num_hidden_layers']} layers, intermediate {shape['intermediate_size']}, "
        f"vocabulary {scale.vocabulary:,}, sequences of 256), {dense['tokens']:,} tokens "
        f"({dense['tokens'] / scale.parameters:.0f} per parameter, {dense['epochs']:.1f} epochs), "
        f"{scale.step_tokens:,} a step, {decided['precision']}, {decided['device']}."
    )
    corpora = sorted({str(result["data"])[:12] for result in results})
    if len(corpora) > 1:
        yield f"corpora: {', '.join(corpora)}"


def sweeps(results: list[Result]) -> Iterator[str]:
    """The learning rates that were tried, and which was best."""
    tried = [result for result in results if result["factor"] is not None]
    for row in dict.fromkeys(result["row"] for result in tried):
        mine = sorted((r["rate"], r["perplexity"]) for r in tried if r["row"] == row)
        best = min(mine, key=lambda pair: pair[1])[0]
        edge = " (at the edge of the sweep)" if len(mine) > 1 and best in (mine[0][0], mine[-1][0]) else ""
        shown = ", ".join(f"{rate:g}: {perplexity:.3f}" for rate, perplexity in mine)
        commits = commits_of(result for result in tried if result["row"] == row)
        yield (
            f"learning rate of {row}, perplexity after a quarter of the tokens: {shown}; taken: {best:g}{edge} "
            f"(commit {commits})"
        )


def commits_of(results: Iterable[Result]) -> str:
    """What the code of these runs was."""
    return ", ".join(sorted({result["commit"] for result in results}))


def table(done: dict[str, Seeds]) -> Iterator[str]:
    """One line per row."""
    yield ""
    yield (
        "| row | what | equal | seeds | tokens (M) | FLOPs (1e12) | trained in linear layers | memory (MB) | "
        "perplexity | x dense | bits per byte | x dense | commit |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    dense = done["dense"]
    for name, seeds in done.items():
        one = seeds.results[0]
        costs = list(one["costs"].values())
        share = max(cost["trained_linear"] for cost in costs) / max(cost["linear"] for cost in dense_costs(done))
        note = "" if name == "dense" or seeds.differs(dense, "perplexity") is not False else " (within the spread)"
        yield (
            f"| {name} | {seeds.row.what} | {seeds.row.control} | {len(seeds.results)} | {one['tokens'] / 1e6:.1f} | "
            f"{one['flops'] / 1e12:.0f} | {share:.0%} | {max(cost['bytes'] for cost in costs) / 1e6:.1f} | "
            f"{seeds.show('perplexity', 3)} | {seeds.ratio(dense, 'perplexity'):.3f}{note} | "
            f"{seeds.show('bits_per_byte', 4)} | {seeds.ratio(dense, 'bits_per_byte'):.3f} | "
            f"{commits_of(seeds.results)} |"
        )


def dense_costs(done: dict[str, Seeds]) -> list[dict[str, float]]:
    return list(done["dense"].results[0]["costs"].values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A file of a row: its bytes, and what it loses, as means over the seeds."""

    row: str
    name: str
    bytes: float
    bits_per_byte: float
    seeds: int


def measured_files(seeds: Seeds) -> list[Measured]:
    """Means over the seeds that have the file; refused ones left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in seeds.results:
        for file in result["files"]:
            if "refused" not in file:
                found.setdefault(file["name"], []).append(file)
    return [
        Measured(
            row=seeds.row.name,
            name=name,
            bytes=statistics.mean(file["bytes"] for file in files),
            bits_per_byte=statistics.mean(file["bits_per_byte"] for file in files),
            seeds=len(files),
        )
        for name, files in found.items()
    ]


def files_table(done: dict[str, Seeds]) -> Iterator[str]:
    yield ""
    yield "| row | file | bytes | bits per byte | seeds |"
    yield "|---|---|---|---|---|"
    for seeds in done.values():
        for file in measured_files(seeds):
            yield f"| {file.row} | {file.name} | {file.bytes:,.0f} | {file.bits_per_byte:.4f} | {file.seeds} |"
    for seeds in done.values():
        refused = {f["name"]: f["refused"] for result in seeds.results for f in result["files"] if "refused" in f}
        for name, reason in refused.items():
            yield f"| {seeds.row.name} | {name} | refused: {reason} | | |"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A bar, and whether it was met; None where it cannot be judged yet."""

    what: str
    found: str
    met: bool | None

    @property
    def line(self) -> str:
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"- {self.what}: {self.found or 'no run yet'}: {word}"


LIMITS = (
    ("lowrank-restarts", "perplexity", 1.03),
    ("lost", "perplexity", 1.02),
    ("sparse-50", "perplexity", 1.02),
    ("sparse-75", "perplexity", 1.06),
    ("apollo-mini", "perplexity", 1.02),
    ("gradnorm-lorp-half", "perplexity", 1.05),
)
"""Rows, the figure that counts, and its most over the dense model's."""


def bars(done: dict[str, Seeds]) -> Iterator[Verdict]:
    """Every bar."""
    dense = done["dense"]
    for name, figure, most in LIMITS:
        yield against(done.get(name), dense, figure, most, f"{name}, {figure.replace('_', ' ')} of dense")
    for rows, most, what in ((TERNARY, 1.06, "without a teacher"), (TAUGHT, 1.04, "with a teacher")):
        found = [done[name] for name in rows if name in done]
        best = min(found, key=lambda seeds: seeds.mean("bits_per_byte"), default=None)
        label = f"best ternary {what}" + (f" ({best.row.name})" if best else "")
        yield against(best, dense, "bits_per_byte", most, f"{label}, bits per byte of dense")
    yield not_worse(done.get("apollo"), dense)
    yield restarts_help(done)
    yield recovery(done)
    yield equal_bytes(done)


def against(seeds: Seeds | None, dense: Seeds, figure: str, most: float, what: str) -> Verdict:
    what = f"{what} <= {most}"
    if seeds is None:
        return Verdict(what=what, found="", met=None)
    ratio = seeds.ratio(dense, figure)
    return Verdict(what=what, found=f"{ratio:.3f} ({len(seeds.results)} seed(s))", met=ratio <= most)


def not_worse(apollo: Seeds | None, dense: Seeds) -> Verdict:
    what = "APOLLO is not worse than AdamW, beyond the spread of the seeds"
    if apollo is None:
        return Verdict(what=what, found="", met=None)
    ratio, apart = apollo.ratio(dense, "perplexity"), apollo.differs(dense, "perplexity")
    return Verdict(what=what, found=f"{ratio:.3f} ({len(apollo.results)} seed(s))", met=ratio <= 1 or apart is False)


def restarts_help(done: dict[str, Seeds]) -> Verdict:
    what = "plain low rank is worse than with restarts, by more than the spread"
    if not {"lowrank", "lowrank-restarts"} <= done.keys():
        return Verdict(what=what, found="", met=None)
    plain, restarted = done["lowrank"], done["lowrank-restarts"]
    ratio = plain.ratio(restarted, "perplexity")
    apart, spread = plain.differs(restarted, "perplexity"), done["dense"].sd("perplexity")
    if apart is None and spread is not None:  # of one seed each: against the spread of the dense ones
        apart = abs(plain.mean("perplexity") - restarted.mean("perplexity")) > spread
    met = None if apart is None else ratio > 1 and apart
    return Verdict(what=what, found=f"perplexity {ratio:.3f} of it", met=met)


def recovery(done: dict[str, Seeds]) -> Verdict:
    """(static - after) / (static - dense), in perplexity."""
    what = "dense fine-tuning recovers >= 80 % of what 75 % static sparsity costs"
    if "spdf-75" not in done:
        return Verdict(what=what, found="", met=None)
    spdf, dense = done["spdf-75"], done["dense"].mean("perplexity")
    sparse = statistics.mean(result["stages"]["sparse"]["perplexity"] for result in spdf.results)
    after = spdf.mean("perplexity")
    share = (sparse - after) / (sparse - dense) if sparse > dense else 1.0
    return Verdict(what=what, found=f"{sparse:.3f} -> {after:.3f}, dense {dense:.3f}: {share:.0%}", met=share >= 0.8)


def equal_bytes(done: dict[str, Seeds]) -> Verdict:
    """Ternary GGUF files against the best calibrated GGUF of dense models, between whose sizes is interpolated."""
    what = "ternary at equal exported bytes: fewer bits per byte than the best dense file"
    dense = frontier([file for seeds in done.values() for file in ggufs(seeds) if is_dense(seeds)])
    ours = frontier([file for name in (*TERNARY, *TAUGHT) if name in done for file in ggufs(done[name])])
    compared = [(file, at_bytes(dense, file.bytes)) for file in ours]
    inside = [(file, theirs) for file, theirs in compared if theirs is not None]
    if not inside:
        return Verdict(what=what, found="", met=None)
    shown = "; ".join(
        f"{file.row} {file.name} ({file.bytes:,.0f} bytes) {file.bits_per_byte:.4f} against {theirs:.4f}"
        for file, theirs in inside
    )
    return Verdict(what=what, found=shown, met=all(file.bits_per_byte < theirs for file, theirs in inside))


def is_dense(seeds: Seeds) -> bool:
    """Whether the row is a plain model, of any width."""
    return not any(stage.methods for stage in seeds.row.stages(SCALES["small"]))


def ggufs(seeds: Seeds) -> list[Measured]:
    return [file for file in measured_files(seeds) if file.name.startswith("gguf-")]


def frontier(files: list[Measured]) -> list[Measured]:
    """Files that no smaller one beats, by size."""
    kept: list[Measured] = []
    for file in sorted(files, key=lambda file: (file.bytes, file.bits_per_byte)):
        if not kept or file.bits_per_byte < kept[-1].bits_per_byte:
            kept.append(file)
    return kept


def at_bytes(files: list[Measured], size: float) -> float | None:
    """Bits per byte of a frontier at a size, linear in the logarithm of bytes; None outside of it."""
    for left, right in zip(files, files[1:], strict=False):
        if left.bytes <= size <= right.bytes:
            share = math.log(size / left.bytes) / math.log(right.bytes / left.bytes)
            return left.bits_per_byte + share * (right.bits_per_byte - left.bits_per_byte)
    return None


def gguf_points(seeds: Seeds) -> list[Point]:
    """The GGUF files of a row for the plot; dense rows of all widths are one series per width of the weights."""
    dense = is_dense(seeds)
    return [
        Point(
            series=f"dense {file.name.split('-')[1]}" if dense else seeds.row.name,
            label=f"{seeds.row.name} {file.name.removeprefix('gguf-')}",
            x=file.bytes,
            y=file.bits_per_byte,
            hollow=dense,
        )
        for file in ggufs(seeds)
    ]
