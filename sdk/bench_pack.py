"""Other devices: a portable folder that measures model files where they will run, and its result on the way back.

The folder holds the files, one script and `pack.json`. The script (`templates/pack_runner.py`) needs nothing but the
runtimes' own packages, and follows the protocol of `bench.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput, RecipeError
from edgewright.files import disk_errors, write_json
from edgewright.inventory import ModelFile, describe_model

SCHEMA_VERSION = 1
SCRIPT = "bench.py"
RESULT = "result.json"
MAX_RESULT_BYTES = 4 * 2**20

PACKAGES = {
    "llamacpp": ("llama-cpp-python",),
    "genai": ("onnxruntime-genai",),
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
}
"""What must be installed on the device, by runtime."""

README = """Copy this folder to the device, then, in it:

    pip install {packages}
    python {script} --device "what to call it"

It measures every file in `models/` and writes {result}. Back here, give that file to

    edgewright bench {result}                    # alone, or beside files of this machine
    edgewright report RUN_DIR --add {result}     # into the page of a run
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A portable folder."""

    path: Path
    artifacts: tuple[ModelFile, ...]
    packages: tuple[str, ...]
    """The requirements of the device, with the versions of this machine."""

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            "artifacts": [str(each.path) for each in self.artifacts],
            "packages": list(self.packages),
        }


def pack(artifacts: Sequence[str | Path], out: Path, *, prompt: int, generate: int, repeats: int) -> Pack:
    """Write a folder that measures these files on another device.

    Args:
        artifacts: GGUF files, GenAI, ONNX and OpenVINO folders.
        out: a new or empty folder.
        prompt, generate, repeats: of the tests, as in `bench`.

    Raises:
        RecipeError: EW-190, there is nothing to measure; EW-193, `out` holds something; EW-194, a Hugging Face
            directory, which is no file for a device, or a bundle of two models.
        BadInput: what opening an artifact raises; EW-611, a test is longer than a model's context.
    """
    from edgewright.export.artifact import hash_of
    from edgewright.export.pairs.bundle import bundle_of
    from edgewright.export.runtimes.opening import open_session, runtime_of

    if not artifacts:
        raise RecipeError("EW-190", "there is nothing to measure", expected="at least one file or directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError("EW-193", "the folder for the pack is not empty", where=out, fix="choose another --pack")
    files = [describe_model(path) for path in artifacts]
    entries: list[dict[str, Any]] = []
    for number, file in enumerate(files, 1):
        runtime, path = runtime_of(file.path)
        if runtime not in PACKAGES or bundle_of(file.path) is not None:
            raise RecipeError(
                "EW-194", "this is no file for a device", where=file.path, expected="a single exported model",
                fix="export it first; of a bundle name the target and the draft",
            )  # fmt: skip
        with open_session(path) as session:
            session.check_room([session.start_id], held=0, more=max(prompt, generate) - 1)
            about = {"start_id": session.start_id, "vocab_size": session.vocab_size}
        entries.append({
            "path": f"models/{number}-{path.name}", "runtime": runtime, "to": file.to, "quant": file.quant,
            "bytes": file.bytes, "gate": file.gate, "sha256": hash_of(path), **about,
        })  # fmt: skip
    with disk_errors(out):
        _write(out, [runtime_of(file.path)[1] for file in files], entries, prompt, generate, repeats)
    packages = _requirements({entry["runtime"] for entry in entries})
    (out / "README.txt").write_text(
        README.format(packages=" ".join(packages), script=SCRIPT, result=RESULT), encoding="utf-8"
    )
    return Pack(path=out, artifacts=tuple(files), packages=packages)


def _write(
    out: Path, paths: list[Path], entries: list[dict[str, Any]], prompt: int, generate: int, repeats: int
) -> None:
    from edgewright.bench_worker import TOKEN_SEED

    (out / "models").mkdir(parents=True, exist_ok=True)
    for path, entry in zip(paths, entries, strict=True):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, out / entry["path"])
    tests = {"prompt": prompt, "generate": generate, "repeats": repeats, "seed": TOKEN_SEED}
    write_json(out / "pack.json", {"schema_version": SCHEMA_VERSION, **tests, "artifacts": entries})
    shutil.copyfile(Path(__file__).with_name("templates") / "pack_runner.py", out / SCRIPT)


def _requirements(runtimes: set[str]) -> tuple[str, ...]:
    from importlib.metadata import version

    names = sorted({name for runtime in runtimes for name in PACKAGES[runtime]})
    return tuple(f"{name}=={'.'.join(version(name).split('.')[:3])}" for name in names)


def read_result(path: Path) -> dict[str, Any]:
    """What a pack measured on its device.

    Raises:
        BadInput: EW-394, this is no result of a pack.
    """
    needed = ("device", "machine", "artifacts", "prompt", "generate", "threads", "repeats")
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in needed if name not in result]
        rows = result["artifacts"] if not missing else []
        if missing or not all({"path", "tokens_per_s", "ttft_ms", "peak_memory"} <= set(row) for row in rows):
            raise ValueError(f"no {', '.join(missing) or 'measurements'}")
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            "EW-394",
            "this is no result of a benchmark pack",
            where=path,
            expected=f"the {RESULT} that {SCRIPT} wrote on the device",
            found=error,
            fix=f"run python {SCRIPT} in the folder that edgewright bench --pack made",
        ) from None
    return dict(result)
