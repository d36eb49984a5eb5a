"""The stage of type `generate`: a teacher's own continuations, written as a corpus that later stages train on.

    stages/NAME/corpus/  generated.jsonl: {"text", "prompt", "temperature", "ids", "new"}, one document a line; the last
                         `new` of its ids were written, those before them are the prompt
                         train.bin, index.json: the same, packed; the teacher's own tokens, not tokenized again
                         pieces/: what is done so far, each file whole or not there

Sequence-level knowledge distillation (arXiv 1606.07947), with draws at temperatures in the place of a beam. Documents
that came before, and continuations that added nothing, are dropped and counted. A run that was killed goes on with the
pieces that are missing; nothing is generated twice, and the text is the same as without the kill.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgewright.compress.continuation import continue_prompts
from edgewright.compress.prompts import Prompt, check_room, read_prompts
from edgewright.compress.teacher_notes import check_speaks, models_identity, smallest_vocabulary
from edgewright.data.shards import FORMAT, INDEX, StreamWriter, TokenStream, open_stream, read_index
from edgewright.data.split import TRAIN
from edgewright.data.tokenizer import Encoder, load_encoder
from edgewright.errors import BadInput
from edgewright.files import disk_errors, sha256_file, write_json, write_text
from edgewright.stage_cost import StageCost
from edgewright.stage_work import Made, StageWork
from edgewright.training import TrainingConfig, decide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.compress.generate_config import GenerateStageConfig

FOLDER = "corpus"
"""Of the stage's own folder."""
TEXT = "generated.jsonl"
BATCHES_OF_PIECE = 8
"""Batches that are written to disk together: what is done again after a kill."""
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, slots=True)
class _Task:
    """One continuation that is asked for."""

    prompt: Prompt
    temperature: float


def generate_corpus(stage: GenerateStageConfig, work: StageWork) -> Made:
    """Write the corpus, go on with it, or find that it is done.

    Raises:
        BadInput: EW-606, there is no prompt; EW-612, a prompt and what is to follow it do not fit into the teacher's
            context; EW-783, the teacher says NaN; EW-796, nothing is left after duplicates are dropped.
        RecipeError: EW-130, the teacher speaks other tokens.
        Interrupted: a signal; finished pieces stay.
    """
    writing = _Writing(stage, work)
    work.world.main_first(writing.begin)
    done = work.world.shared(writing.is_done() if work.world.is_main else None)
    if done:
        work.say(f"{stage.name}: done already")
        return Made(output=writing.folder)
    cost = writing.write_missing()
    work.world.main_only(lambda: writing.put_together(cost))
    return Made(output=writing.folder)


