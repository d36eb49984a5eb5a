"""`plan --speculative`: a probe of about a minute on this machine, and whether a draft will pay."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.bench import SPREAD_ALLOWED
from edgewright.errors import EdgewrightError, RecipeError
from edgewright.export.runtimes.spinning import SETTLE_SECONDS
from edgewright.machine import available_cores, describe_machine
from edgewright.planner.draft_cost import DraftFit, Sample, fit
from edgewright.planner.speculative import Costs, Times, check_acceptance, check_gamma
from edgewright.planner.speculative_files import Skipped, TargetFile, Wanted, make_files, parameters, read_bytes
from edgewright.planner.speculative_probe import LONGEST
from edgewright.planner.speculative_report import Draft, Probed, SpeculativePlan, acceptance_of
from edgewright.worker import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

PROBE_COMMAND = (sys.executable, "-P", "-m", "edgewright.planner.speculative_probe")
SECONDS = 45.0
"""What all repeats take together, as far as it can be had with so many."""
FEWEST, USUAL, MOST = 3, 9, 15
"""Repeats."""
ROUNDS, MOST_ROUNDS = 2, 6
"""Of the loop in each pattern of a repeat: more where they are quick."""
FITTED_DEPTHS = (1, 2, 4)
"""Blocks of the drafts that a fit tells about, at every width that was measured."""


def plan_speculative(
    wanted: Wanted,
    *,
    acceptance: Sequence[float] = (),
    gamma: int | None = None,
    threads: int | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda line: None,
) -> SpeculativePlan:
    """Measure what drafts cost a target here, and predict what they win. Nothing is trained or kept.

    Args:
        wanted: the target, and in which runtimes and widths.
        acceptance: of the draft by position, each given that those before were accepted, as `by_position` of
            `speculate --json` tells it; the last one holds for all that follow. Empty: what draft.json says.
        gamma: tokens drafted a round; None: the best each time.
        threads: of every runtime; None: all cores that this process may use.
        seconds: that the measurement may take, exports and warming up apart.
        say: gets a line about progress now and then.

    Raises:
        RecipeError: EW-860, gamma; EW-861, acceptance; as `make_files`.
        BadInput: EW-864, a damaged draft.json; EW-802, EW-865, EW-867, as the probe finds the files; EW-610, it died;
            as `make_files`.
        OutOfResources: EW-401, no room for the exports.
    """
    check_acceptance(acceptance)
    if gamma is not None:
        check_gamma(gamma, LONGEST)
    if acceptance and wanted.draft is None and wanted.shape is None:
        raise RecipeError(
            "EW-868", "an acceptance is that of a draft", where="acceptance", expected="a draft, with --draft",
            found="none", fix="name the draft; without, the acceptance that is needed is told for several sizes",
        )  # fmt: skip
    known = tuple(float(each) for each in acceptance)
    source, doubt = "given" if known else None, None
    if not known and wanted.draft is not None:
        known, doubt = acceptance_of(wanted.draft, wanted.target)
        source = "draft.json" if known else None
    cores = available_cores() if threads is None else threads
    with tempfile.TemporaryDirectory(prefix="edgewright-plan-") as scratch:
        files, skipped = make_files(wanted, Path(scratch), threads=cores, say=say)
        measured = _measure(files, wanted, cores, seconds, say)
    return SpeculativePlan(
        target=wanted.target,
        machine=describe_machine(threads=cores),
        threads=cores,
        repeats=len(measured.replies[0]),
        files=tuple(
            _probed(file, context, replies, wanted)
            for file, context, replies in zip(measured.files, measured.contexts, measured.replies, strict=True)
        ),
        skipped=(*skipped, *measured.skipped),
        acceptance=known,
        source=source,
        gamma=gamma,
        warnings=(*measured.warnings, *([doubt] if doubt else []), *_spread(measured)),
    )


def _spread(measured: Measured) -> Iterator[str]:
    """Says so where the repeats disagree so much that the medians mean little."""
    for file, replies in zip(measured.files, measured.replies, strict=True):
        steps = [reply["step"] for reply in replies]
        share = statistics.stdev(steps) / statistics.fmean(steps) if len(steps) > 1 else 0.0
        if share > SPREAD_ALLOWED:
            yield f"{file.name}: a step spread by {share:.0%}: the machine was busy, measure again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the processes of the probe said.

    Args:
        files: those that could be opened.
        contexts: tokens in the cache, of each.
        replies: of every repeat, of each.
        skipped: the others.
    """

    files: tuple[TargetFile, ...]
    contexts: tuple[int, ...]
    replies: tuple[list[dict[str, Any]], ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]


