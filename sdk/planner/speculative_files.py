"""The files that the probe of speculative decoding opens: a target in several runtimes and widths, each with drafts.

A model directory is exported to a scratch folder, without the gate: nothing is asked of these files but their speed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgewright.errors import BadInput, EdgewrightError, OutOfResources, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from edgewright.export.source import Source
    from edgewright.inventory import ModelFile

USUAL = {"llamacpp": ("q8_0", "q4_0"), "genai": ("int8", "int4"), "openvino": ("int8", "int4")}
"""What is probed of a target unless something is asked for: where all devices are fast. Plain ONNX has the kernels of
GenAI, and transformers is for comparison."""
TERNARY = {"llamacpp": "tq2_0", "genai": "ternary", "openvino": "ternary"}
"""Besides, of a target whose weights were trained ternary."""
CACHE_BYTES = 4
"""Of a number in the cache of keys and values."""

Kind = Literal["random", "recipe", "given"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFile:
    """A draft that can be opened.

    Args:
        kind: random weights of a shape to try; of the shape that a recipe asks for; a draft that was given.
        layers, hidden_size, parameters: None where the file does not tell.
        read: bytes of weights and cache that a step reads, by counting; None as above.
    """

    path: Path
    kind: Kind
    layers: int | None
    hidden_size: int | None
    parameters: int | None
    read: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFile:
    """A file of the target, with the drafts that go with it.

    Args:
        path: where it can be opened.
        runtime: a key of `SESSIONS`.
        to, quant, embedding_quant: target and widths; None where a file has no manifest.
        bytes: size.
        read: bytes of weights and cache that a step reads, by counting; None where that is not known.
        config: the architecture; of a GGUF file a Llama of its sizes; None where a folder does not keep it (GenAI's).
        drafts: the first is measured at every length.
    """

    path: Path
    runtime: str
    to: str
    quant: str | None
    embedding_quant: str | None
    bytes: int
    read: int | None
    config: PretrainedConfig | None
    drafts: tuple[DraftFile, ...] = ()

    @property
    def name(self) -> str:
        """`genai int4`."""
        return f"{self.to} {self.quant or self.path.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What shall be probed.

    Args:
        target: a model directory, or a file or folder that was exported.
        runtimes: of the target's files; empty: those of `USUAL` that are installed.
        quants: widths; empty: the usual ones.
        draft: a model directory or an exported file; None: random ones.
        shape: of a draft that a recipe asks for.
        context: tokens in the cache while it is measured.
    """

    target: Path
    runtimes: tuple[str, ...] = ()
    quants: tuple[str, ...] = ()
    draft: Path | None = None
    shape: PretrainedConfig | None = None
    context: int = 256


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was not probed, and why."""

    name: str
    reason: str


def make_files(
    wanted: Wanted, scratch: Path, *, threads: int, say: Callable[[str], None]
) -> tuple[list[TargetFile], list[Skipped]]:
    """Export what has to be exported, and describe it all.

    Raises:
        RecipeError: EW-800, the draft has another vocabulary; EW-863, no such runtime; EW-502, no such width.
        BadInput: what export and the guard refuse; EW-603, a runtime that was asked for is not installed; EW-862, the
            draft is no smaller than its target; EW-866, no draft can be shaped; EW-869, it is for another runtime.
    """
    from edgewright.inventory import describe_model

    described = describe_model(wanted.target)
    if wanted.draft is not None:
        _check_tokens(described, describe_model(wanted.draft))
    if described.to != "hf":
        return [_given_target(wanted, described, scratch / "given", threads)], []
    from edgewright.export.source import load_source

    source = load_source(wanted.target)
    made: list[TargetFile] = []
    skipped: list[Skipped] = []
    first: EdgewrightError | None = None
    for index, (runtime, quant) in enumerate(combinations(wanted, source)):
        name = f"{runtime} {quant}"
        say(f"{name}: exporting the target and its drafts")
        try:
            file = _exported(source, wanted, runtime, quant, scratch / f"{index}", threads)
            made.append(replace(file, drafts=tuple(_drafts(wanted, file, scratch / "drafts", threads))))
        except OutOfResources:
            raise
        except EdgewrightError as error:
            first = first or error
            skipped.append(Skipped(name, f"{error.code}: {error.what}"))
    if not made and first is not None:
        raise first
    return made, skipped


def _check_tokens(target: ModelFile, draft: ModelFile) -> None:
    """Refuse a draft with other tokens before anything is exported: it would be accepted by chance alone.

    Raises:
        RecipeError: EW-800 names the first token that differs.
        BadInput, Unsafe: what the guard refuses; EW-325 and EW-328, a tokenizer that cannot be read.
    """
    from edgewright.export.guard import check_model_directory
    from edgewright.vocabulary import check_draft_table, token_table

    for model in (target, draft):
        if model.to == "hf":
            check_model_directory(model.path)
    check_draft_table(token_table(target.path), token_table(draft.path), draft.path)


def combinations(wanted: Wanted, source: Source) -> Iterator[tuple[str, str]]:
    """Runtime and width of every file of the target.

    Raises:
        RecipeError: EW-863, EW-502.
        BadInput: EW-603.
    """
    from edgewright.export.runtimes.opening import SESSIONS, TARGET_OF
    from edgewright.export.targets import TARGETS

    named = {to: runtime for runtime, to in TARGET_OF.items()} | {runtime: runtime for runtime in SESSIONS}
    unknown = [name for name in wanted.runtimes if name not in named]
    if unknown:
        raise RecipeError(
            "EW-863", f"there is no runtime {unknown[0]!r}", where="runtime", expected=f"one of: {', '.join(SESSIONS)}",
            found=unknown[0], fix="choose one; a target's name stands for its runtime",
        )  # fmt: skip
    installed = [runtime for runtime in SESSIONS if importlib.util.find_spec(SESSIONS[runtime][2]) is not None]
    asked = list(dict.fromkeys(named[name] for name in wanted.runtimes))
    for runtime in asked:
        if runtime not in installed:
            raise BadInput("EW-603", f"this runtime is not installed: {runtime}", fix=SESSIONS[runtime][3])
    chosen = asked or [runtime for runtime in installed if runtime in USUAL]
    legal = {runtime: TARGETS[TARGET_OF[runtime]].quants for runtime in chosen}
    for quant in wanted.quants:
        if not any(quant in quants for quants in legal.values()):
            raise RecipeError(
                "EW-502", f"there is no width {quant!r} of {' or '.join(chosen)}", where="quant",
                expected="; ".join(f"{runtime}: {', '.join(quants)}" for runtime, quants in legal.items()),
                found=quant, fix="choose one",
            )  # fmt: skip
    ternary = any(lattice.levels == "ternary" for lattice in source.lattice.values())
    for runtime in chosen:
        plain = tuple(quant for quant in ("fp32", "int8", "int4") if quant in legal[runtime])
        usual: tuple[str, ...] = USUAL.get(runtime, plain)
        usual = usual[:1] if runtime == "torch" else usual
        usual += (TERNARY[runtime],) if ternary and runtime in TERNARY else ()
        yield from ((runtime, quant) for quant in (wanted.quants or usual) if quant in legal[runtime])


def _exported(source: Source, wanted: Wanted, runtime: str, quant: str, place: Path, threads: int) -> TargetFile:
    from edgewright.export.architecture import open_config

    path, embedding = _write(source, runtime, quant, None, place, threads)
    config = open_config(source.directory)
    return TargetFile(
        path=path, runtime=runtime, to=_target_of(runtime), quant=quant, embedding_quant=embedding, bytes=_size(path),
        read=read_bytes(config, quant, embedding, wanted.context), config=config,
    )  # fmt: skip


def _write(
    source: Source, runtime: str, quant: str, embedding_quant: str | None, place: Path, threads: int
) -> tuple[Path, str]:
    """An export without the gate; where it is, and the width of its embedding."""
    from edgewright.export.targets import TARGETS, make
    from edgewright.files import disk_errors

    to = _target_of(runtime)
    place = place.with_name(f"{place.name}{TARGETS[to].suffix or ''}")
    with disk_errors(place):
        made = make(
            source, place, to=to, quant=quant, embedding_quant=embedding_quant, verify=False, max_kl=None,
            threads=threads,
        )  # fmt: skip
    return place, str(made.entry["embedding_quant"])


def _given_target(wanted: Wanted, described: ModelFile, scratch: Path, threads: int) -> TargetFile:
    """A file that was exported before, as it is."""
    from edgewright.export.artifact import read_entry
    from edgewright.export.runtimes.opening import runtime_of

    runtime, path = runtime_of(wanted.target)
    if wanted.runtimes or wanted.quants:
        raise RecipeError(
            "EW-868", "a file that was exported is taken as it is", where=wanted.target,
            expected="no --runtime and no --quant", found=f"a file for {runtime}",
            fix="leave them out, or give the model's directory",
        )  # fmt: skip
    entry = read_entry(path) or {}
    config = _config_of(path)
    embedding = entry.get("embedding_quant")
    known = described.quant is not None and embedding is not None
    file = TargetFile(
        path=path, runtime=runtime, to=described.to, quant=described.quant, embedding_quant=embedding,
        bytes=described.bytes, config=config,
        read=read_bytes(config, str(described.quant), str(embedding), wanted.context) if config and known else None,
    )  # fmt: skip
    return replace(file, drafts=tuple(_drafts(wanted, file, scratch, threads)))


def _config_of(path: Path) -> PretrainedConfig | None:
    from edgewright.export.architecture import open_config
    from edgewright.planner.random_drafts import config_of_gguf

    if path.is_file():
        return config_of_gguf(path)
    return open_config(path) if (path / "config.json").exists() else None


def _drafts(wanted: Wanted, target: TargetFile, scratch: Path, threads: int) -> Iterator[DraftFile]:
    """The draft that was given, or random ones, for a file of the target."""
    scratch.mkdir(parents=True, exist_ok=True)
    if wanted.draft is not None:
        yield _given_draft(wanted.draft, wanted, target, scratch, threads)
        return
    from edgewright.planner.random_drafts import draft_config, shapes

    quant = target.quant
    if quant is None or target.config is None:
        missing = "a manifest that tells its width" if quant is None else "a config.json that tells its architecture"
        raise BadInput(
            "EW-866", "no drafts can be shaped after this file", where=target.path, expected=missing, found="none",
            fix="give the model's directory instead, or a draft with --draft",
        )  # fmt: skip
    if wanted.shape is not None:
        yield _random_draft(wanted.shape, "recipe", wanted, target, scratch / "recipe", threads)
    for index, shape in enumerate(shapes(target.config, quant)):
        config = draft_config(target.config, shape)
        yield _random_draft(config, "random", wanted, target, scratch / f"{index}", threads)


def _random_draft(
    config: PretrainedConfig, kind: Kind, wanted: Wanted, target: TargetFile, place: Path, threads: int
) -> DraftFile:
    from edgewright.export.source import load_source
    from edgewright.export.tokenizer_files import write_tokenizer
    from edgewright.planner.random_drafts import write_filler_tokenizer, write_random

    assert target.quant is not None
    ternary = target.quant in (*TERNARY.values(), "tq1_0", "q2_0")
    model = place.parent / f"{place.name}-{'ternary' if ternary else 'plain'}"
    if not model.exists():  # the same for every runtime
        write_random(config, model, ternary=ternary)
        if (wanted.target / "tokenizer_config.json").exists() or (wanted.target / "tokenizer.json").exists():
            write_tokenizer(wanted.target, model)
        else:
            write_filler_tokenizer(model, config.vocab_size)
    out = place.with_name(f"{place.name}-{target.to}-{target.quant}")
    path, embedding = _write(load_source(model), target.runtime, target.quant, target.embedding_quant, out, threads)
    return DraftFile(
        path=path, kind=kind, layers=config.num_hidden_layers, hidden_size=config.hidden_size,
        parameters=parameters(config), read=read_bytes(config, target.quant, embedding, wanted.context),
    )  # fmt: skip


def _given_draft(draft: Path, wanted: Wanted, target: TargetFile, scratch: Path, threads: int) -> DraftFile:
    """Exported as the target is, if it is a directory.

    Raises:
        BadInput: EW-862, EW-869.
    """
    from edgewright.export.architecture import open_config
    from edgewright.export.runtimes.opening import runtime_of
    from edgewright.export.source import load_source
    from edgewright.inventory import describe_model

    described = describe_model(draft)
    if described.to != "hf":
        runtime, path = runtime_of(draft)
        if runtime != target.runtime:
            raise BadInput(
                "EW-869", "target and draft are for different runtimes", where=draft, expected=target.runtime,
                found=runtime, fix="give the draft's model directory: it is exported as the target is",
            )  # fmt: skip
        _check_smaller(described.bytes, target.bytes, draft)
        return DraftFile(path=path, kind="given", layers=None, hidden_size=None, parameters=None, read=None)
    config = open_config(draft)
    if target.config is not None:
        _check_smaller(parameters(config), parameters(target.config), draft)
    if target.quant is None:
        raise BadInput(
            "EW-869", "the width in which the draft should be exported is not known", where=draft,
            expected=f"a draft exported for {target.runtime}, since the target has no manifest", found="a directory",
            fix=f"edgewright export {draft} --to {target.to} --quant WIDTH --out OUT, and give that as the draft",
        )  # fmt: skip
    out = scratch / f"given-{target.to}-{target.quant}"
    path, embedding = _write(load_source(draft), target.runtime, target.quant, None, out, threads)
    if target.config is None:
        _check_smaller(describe_model(path).bytes, target.bytes, draft)
    return DraftFile(
        path=path, kind="given", layers=config.num_hidden_layers, hidden_size=config.hidden_size,
        parameters=parameters(config), read=read_bytes(config, target.quant, embedding, wanted.context),
    )  # fmt: skip


def _check_smaller(draft: int, target: int, path: Path) -> None:
    if draft >= target:
        raise BadInput(
            "EW-862", "the draft is no smaller than its target", where=path,
            expected=f"fewer than {target:,} parameters (or bytes, of exported files)", found=f"{draft:,}",
            fix="change the two round, or take a smaller draft: a tenth of the target or less",
        )  # fmt: skip


def parameters(config: PretrainedConfig) -> int:
    """Of the model of a configuration, tied ones once. Nothing of their size is made."""
    from edgewright.preview import tied

    return sum(parameter.numel() for parameter in tied(config.get_text_config()).parameters())


def read_bytes(config: PretrainedConfig, quant: str, embedding_quant: str, context: int) -> int:
    """Bytes that a step reads: all weights but the rows of the embedding that it does not look up, and the cache.

    Args:
        quant, embedding_quant: widths of linear layers, and of the head.
        context: tokens in the cache, at most half of what the model takes.
    """
    from edgewright.compress.draft_shape import DraftShape
    from edgewright.export.best import BITS as KNOWN
    from edgewright.preview import tied

    model = tied(config.get_text_config())
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings().weight
    widths = KNOWN | {"nf4": 4.5}
    bits = 0.0
    for parameter in model.parameters():
        if parameter is table and output is not table:
            continue
        wide = widths[embedding_quant] if parameter is output else widths[quant]
        bits += parameter.numel() * (wide if parameter.ndim > 1 else 32)
    shape = DraftShape.of(config)
    held = min(context, config.to_dict().get("max_position_embeddings", 2 * context) // 2)
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * held * CACHE_BYTES
    return round(bits / 8) + cache


def _target_of(runtime: str) -> str:
    from edgewright.export.runtimes.opening import TARGET_OF

    return TARGET_OF[runtime]


def _size(path: Path) -> int:
    from edgewright.export.artifact import size_of

    return size_of(path)
