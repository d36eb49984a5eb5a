"""Turn the run of examples/teacher.yaml into the teacher that is shipped: bf16 weights, and where they come from.

edgewright run examples/teacher.yaml
python examples/ship_teacher.py runs/teacher examples/teacher
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from edgewright.data import iterate_documents
from edgewright.evaluate import Evaluation, evaluate_session
from edgewright.export.runtimes import open_session
from edgewright.files import sha256_file, write_json
from edgewright.recipe import load_recipe
from edgewright.student import load_model


def ship(run: Path, target: Path) -> None:
    """Write `target` from the finished run directory `run`."""
    trained = run / "stages" / "teacher" / "model"
    model = load_model(trained).to(torch.bfloat16)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, target / name)
    (target / "model.safetensors").chmod(0o644)
    done = json.loads((trained.parent / "done.json").read_text(encoding="utf-8"))
    index = json.loads((run / "data" / "index.json").read_text(encoding="utf-8"))
    quality = {
        "all held-out files": held_out_quality(run, target, leave_out=()),
        "without the character tables of encodings/": held_out_quality(run, target, leave_out=("encodings/",)),
    }
    write_json(
        target / "PROVENANCE.json",
        {
            "made_by": "edgewright run examples/teacher.yaml; python examples/ship_teacher.py",
            "recipe": (run / "recipe.resolved.yaml").read_text(encoding="utf-8"),
            "machine": json.loads((run / "env.json").read_text(encoding="utf-8")),
            "corpus": "source of the Python 3.11 standard library (PSF License Agreement), held-out files left out",
            "corpus_report": index["report"],
            "steps": done["steps"],
            "tokens": done["tokens"],
            "training_seconds": round(done["seconds"]),
            "parameters": done["parameters"],
            "held_out_bits_per_byte": {
                name: {"bits_per_byte": round(q.bits_per_byte, 4), "files": q.documents, "bytes": q.bytes}
                for name, q in quality.items()
            },
            "sha256": {path.name: sha256_file(path) for path in sorted(target.glob("*.safetensors"))},
            "license": "Apache-2.0",
        },
    )
    for name, q in quality.items():
        print(f"{target}: {q.bits_per_byte:.4f} bits per byte, {name} ({q.documents} files, {q.bytes:,} bytes)")


def held_out_quality(run: Path, model: Path, *, leave_out: tuple[str, ...]) -> Evaluation:
    """Bits per byte of the shipped weights on the run's held-out files, whole."""
    data = load_recipe(run / "recipe.resolved.yaml").data
    texts = [text for name, text in iterate_documents(data, split="held_out") if not name.startswith(leave_out)]
    with open_session(model) as session:
        documents = ((session.tokenize(text), len(text.encode())) for text in texts)
        return evaluate_session(session, documents, max_tokens=sys.maxsize)


if __name__ == "__main__":
    ship(Path(sys.argv[1]), Path(sys.argv[2]))
