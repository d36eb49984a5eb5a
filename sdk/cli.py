"""The command line: every verb is a function of the package; here they only get arguments and a printed form.

Nothing heavy is imported before a command needs it, so that `--help` stays quick. The result of a command is all that
goes to standard output; with `--json` it is one object. Everything else, also what native libraries print, goes to
standard error.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn, Protocol

import typer

from edgewright.cli_options import Acceptance, Draft, Gamma, Quants, Runtimes, Speculative, shares, whole_numbers
from edgewright.cli_output import failed, print_json, progress, say_line

app = typer.Typer(
    name="edgewright",
    help="From a text corpus to a small language model that is proven on the device it is for.",
    epilog="Errors carry a code: `edgewright explain EW-110` prints the long form. "
    "`--debug` on any command shows tracebacks.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; its own choice by default.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as needed.")]


class Result(Protocol):
    """What every verb returns."""

    def to_json(self) -> dict[str, object]: ...


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: run a command and exit with its code.

    Exit codes: 0 ok, 2 usage or recipe, 3 bad input, 4 disk or memory, 5 quality gate, 6 locked, 7 diverged,
    8 refused for safety, 9 needs network, 70 bug, 130 and 143 signals.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in words, "--json" in words
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        code = app([word for word in words if word != "--debug"] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            raise
        code = failed(error, as_json)
    gc.freeze()  # all of it goes with the process: no search for garbage on the way out, through every loaded module
    raise SystemExit(code or 0)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what anybody writes to standard output, native code as well, to standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _show(verb: str, result: Result, as_json: bool) -> None:
    """Print a result: the object itself, or as text for people."""
    if as_json:
        print_json(result.to_json())
        return
    from edgewright.cli_text import print_result

    print_result(verb, result.to_json())


def _version(wanted: bool) -> None:
    if wanted:
        import edgewright

        print(edgewright.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.")] = None,
    overrides: Overrides = None,
    batch: Annotated[
        bool, typer.Option("--show-batch", help="Show the first batch: tokens, what of them is learned, borders.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a recipe and what it names.

    Opens corpus, tokenizer and models, and looks at the disk; nothing is trained or written.
    """
    if schema:
        from edgewright.recipe import json_schema

        print_json(json_schema())
        return
    from edgewright.check import check

    with _quiet_stdout():
        result = check(_required(recipe, "RECIPE"), *(overrides or []), show_batch=batch)
    if result.batch is not None and not as_json:
        from edgewright.show_batch import console, print_batch

        print_batch(result.batch, console())
    _show("check", result, as_json)
    raise typer.Exit(result.exit_code)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; with --speculative also a model.")],
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, a GPU such as rtx-4070, or a size such as 24GB; by default this machine's.")
    ] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not time a few real steps on this machine.")] = False,
    speculative: Speculative = False,
    runtime: Runtimes = None,
    quant: Quants = None,
    draft: Draft = None,
    acceptance: Acceptance = None,
    gamma: Gamma = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Predict memory, disk and time of a recipe; or whether a draft will pay.

    Says before anything is trained whether it fits, and if not what to change and what that saves. With --speculative:
    the acceptance that drafts of several sizes need, expected speed-up and best length, for a target on this machine.
    """
    from edgewright.plan import plan

    with _quiet_stdout():
        result = plan(
            recipe, *(overrides or []), device=device, probe=not no_probe, speculative=speculative,
            runtime=runtime or (), quant=quant or (), draft=draft, acceptance=shares(acceptance), gamma=gamma,
            threads=threads, say=say_line,
        )  # fmt: skip
    _show("plan", result, as_json)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again; remove what an earlier run left.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe, or go on with it.

    From the corpus to certified files and a report. The same command again goes on where the last one stopped.
    """
    from edgewright.run import run
    from edgewright.training import Interrupted
    from edgewright.world import several, speaks

    try:
        with _quiet_stdout():
            result = run(recipe, *(overrides or []), fresh=fresh)
    except Interrupted as stop:
        import shlex

        words = ["edgewright", "run", str(recipe), *(overrides or [])]
        how = "go on with the same torchrun command, or on one device with" if several() else "go on with"
        print(f"{stop}\n  {how}: {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    if speaks():
        _show("run", result, as_json)


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="Model directory, GGUF file or GenAI folder.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILES]...", help="Further files for --data.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text files or patterns. By default the held-out part of Python's standard library."),
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in .jsonl files.")] = "text",
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 50_000,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure quality on text.

    Loss, perplexity and bits per byte, with a 95 % interval, of a checkpoint or an exported file.
    """
    from edgewright.evaluate import evaluate

    if more and not data:
        raise typer.BadParameter("text files come after --data")
    files = [*(data or []), *(more or [])]
    with _quiet_stdout():
        result = evaluate(target, data=files or None, max_tokens=max_tokens, text_key=text_key, threads=threads)
    _show("evaluate", result, as_json)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Local directory of a causal language model.")],
    to: Annotated[str, typer.Option(help="Target: gguf, genai, onnx, openvino, hf; or best, the fastest here.")],
    out: Annotated[Path, typer.Option(help="Folder for the file (gguf), or the folder itself (the others).")],
    quant: Annotated[
        str | None, typer.Option(help="Width, by the target's name: tq2_0, q8_0, f16, ... or ternary, int4, ...")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Sub-network of an elastic model, a name of elastic.json.")] = None,
    embedding_quant: Annotated[str | None, typer.Option(help="Width of token embedding and output head.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Limit of the gate, nats per token.")] = None,
    budget_mb: Annotated[float | None, typer.Option(help="The most that the artifact may weigh, in MB.")] = None,
    calibrate: Annotated[
        list[Path] | None, typer.Option(help="Text to calibrate the rounding on; may be given several times.")
    ] = None,
    method: Annotated[str, typer.Option(help="How to calibrate: gptq or search.")] = "gptq",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the gate; the manifest says so.")] = False,
    draft: Annotated[Path | None, typer.Option(help="A smaller model with the same tokenizer: bundle both.")] = None,
    draft_quant: Annotated[str | None, typer.Option(help="Width of the draft; --quant by default.")] = None,
    draft_embedding_quant: Annotated[str | None, typer.Option(help="Width of the draft's embedding and head.")] = None,
    gamma: Annotated[int | None, typer.Option(help="Tokens that the draft proposes in a round; 4 by default.")] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts that the pair is certified on, 16 evenly from all files; may be given again."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a model for a runtime, or a model and its draft.

    What is written is opened there and proven; else the exit code is 5 and there is no file.
    """
    from edgewright.export import export

    with _quiet_stdout():
        result = export(
            model,
            to=to,
            quant=quant,
            size=size,
            out=out,
            embedding_quant=embedding_quant,
            verify=not no_verify,
            max_kl=max_kl,
            budget_mb=budget_mb,
            calibrate=calibrate,
            method=method,
            threads=threads,
            draft=draft,
            draft_quant=draft_quant,
            draft_embedding_quant=draft_embedding_quant,
            gamma=gamma,
            prompts=prompts,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    _show("export", result, as_json)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="Exported file or folder.")],
    against: Annotated[Path, typer.Option(help="The model directory that it was made from.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILES]...", help="Further files for --data.")] = None,
    size: Annotated[str | None, typer.Option(help="Sub-network of an elastic model that it was made from.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Limit in nats per token; the width's own by default.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text files or patterns. By default built-in texts.")] = None,
    draft: Annotated[Path | None, typer.Option(help="The directory that the draft of a bundle was made from.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prove that a file is its model.

    Compares an exported file, in its own runtime, with the model that it was made from.
    """
    from edgewright.errors import GateFailed
    from edgewright.export.parity import verify

    if more and not data:
        raise typer.BadParameter("text files come after --data")
    files = [*(data or []), *(more or [])] or None
    with _quiet_stdout():
        result = verify(artifact, against=against, size=size, max_kl=max_kl, threads=threads, data=files, draft=draft)
    _show("verify", result, as_json)
    if result.gate == "failed":
        raise typer.Exit(GateFailed.exit_code)


@app.command()
def bench(
    artifacts: Annotated[
        list[Path], typer.Argument(help="Exported files and folders, model directories; result.json of other devices.")
    ],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt test.")] = 128,
    generate: Annotated[int, typer.Option(min=1, help="Tokens of the generation test.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds after the warm-up.")] = 5,
    loop: Annotated[
        Literal["steps", "native"],
        typer.Option(help="steps: logits token by token; native: each runtime's own greedy loop."),
    ] = "steps",
    pack: Annotated[
        Path | None, typer.Option(help="Write a folder that measures the files on another device instead.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory.

    All files take turns, each in a process of its own.
    """
    if pack is not None:
        from edgewright.bench_pack import pack as write_pack

        with _quiet_stdout():
            written = write_pack(artifacts, pack, prompt=prompt, generate=generate, repeats=repeats)
        _show("pack", written, as_json)
        return
    from edgewright.bench import bench

    with _quiet_stdout():
        result = bench(*artifacts, prompt=prompt, generate=generate, repeats=repeats, threads=threads, loop=loop)
    _show("bench", result, as_json)


@app.command()
def speculate(
    target: Annotated[Path, typer.Option(help="The model whose text it is: file, folder or model directory.")],
    draft: Annotated[
        Path | None, typer.Option(help="A smaller model with the same vocabulary, in any runtime.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Files or patterns, .txt or .jsonl (.xz), a prompt a line; each is a set. Else held-out Python code."
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILES]...", help="Further files for --prompts.")] = None,
    gamma: Annotated[str, typer.Option(help="Drafted tokens per round; several with commas: 2,4.")] = "4",
    ngram: Annotated[
        int | None, typer.Option(help="Also prompt lookup, with n-grams of at most so many tokens: needs no draft.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this mass together.")] = 1.0,
    greedy_draft: Annotated[
        bool, typer.Option("--greedy-draft", help="The draft proposes its likeliest token although the target draws.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens for each prompt.")] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Keep the last so many tokens of longer prompts.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many prompts of each file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a draft for a target.

    Acceptance, tokens per pass, speed against plain decoding in turns, and whether the text is the same.
    """
    from edgewright.speculate import speculate

    if more and not prompts:
        raise typer.BadParameter("files of prompts come after --prompts")
    with _quiet_stdout():
        result = speculate(
            target,
            draft,
            prompts=[*(prompts or []), *(more or [])] or None,
            gamma=whole_numbers(gamma, "--gamma"),
            ngram=ngram,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy_draft=greedy_draft,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            limit=limit,
            seed=seed,
            threads=threads,
            say=progress("prompt"),
        )
    _show("speculate", result, as_json)


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(help="GGUF file, GenAI folder or model directory.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text, in any runtime."""
    from edgewright.generate import generate

    with _quiet_stdout():
        result = generate(
            target, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, threads=threads
        )
    _show("generate", result, as_json)


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")],
    add: Annotated[list[Path] | None, typer.Option(help="result.json of a pack, measured on another device.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's page and list its files."""
    from edgewright.report import report

    with _quiet_stdout():
        result = report(run_directory, add=add or ())
    _show("report", result, as_json)


@app.command()
def ls(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="methods, optimizers, losses, students, targets, presets, teachers, stages or proposers.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """What there is to choose from.

    Of targets also their widths, and which quantized weights each holds bit for bit.
    """
    from edgewright.ls import ls

    _show("ls", ls(kind), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Try what is installed here.

    Says of every runtime and tool whether it works on this machine, and how to fix it.
    """
    from edgewright.doctor import doctor

    with _quiet_stdout():
        result = doctor()
    _show("doctor", result, as_json)
    raise typer.Exit(0 if result.healthy else 3)


@app.command()
def explain(
    code: Annotated[str, typer.Argument(metavar="EW-nnn", help="The code at the end of an error's first line.")],
    as_json: Json = False,
) -> None:
    """The long form of an error."""
    from edgewright.explain import explain

    _show("explain", explain(code), as_json)


def _required(value: Path | None, name: str) -> Path:
    if value is None:
        raise typer.BadParameter(f"Missing argument '{name}'.")
    return value


if __name__ == "__main__":
    main()
