"""`--to best`: the fastest certified file for this machine.

Every combination of target and widths that this machine can run, that fits the budget and that the checkpoint allows is
written and put through the gate. The survivors are measured in turns (`bench.py`), the fastest at decoding stays, and
the table of the rest goes into its manifest.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgewright.errors import EdgewrightError, GateFailed, OutOfResources
from edgewright.export.artifact import MANIFEST, Artifact, read_entry
from edgewright.export.calibration.calibrated import Calibrations
from edgewright.export.gate.reference import Reference
from edgewright.export.parity import reference_of
from edgewright.export.runtimes.opening import SESSIONS, TARGET_OF
from edgewright.export.source import Source
from edgewright.export.staging import folder, remove, staged, swap
from edgewright.export.targets import TARGETS, Made, Target, install, make, occupied, replaceable
from edgewright.files import disk_errors

if TYPE_CHECKING:
    from edgewright.bench import BenchRow

BITS = {
    "fp32": 32, "f32": 32, "fp16": 16, "f16": 16, "bf16": 16, "q8_0": 8.5, "int8": 8.25, "q6_k": 6.5625,
    "q5_k_m": 5.7, "q5_k": 5.5, "q5_0": 5.5, "q4_1": 5, "q4_k_m": 4.8, "q4_k": 4.5, "q4_0": 4.5, "iq4_nl": 4.5,
    "int4": 4.5, "q3_k_m": 3.9, "q3_k": 3.4375, "q2_k": 2.625, "q2_0": 2.25, "ternary": 2.25, "tq2_0": 2.0625,
    "tq1_0": 1.6875,
}  # fmt: skip
"""Bits a weight takes, scales included: to leave out what cannot fit the budget before it is written."""

SIBLINGS = {
    "q5_0": "q5_k_m", "q5_k": "q5_k_m", "q4_1": "q4_k_m", "q4_k": "q4_k_m", "iq4_nl": "q4_k_m",
    "q3_k": "q3_k_m", "q2_0": "tq2_0",
}  # fmt: skip
"""Widths that stand back for one that is about as small and fast, and better."""

TERNARY = frozenset({"ternary", "tq2_0", "tq1_0", "q2_0"})
"""Widths for weights that were trained ternary."""

SURELY = 0.9
"""A file is left out unseen when this share of its estimated size is over the budget."""

EMBEDDINGS = frozenset({"f32", "fp32", "f16", "fp16", "q8_0", "int8", "q4_0", "int4"})
"""Widths of embedding and head that are tried; between them no runtime is faster."""

HEAT = 4
"""Files that are open at the same time while they are measured; the fastest of a heat goes on to the next."""

PROMPT, GENERATE, REPEATS = 64, 64, 5

Status = Literal["won", "measured", "refused", "left out"]


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One combination, and what became of it."""

    to: str
    quant: str
    embedding_quant: str
    status: Status = "left out"
    reason: str = ""
    """Why it was refused or left out."""
    bytes: int | None = None
    kl: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_sd: float | None = None
    prompt_tokens_per_s: float | None = None
    ttft_ms: float | None = None
    peak_memory: int | None = None
    heat: int | None = None
    """In which heat it was measured; only speeds of one heat were measured side by side."""

    @property
    def name(self) -> str:
        return f"{self.to} {self.quant} + {self.embedding_quant}"


def best(
    source: Source,
    *,
    out: Path,
    calibrations: Calibrations,
    budget_mb: float | None = None,
    max_kl: float | None = None,
    threads: int | None = None,
    say: Callable[[str], None],
) -> Artifact:
    """Try all combinations and keep the one that decodes fastest here.

    Args:
        source: the checkpoint.
        out: a folder, replaced whole; a winner that is a file lies in it.
        calibrations: gives the source for each pair of widths.
        budget_mb: the most that the artifact may weigh, in 10**6 bytes.
        max_kl: the gate's limit for the mean KL; by default each width's own.
        threads: of the runtimes, in the gate and while they are measured.
        say: gets a line per combination.

    Raises:
        RecipeError: EW-509, `out` is something else already.
        GateFailed: EW-511, no combination passes.
    """
    if out.exists() and not _replaceable(out):
        raise occupied(out, "a new folder, an empty one, or one that holds nothing but an earlier export")
    budget = math.inf if budget_mb is None else budget_mb * 1e6
    reference = reference_of(source, threads=threads)
    candidates = list(combinations(source))
    race = Race(candidates, threads=threads, say=say)
    with disk_errors(out), folder(out.parent), staged(out) as scratch:
        scratch.mkdir()
        for index, candidate in enumerate(candidates):
            candidate.reason = _unfit(candidate, source, budget)
            if not candidate.reason:
                place = scratch / f"{index}{TARGETS[candidate.to].suffix or ''}"
                made = _try(candidate, calibrations, reference, place, budget, max_kl, threads)
                if made is not None:
                    race.enter(index, made)
            say(f"{candidate.name}: {candidate.reason or f'passed, {candidate.bytes or 0:,} bytes'}")
        winner = race.finish()
        if winner is None:
            raise _nothing(source, candidates, budget_mb)
        winner.entry["candidates"] = [asdict(candidate) for candidate in _ranked(candidates)]
        return _install(winner, out, source)


