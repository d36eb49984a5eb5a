"""A damaged file fails the gate of every target, through each of its two guards alone."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from damage import IMMATERIAL, OPENED, QUANT, WEIGHTS, damaged, shift_vocabulary, truncate

import edgewright
from edgewright.errors import BadInput, EdgewrightError
from edgewright.export.artifact import Written
from edgewright.export.gate.identity import differences
from edgewright.export.gate.reference import Reference
from edgewright.export.parity import Parity, judge, reference_of
from edgewright.export.runtimes.opening import SESSIONS, TARGET_OF
from edgewright.export.source import Source, load_source
from edgewright.export.targets import TARGETS

PACKAGES = {TARGET_OF[runtime]: package for runtime, (_, _, package, _) in SESSIONS.items()}


@dataclass(frozen=True)
class Exported:
    """stories260K, written for one target and not damaged yet."""

    to: str
    path: Path
    written: Written
    source: Source
    reference: Reference

    def judged(self, path: Path) -> Parity:
        return judge(
            path,
            self.to,
            {QUANT[self.to], self.written.embedding_quant, *(each.quant for each in self.written.fallbacks)},
            self.source,
            kept=self.written.lattice,
            digests=self.written.digests,
            threads=1,
            reference=self.reference,
        )


@pytest.fixture(scope="session")
def stories_reference(stories: Path) -> tuple[Source, Reference]:
    source = load_source(stories)
    return source, reference_of(source, threads=1)


@pytest.fixture(scope="session", params=sorted(TARGETS))
def exported(request: pytest.FixtureRequest, stories_reference, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    to = request.param
    pytest.importorskip(PACKAGES[to])
    if importlib.util.find_spec(TARGETS[to].module) is None:
        pytest.skip(f"there is no writer for {to}")
    source, reference = stories_reference
    path = tmp_path_factory.mktemp("undamaged") / f"stories{TARGETS[to].suffix or ''}"
    written = import_module(TARGETS[to].module).write(source, path, quant=QUANT[to], embedding_quant=None)
    return Exported(to, path, written, source, reference)


def test_every_target_can_be_damaged():
    assert OPENED.keys() == QUANT.keys() == TARGETS.keys()


def test_an_undamaged_file_passes(exported):
    parity = exported.judged(exported.path)
    assert (parity.gate, parity.reasons) == ("passed", [])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_damaged_weights_are_refused_twice(exported, kind, tmp_path):
    """By the reader, which names the weight; and by the runtime alone, as if there were no reader."""
    parity = exported.judged(damaged(exported.path, exported.to, kind, tmp_path))
    lattice, *others = parity.reasons
    assert (parity.gate, parity.lattice_identity) == ("failed", False)
    assert "the file does not hold the checkpoint's lattice: model.layers." in lattice
    assert kind in IMMATERIAL or any("mean KL to the checkpoint" in reason for reason in others)


@pytest.mark.parametrize("kind", sorted(WEIGHTS.keys() - IMMATERIAL - {"doubled scale"}))
def test_without_a_manifest_a_wrong_weight_is_still_found(exported, kind, tmp_path):
    """No digests: norms are compared as they are, matrices by whether they are this one at all."""
    path = damaged(exported.path, exported.to, kind, tmp_path)
    assert differences(exported.path, exported.to, exported.source) == []
    assert differences(path, exported.to, exported.source) != []


def test_a_wrong_vocabulary_is_refused(exported, tmp_path):
    """No weight is wrong; only the tokenizer that the runtime has. Some runtimes notice before the gate asks."""
    path = _copy(exported.path, tmp_path)
    shift_vocabulary(path)
    try:
        parity = exported.judged(path)
    except BadInput as error:
        assert "splits text otherwise" in str(error)
        return
    assert (parity.gate, parity.lattice_identity, parity.tokenizer_identity) == ("failed", True, False)
    assert "splits text into other tokens" in parity.reasons[0]


def test_a_truncated_file_is_an_error_of_the_user(exported, stories, tmp_path):
    path = _copy(exported.path, tmp_path)
    truncate(path)
    with pytest.raises(EdgewrightError) as error:
        edgewright.verify(path, against=stories, threads=1)
    assert error.value.exit_code in (3, 8)
    assert path.name in str(error.value)


def _copy(path: Path, place: Path) -> Path:
    copy: Callable[..., object] = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, place / path.name)
    return place / path.name
