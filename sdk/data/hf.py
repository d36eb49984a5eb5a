"""A data set opened by Hugging Face `datasets` (extra `data`), from disk unless a download is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from edgewright.data.source import Source
from edgewright.data.text import RawDocument
from edgewright.errors import BadInput, NeedsNetwork


class HfData(Source):
    """One split of a Hugging Face data set, one document for each row."""

    type: Literal["hf"] = "hf"
    path: str
    """Local folder (parquet, JSON Lines, or written by `save_to_disk`), or a name on the hub with `allow_download`."""
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

    def fingerprint(self) -> list[object]:
        self._check()
        if not Path(self.path).is_dir():
            return [self.path, self.name, self.split, self.revision]
        files = sorted(path for path in Path(self.path).rglob("*") if path.is_file())
        return [
            [path.relative_to(self.path).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files
        ]

    def documents(self) -> Iterator[RawDocument]:
        self._check()
        for number, row in enumerate(self._rows()):
            text = row.get(self.text_key)
            fault = None
            if not isinstance(text, str):
                fault = f"no text in the column {self.text_key!r} (data.text_key); there are {', '.join(row)}"
            yield RawDocument(f"{self.split}:{number}", self.path, number + 1, (text or "",), fault=fault)

    def _check(self) -> None:
        if not Path(self.path).exists() and not self.allow_download:
            raise NeedsNetwork(
                "EW-901",
                "this data set is not on this machine",
                where=f"data.path: {self.path}",
                fix="give a local folder, or set data.allow_download to true to fetch it from the hub",
            )

    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise BadInput(
                "EW-207", "data.type `hf` needs the package datasets", fix="pip install 'edgewright[data]'"
            ) from error
        if (Path(self.path) / "dataset_info.json").is_file() or (Path(self.path) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(self.path)
            return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=True)