def _replaceable(out: Path) -> bool:
    """Whether `out` may be replaced whole; also when an earlier winner was a file in it."""
    if replaceable(out):
        return True
    files = [path for path in out.iterdir() if path.name != MANIFEST] if out.is_dir() else []
    entries = [read_entry(path) for path in files if path.is_file()]
    return len(files) == 1 == len(entries) and entries[0] is not None and bool(entries[0].get("candidates"))


def _install(winner: Made, out: Path, source: Source) -> Artifact:
    """Put the winner in the place of `out`: the folder itself, or a folder with the file."""
    place = winner.place
    if place.is_dir():
        install(winner, out)
        return winner.artifact(out)
    inside = place.parent / "winner"
    inside.mkdir()
    final = inside / f"{source.name}-{winner.entry['quant']}{place.suffix}"
    install(winner, final)
    swap(inside, out)
    return winner.artifact(out / final.name)


def combinations(source: Source) -> Iterator[Candidate]:
    """Every target and pair of widths, those with an embedding narrower than the linear weights left out."""
    for to, target in TARGETS.items():
        if to == "hf":
            continue  # what it is made from, not a file for a device
        for quant in target.quants:
            for embedding_quant in _embedding_widths(quant, target):
                yield Candidate(to=to, quant=quant, embedding_quant=embedding_quant)


def _embedding_widths(quant: str, target: Target) -> list[str]:
    """At least as wide as the linear weights, at most 16 bits unless those are wider (or nothing narrower exists)."""
    tried = [width for width in target.embedding_quants if width in EMBEDDINGS]
    legal = [width for width in tried if BITS[width] >= BITS[quant] - 0.5]
    return [width for width in legal if BITS[width] <= max(16, BITS[quant])] or legal


def _unfit(candidate: Candidate, source: Source, budget: float) -> str:
    """Why a combination need not be tried, or nothing."""
    runtime = next(runtime for runtime, to in TARGET_OF.items() if to == candidate.to)
    if importlib.util.find_spec(SESSIONS[runtime][2]) is None:
        return f"its runtime is not installed: {SESSIONS[runtime][3]}"
    if candidate.quant in TERNARY and not any(lattice.levels == "ternary" for lattice in source.lattice.values()):
        return "the weights were not trained ternary"
    if candidate.quant == "bf16":
        return "16 bits are tried as f16"
    if candidate.quant in SIBLINGS:
        return f"{SIBLINGS[candidate.quant]} is tried in its place"
    estimate = estimated_bytes(source, candidate.quant, candidate.embedding_quant)
    return f"about {estimate / 1e6:.0f} MB, over the budget" if SURELY * estimate > budget else ""


def estimated_bytes(source: Source, quant: str, embedding_quant: str) -> float:
    """Bytes of all tensors at these widths, vectors at 32 bits."""
    tables = {source.embedding, source.head}
    total = 0.0
    for name in source.names:
        shape = source.shape(name)
        if len(shape) < 2:
            bits = 32.0
        else:
            bits = BITS[embedding_quant if name in tables else quant]
        total += math.prod(shape) * bits / 8
    return total


