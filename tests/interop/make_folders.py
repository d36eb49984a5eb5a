"""Half one of `make interop`, in our own environment: ONNX folders of every family, and what torch generates.

    python tests/interop/make_folders.py OUT

OUT is emptied, and gets a folder for each case, and `cases.json`: for each prompt its tokens, and the tokens that the
checkpoint goes on with in torch in float32 (packed files: that our own session goes on with, which are torch's for most
prompts).
`check_optimum.py` then expects the same from `ORTModelForCausalLM`.
"""

from __future__ import annotations

import json
import operator
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from families import save_family

from edgewright.export.lattice import round_int, round_ternary, save_sidecar
from edgewright.export.runtimes.opening import open_session
from edgewright.export.source import load_source
from edgewright.export.targets import export

PROMPTS = ["the quick brown", "def add(a, b):\n    return a", "a", "bright über 世界 the quick brown fox add add (b)"]
NEW_TOKENS = 24

CASES: dict[str, dict[str, int]] = {
    "llama": {},
    "llama-llama3": {},
    "mistral-window": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 4},
    "gemma3": {},
    "phi": {},
    "phi3": {"num_key_value_heads": 4},
    "smollm3": {},
    "gpt2": {},
    "opt": {},
}
"""Families, and how their tiny models must differ for optimum-onnx 0.1.0: but for Gemma 1 and 3 it takes the head size
for hidden size / heads, and for Gemma 2 and Phi 3 the heads of the cache for those of the queries."""

ROUNDED = {"llama-int4": ("llama", "int4"), "gpt2-int4": ("gpt2", "int4"), "qwen3-ternary": ("qwen3", "ternary")}
"""Checkpoints whose linear weights lie on a lattice, so that a packed file holds them exactly."""


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    cases = {}
    for family in CASES:
        cases[family] = _case(_checkpoint(family, out / "checkpoints" / family), out / family, "fp32")
    for name, (family, quant) in ROUNDED.items():
        checkpoint = _on_lattice(_checkpoint(family, out / "checkpoints" / name), quant)
        cases[name] = _case(checkpoint, out / name, quant)
    (out / "cases.json").write_text(json.dumps(cases, indent=1))


def _checkpoint(family: str, directory: Path) -> Path:
    return save_family(family, directory, CASES[family])


def _on_lattice(checkpoint: Path, quant: str) -> Path:
    """Round all linear weights of a checkpoint but the head's, in place."""
    from safetensors.torch import load_file, save_file
    from torch import from_numpy

    source = load_source(checkpoint)
    tensors, lattice = load_file(checkpoint / "model.safetensors"), {}
    for name in source.linears:
        if name != source.head:
            weight = source.matrix(name)
            lattice[name] = round_int(weight, bits=4, group=32) if quant == "int4" else round_ternary(weight)
            values = from_numpy(lattice[name].dequantize())
            tensors[name] = (values.T if source.stores_transposed(name) else values).contiguous()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    save_sidecar(checkpoint, lattice)
    return checkpoint


def _case(checkpoint: Path, folder: Path, quant: str) -> dict[str, object]:
    export(checkpoint, to="onnx", quant=quant, embedding_quant="fp32", out=folder, verify=False)
    with open_session(checkpoint) as session:
        prompts = [session.tokenize(prompt) for prompt in PROMPTS]
        following = [session.native_generate(prompt, NEW_TOKENS, stop_at_eos=False) for prompt in prompts]
    if quant != "fp32":  # activations are rounded to 8 bits, which may break a near tie: then what our session says
        with open_session(folder) as session:
            own = [session.native_generate(prompt, NEW_TOKENS, stop_at_eos=False) for prompt in prompts]
        same = sum(map(operator.eq, own, following))
        assert same > len(prompts) / 2, "packed weights change more than near ties"
        following = own
    print(f"{folder.name}: {quant}", flush=True)
    return {"texts": PROMPTS, "prompts": prompts, "following": following}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
