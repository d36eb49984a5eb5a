"""Half two of `make interop`, in optimum's environment: what `make_folders.py` wrote opens and says the same.

    python tests/interop/check_optimum.py OUT

Each folder is opened with `ORTModelForCausalLM.from_pretrained`, its tokenizer with `AutoTokenizer`; every prompt
alone, then all of them as one left-padded batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
from transformers.utils import logging


def main(out: Path) -> int:
    logging.set_verbosity_error()
    cases = json.loads((out / "cases.json").read_text())
    wrong = 0
    for name, case in cases.items():
        found = _faults(out / name, case)
        wrong += bool(found)
        print(f"{name:16} {'; '.join(found) or 'same tokens, alone and in a left-padded batch'}", flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} ONNX folders generate in optimum what was expected")
    return wrong > 0


def _faults(folder: Path, case: dict[str, Any]) -> list[str]:
    """Where optimum says something else, in words."""
    model = ORTModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    prompts, expected = case["prompts"], case["following"]
    count = len(expected[0])
    found = []
    if [tokenizer(text, add_special_tokens=False)["input_ids"] for text in case["texts"]] != prompts:
        found.append("other tokens of the prompts")
    for prompt, right in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt])
        new = _generate(model, ids, torch.ones_like(ids), count)[0]
        if new != right:
            found.append(f"after {len(prompt)} tokens {new}, not {right}")
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    if _generate(model, batch["input_ids"], batch["attention_mask"], count) != expected:
        found.append("other tokens in a left-padded batch")
    return found


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int) -> list[list[int]]:
    """The new tokens of each row, greedy, end-of-text or not."""
    whole = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    new: list[list[int]] = whole[:, ids.shape[1] :].tolist()
    return new


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
