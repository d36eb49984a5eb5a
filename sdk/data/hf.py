"""A data set opened by Hugging Face `datasets` (extra `data`), from disk unless a download is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

from pydantic import model_validator

from edgewright.data.source import Source
from edgewright.data.text import RawDocument
from edgewright.errors import BadInput, NeedsNetwork
from edgewright.paths import RecipePath


class HfData(Source):
    """One split of a Hugging Face data set, one document for each row."""

    type: Literal["hf"] = "hf"
    path: RecipePath | None = None
    """Local data: a folder written by `save_to_disk`, or a folder or file of parquet, JSON Lines or CSV."""
    hub: str | None = None
    """Instead of `path`: a name on the hub; fetched only with `allow_download`."""
    name: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Which of its splits to read; `held_out` is taken from this one."""
    revision: str | None = None
    """Commit on the hub; give one, or the data may change under you."""
    text_key: str = "text"
    """Column that holds the text."""
    allow_download: bool = False
    """Whether the hub may be asked."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path`, a local folder or file, or `hub`, a name on the hub")
        return self

    def fingerprint(self) -> list[object]:
        self._check()
        if self.path is None:
            return []  # the settings say it all
        files = [self.path] if self.path.is_file() else sorted(path for path in self.path.rglob("*") if path.is_file())
        statuses = [(path, path.stat()) for path in files]
        return [
            [path.relative_to(self.path).as_posix(), status.st_size, status.st_mtime_ns] for path, status in statuses
        ]

    def documents(self) -> Iterator[RawDocument]:
        self._check()
        for number, row in enumerate(self._rows()):
            text = row.get(self.text_key)
            fault = None
            if not isinstance(text, str):
                fault = f"no text in the column {self.text_key!r} (data.text_key); there are {', '.join(row)}"
            place = str(self.path or self.hub)
            yield RawDocument(f"{self.split}:{number}", place, number + 1, (text or "",), fault=fault, one_line=True)

    def _check(self) -> None:
        if self.path is not None and not self.path.exists():
            raise BadInput("EW-203", "there is no such data set", where=self.path, fix="check data.path")
        if self.hub is not None and not self.allow_download:
            raise NeedsNetwork(
                "EW-901",
                "this data set would have to be downloaded",
                where=f"data.hub: {self.hub}",
                fix="set data.allow_download to true, or give a local copy as data.path",
            )

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise BadInput(
                "EW-207", "data.type `hf` needs the package datasets", fix="pip install 'edgewright[data]'"
            ) from error
        try:
            yield from _open(datasets, self)
        except (ValueError, KeyError, OSError) as error:  # what `datasets` and pyarrow raise for what they cannot read
            raise BadInput(
                "EW-209",
                "the data set cannot be read",
                where=self.path or self.hub,
                found=error,
                fix="check data.path, data.name and data.split",
            ) from error


def _open(datasets: ModuleType, config: HfData) -> Iterable[dict[str, Any]]:
    """The rows of the split: from the hub, from `save_to_disk`, from a folder of files, or from one file."""
    if config.path is None:
        return datasets.load_dataset(
            config.hub, config.name, split=config.split, revision=config.revision, streaming=True
        )
    path = str(config.path)
    if (config.path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)[config.split]
    if (config.path / "dataset_info.json").is_file():
        return datasets.load_from_disk(path)
    if config.path.is_dir():
        return datasets.load_dataset(path, config.name, split=config.split, streaming=True)
    return datasets.load_dataset(_builder(config.path), data_files=path, split="train", streaming=True)


_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}


def _builder(file: Path) -> str:
    if file.suffix not in _BUILDERS:
        raise BadInput(
            "EW-204",
            "this kind of file cannot be read",
            where=file,
            expected=f"a folder, or one of {' '.join(_BUILDERS)}",
            fix="name the folder of the data set",
        )
    return _BUILDERS[file.suffix]