def open_generated(folder: Path) -> TokenStream:
    """The packed tokens of a finished corpus."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return open_stream(folder, index["files"][TRAIN])


class _Writing:
    """A corpus that is being written."""

    def __init__(self, stage: GenerateStageConfig, work: StageWork) -> None:
        self.stage, self.work = stage, work
        self.folder = work.directory / FOLDER
        self.encoder: Encoder = load_encoder(work.corpus.tokenizer_dir)
        self.seed = work.recipe.seed if stage.seed is None else stage.seed
        prompts = read_prompts(stage, work.recipe, work.corpus, self.encoder)
        self.tasks = [
            _Task(prompt, temperature)
            for prompt in prompts
            for temperature in stage.temperatures
            for _ in range(stage.samples if temperature > 0 else 1)
        ]
        settings = stage.model_dump(mode="json", exclude={"teacher", "prompts", "name"}) | {"seed": self.seed}
        made = [models_identity(stage.teachers, work.earlier), settings, [p.ids for p in prompts]]
        self.fingerprint = hashlib.sha256(json.dumps([made, work.corpus.hashes], sort_keys=True).encode()).hexdigest()

    @property
    def _each(self) -> int:
        return self.stage.per_device_batch_size * BATCHES_OF_PIECE

    @property
    def pieces(self) -> int:
        return -(-len(self.tasks) // self._each)

    def begin(self) -> None:
        (self.folder / "pieces").mkdir(parents=True, exist_ok=True)

    def is_done(self) -> bool:
        return not isinstance(read_index(self.folder, self.fingerprint), str)

    def _path(self, number: int) -> Path:
        return self.folder / "pieces" / f"{number:05d}.json"

    def _read(self, number: int) -> list[list[int]] | None:
        """The continuations of a piece; None where it is not there, damaged, or of other settings."""
        try:
            piece = json.loads(self._path(number).read_text(encoding="utf-8"))
            whole = piece["fingerprint"] == self.fingerprint and piece["sha256"] == _digest(piece["written"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        written: list[list[int]] = piece["written"]
        return written if whole else None

    def write_missing(self) -> StageCost | None:
        """Every process its share of the missing pieces, in step; what that takes, where this is the main one."""
        work, world = self.work, self.work.world
        missing = world.shared(
            [number for number in range(self.pieces) if self._read(number) is None] if world.is_main else None
        )
        if not missing:
            return None
        for note in check_speaks(self.stage.teachers, work, f"teacher of stage {self.stage.name}"):
            work.say(f"note: {note}")
        decisions = decide(TrainingConfig(compile="off"), parameters=1, tokens=1)
        decisions["micro_batch"] = min(self.stage.per_device_batch_size, len(self.tasks))
        cost = StageCost(work.directory, decisions) if world.is_main else None
        device, dtype = torch.device(decisions["device"]), getattr(torch, decisions["precision"])
        models = self._models(device)
        said = time.monotonic()
        for turn in range(0, len(missing), world.size):
            mine = missing[turn : turn + world.size]
            if world.rank < len(mine):
                self._write(mine[world.rank], models, dtype)
            if cost is not None:
                cost.keep()
            world.any(False)
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                work.say(f"{self.stage.name}: {min(turn + world.size, len(missing))} of {len(missing)} pieces")
        return cost

    def _models(self, device: torch.device) -> list[PreTrainedModel]:
        """All in memory: every new token asks each of them.

        Raises:
            BadInput: EW-612.
        """
        from edgewright.compress.teacher import open_frozen

        models = [open_frozen(t.directory(self.work.earlier), t.weights, device) for t in self.stage.teachers]
        context = min(model.config.get_text_config().max_position_embeddings for model in models)
        check_room(self.stage, (task.prompt for task in self.tasks), context)
        return models

    def _write(self, number: int, models: list[PreTrainedModel], dtype: torch.dtype) -> None:
        tasks = self.tasks[number * self._each : (number + 1) * self._each]
        size = self.stage.per_device_batch_size
        vocabulary = min(self.encoder.vocab_size, smallest_vocabulary(self.stage.teachers, self.work.earlier))
        written: list[list[int]] = []
        for begin in range(0, len(tasks), size):
            batch = tasks[begin : begin + size]
            seed = hashlib.sha256(f"{self.seed} {number} {begin}".encode()).digest()[:7]
            written += continue_prompts(
                models,
                [task.prompt.ids for task in batch],
                [task.temperature for task in batch],
                names=[task.prompt.name for task in batch],
                max_new_tokens=self.stage.max_new_tokens,
                eos_id=self.encoder.eos_id,
                vocab_size=vocabulary,
                dtype=dtype,
                generator=torch.Generator(models[0].device).manual_seed(int.from_bytes(seed, "little")),
            )
        write_text(
            self._path(number),
            json.dumps({"fingerprint": self.fingerprint, "sha256": _digest(written), "written": written}),
        )

    def _documents(self) -> Iterator[tuple[_Task, list[int]]]:
        """Every task with what was written."""
        for number in range(self.pieces):
            written = self._read(number)
            assert written is not None, "it was there, or was just made"
            yield from zip(self.tasks[number * self._each : (number + 1) * self._each], written, strict=True)

    def put_together(self, cost: StageCost | None) -> None:
        """Drop what is empty or came before; write text and tokens, and the index last.

        Args:
            cost: what writing it took; None where all was there.
        """
        counts = {"asked": len(self.tasks), "kept": 0, "duplicates": 0, "empty": 0, "tokens": 0}
        (self.folder / INDEX).unlink(missing_ok=True)
        writer = StreamWriter(
            self.folder / f"{TRAIN}.bin",
            dtype=self.encoder.dtype,
            start_id=self.encoder.start_id,
            eos_id=self.encoder.eos_id,
        )
        try:
            with disk_errors(self.folder):
                self._write_text(self._kept(counts, writer))
                entry = writer.close()
        finally:
            writer.abort()
        counts["tokens"] = entry["tokens"]
        if not counts["kept"]:
            raise BadInput(
                "EW-796",
                "the teacher has written nothing",
                where=f"stages.{self.stage.name}",
                expected="at least one document",
                found=f"{counts['empty']:,} empty continuations",
                fix="give other prompts, or temperatures above 0",
            )
        text = {"file": TEXT, "sha256": sha256_file(self.folder / TEXT)}
        write_json(
            self.folder / INDEX,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "files": {TRAIN: entry, "text": text},
                "report": counts,
            },
        )
        if cost is not None:
            cost.keep(done=True)
        self.work.say(
            f"{self.stage.name}: {counts['kept']:,} documents of {counts['asked']:,} asked for, {entry['tokens']:,} "
            f"tokens; dropped: {counts['duplicates']:,} that came before, {counts['empty']:,} empty"
        )

    def _kept(self, counts: dict[str, int], writer: StreamWriter) -> Iterator[dict[str, Any]]:
        seen: set[bytes] = set()
        for task, new in self._documents():
            ids = [*task.prompt.ids[1:], *new]
            mark = hashlib.sha256(np.array(ids, np.uint32).tobytes()).digest()
            if not new or mark in seen:
                counts["duplicates" if new else "empty"] += 1
                continue
            seen.add(mark)
            counts["kept"] += 1
            text = self.encoder.tokenizer.decode(ids, skip_special_tokens=False)
            writer.begin(len(text.encode()))
            writer.add(np.array(ids, self.encoder.dtype))
            yield {
                "text": text,
                "prompt": task.prompt.name,
                "temperature": task.temperature,
                "ids": ids,
                "new": len(new),
            }

    def _write_text(self, documents: Iterator[dict[str, Any]]) -> None:
        temporary = self.folder / f".{TEXT}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        temporary.replace(self.folder / TEXT)


def _digest(written: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()