def _measure(
    files: Sequence[TargetFile], wanted: Wanted, threads: int, seconds: float, say: Callable[[str], None]
) -> Measured:
    """Open all files, and measure them in turns."""
    with ExitStack() as stack:
        opened: list[tuple[TargetFile, WorkerProcess, int]] = []
        refused: list[tuple[TargetFile, EdgewrightError]] = []
        for file in files:
            worker = stack.enter_context(WorkerProcess(PROBE_COMMAND, _shown(wanted, file), threads=threads))
            try:
                opened.append((file, worker, _open(worker, file, wanted.context, threads)))
            except EdgewrightError as error:
                refused.append((file, error))
        if not opened:
            raise refused[0][1]
        workers = [worker for _, worker, _ in opened]
        started = time.monotonic()
        for worker in workers:
            worker.ask({"do": "round", "rounds": ROUNDS})
        repeats, rounds = effort(time.monotonic() - started, seconds)
        say(f"measuring {len(workers)} files in turns, {repeats} times")
        for worker in workers:
            worker.forget()
        replies: tuple[list[dict[str, Any]], ...] = tuple([] for _ in workers)
        for _ in range(repeats):
            for worker, kept in zip(workers, replies, strict=True):
                time.sleep(SETTLE_SECONDS)
                kept.append(worker.ask({"do": "round", "rounds": rounds}))
        return Measured(
            files=tuple(file for file, _, _ in opened),
            contexts=tuple(context for _, _, context in opened),
            replies=replies,
            skipped=tuple(Skipped(file.name, f"{error.code}: {error.what}") for file, error in refused),
            warnings=tuple(warning for worker in workers for warning in worker.warnings()),
        )


def _open(worker: WorkerProcess, file: TargetFile, context: int, threads: int) -> int:
    """Tokens of context that the process measures in, once it has opened its files."""
    drafts = [str(draft.path) for draft in file.drafts]
    request: dict[str, object] = {"do": "open", "target": str(file.path), "drafts": drafts}
    return int(worker.ask({**request, "threads": threads, "context": context})["context"])


def effort(warm_up: float, seconds: float) -> tuple[int, int]:
    """Repeats, and rounds of the loop in each, that take so many seconds where `ROUNDS` took `warm_up` once."""
    repeats = max(FEWEST, min(USUAL, int(seconds / warm_up)))
    rounds = max(ROUNDS, min(MOST_ROUNDS, int(ROUNDS * seconds / (warm_up * repeats))))
    return max(repeats, min(MOST, int(seconds * ROUNDS / (warm_up * rounds)))), rounds


def _shown(wanted: Wanted, file: TargetFile) -> Path:
    """The target's place in messages: what the user gave, and not a scratch folder."""
    return wanted.target if file.path == wanted.target else wanted.target / f"({file.to} {file.quant})"


def costs_of(replies: Sequence[dict[str, Any]], draft: int) -> Costs:
    """What the probe's repeats say of a file with one of its drafts."""
    own = [reply["drafts"][draft] for reply in replies]
    return Costs(
        step=_times(reply["step"] for reply in replies),
        verify=tuple(_times(each) for each in zip(*(reply["verify"] for reply in replies), strict=True)),
        loop=tuple(_times(each) for each in zip(*(reply["loop"] for reply in replies), strict=True)),
        draft=_times(each["step"] for each in own),
        catch_up=_times(each["catch_up"] for each in own),
        undo=_times(each["undo"] for each in own),
    )


def _times(values: Any) -> Times:
    return tuple(float(value) for value in values)


def _probed(file: TargetFile, context: int, replies: Sequence[dict[str, Any]], wanted: Wanted) -> Probed:
    drafts = [
        Draft(
            kind=each.kind, layers=each.layers, hidden_size=each.hidden_size, parameters=each.parameters,
            read=each.read, costs=costs_of(replies, index),
        )
        for index, each in enumerate(file.drafts)
    ]  # fmt: skip
    samples = [
        Sample(layers=draft.layers, bytes=draft.read, times=draft.costs.draft)
        for draft in drafts
        if draft.kind == "random" and draft.layers is not None and draft.read is not None
    ]
    fitted = fit(samples) if len(samples) >= 3 else None
    if fitted is not None:
        drafts += _fitted(file, fitted, drafts, wanted)
    return Probed(file=file, context=context, drafts=tuple(drafts), fit=fitted)


def _fitted(file: TargetFile, fitted: DraftFit, measured: Sequence[Draft], wanted: Wanted) -> Iterator[Draft]:
    """The sizes between those that were measured."""
    from edgewright.planner.random_drafts import Shape, block_of, draft_config

    random = [draft for draft in measured if draft.kind == "random"]
    known = {(draft.layers, draft.hidden_size) for draft in random}
    assert file.config is not None and file.quant is not None and file.embedding_quant is not None
    for hidden in sorted({draft.hidden_size for draft in random if draft.hidden_size is not None}):
        for layers in FITTED_DEPTHS:
            if (layers, hidden) in known or layers > file.config.num_hidden_layers:
                continue
            config: PretrainedConfig = draft_config(file.config, Shape(layers, hidden, block_of(file.quant)))
            size = parameters(config)
            if size >= parameters(file.config):
                continue
            read = read_bytes(config, file.quant, file.embedding_quant, wanted.context)
            costs = replace(random[0].costs, draft=fitted.step(layers, read))
            yield Draft(
                kind="fitted", layers=layers, hidden_size=hidden, parameters=size, read=read, costs=costs
            )  # fmt: skip