def _try(
    candidate: Candidate,
    calibrations: Calibrations,
    reference: Reference,
    place: Path,
    budget: float,
    max_kl: float | None,
    threads: int | None,
) -> Made | None:
    """Write one combination and put it through the gate; None when it does not stand, with the reason noted."""
    try:
        source = calibrations.of(candidate.to, candidate.quant, candidate.embedding_quant)
        made = make(
            source, place, to=candidate.to, quant=candidate.quant, embedding_quant=candidate.embedding_quant,
            verify=True, max_kl=max_kl, threads=threads, reference=reference,
        )  # fmt: skip
    except OutOfResources:
        raise
    except EdgewrightError as error:
        candidate.status, candidate.reason = "refused", f"{error.code}: {error.what}"
        remove(place)
        return None
    candidate.bytes = made.entry["bytes"]
    candidate.kl = made.entry["parity"]["kl"]
    if made.entry["bytes"] > budget:
        candidate.status, candidate.reason = "refused", "over the budget"
        remove(place)
        return None
    candidate.status = "measured"
    return made


class Race:
    """Measures certified files in heats as they come; only the fastest so far stays on the disk.

    Args:
        candidates: all combinations; what is measured is noted in them.
        threads: of the runtimes.
        say: gets a line per file.
    """

    def __init__(self, candidates: list[Candidate], *, threads: int | None, say: Callable[[str], None]) -> None:
        self._candidates, self._threads, self._say = candidates, threads, say
        self._waiting: dict[int, Made] = {}
        self._champion: int | None = None
        self._heats = 0

    def enter(self, index: int, made: Made) -> None:
        """Let a file wait for its heat, which runs as soon as it is full."""
        self._waiting[index] = made
        if len(self._waiting) == HEAT:
            self._run()

    def finish(self) -> Made | None:
        """Run what still waits; the fastest file, None when there is none."""
        if set(self._waiting) - {self._champion}:
            self._run()
        if self._champion is None:
            return None
        self._candidates[self._champion].status = "won"
        return self._waiting[self._champion]

    def _run(self) -> None:
        self._heats += 1
        measured = self._measured()
        for index, row in measured.items():
            candidate = self._candidates[index]
            candidate.heat = self._heats
            candidate.tokens_per_s, candidate.tokens_per_s_sd = row.tokens_per_s, row.tokens_per_s_sd
            candidate.prompt_tokens_per_s, candidate.ttft_ms = row.prompt_tokens_per_s, row.ttft_ms
            candidate.peak_memory = row.peak_memory
            self._say(f"{candidate.name}: {row.tokens_per_s:,.0f} tokens/s")
        self._champion = max(measured, key=lambda index: measured[index].tokens_per_s, default=None)
        for index in set(self._waiting) - {self._champion}:
            remove(self._waiting.pop(index).place)

    def _measured(self) -> dict[int, BenchRow]:
        """The rows of those that can be measured, by candidate; the others are noted as refused."""
        able = list(self._waiting)
        try:
            return self._side_by_side(able)
        except EdgewrightError:
            return self._side_by_side([index for index in able if self._opens(index)])

    def _side_by_side(self, heat: list[int]) -> dict[int, BenchRow]:
        from edgewright.bench import bench

        if not heat:
            return {}
        places = [self._waiting[index].place for index in heat]
        report = bench(*places, prompt=PROMPT, generate=GENERATE, repeats=REPEATS, threads=self._threads)
        return dict(zip(heat, report.artifacts, strict=True))

    def _opens(self, index: int) -> bool:
        """Whether a file can be measured alone; notes why not."""
        from edgewright.bench import bench

        try:
            bench(self._waiting[index].place, prompt=2, generate=2, repeats=1, threads=self._threads)
        except EdgewrightError as error:
            candidate = self._candidates[index]
            candidate.status, candidate.reason = "refused", f"{error.code}: {error.what}"
            return False
        return True


def _ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The fastest first, then what was refused, then what was left out."""
    order = ("won", "measured", "refused", "left out")
    return sorted(candidates, key=lambda each: (order.index(each.status), -(each.tokens_per_s or 0)))


def _nothing(source: Source, candidates: list[Candidate], budget_mb: float | None) -> GateFailed:
    refused = [f"{each.name}: {each.reason}" for each in _ranked(candidates)]
    return GateFailed(
        "EW-511",
        "no combination of target and widths is certified within the limits",
        where=source.directory.absolute(),
        expected="a file that passes the gate" + (f" and has at most {budget_mb:g} MB" if budget_mb else ""),
        found="; ".join(refused[:4]) + (f"; and {len(refused) - 4} more" if len(refused) > 4 else ""),
        fix="allow more with --budget-mb or --max-kl, or train with the ternary method",
    )
