"""What a user needs to start a pair: scripts and settings beside the models, in the words of each runtime.

Nothing here runs them. A script (`guard/pair.SCRIPTS`) lies only where no library opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

README = "LAUNCH.md"
NEW_TOKENS = 200
"""That are written where a user does not say how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the texts speak of."""

    place: Path
    """The bundle."""
    target: str
    """Where the target lies in it: a folder or a file."""
    draft: str
    gamma: int
    windows: bool
    """Whether one of the models has layers with a sliding window."""


def write_launch(to: str, launch: Launch) -> None:
    """Write the launch files of a target into a bundle whose models are there."""
    for name, text in _FILES[to](launch).items():
        (launch.place / name).write_text(text, encoding="utf-8")


def _genai(launch: Launch) -> dict[str, str]:
    return {
        README: f"""# A target and its draft for ONNX Runtime GenAI

This folder is opened as any other: `genai_config.json` names the target (in `{launch.target}/`), the draft
(`model.draft`, in `{launch.draft}/`), and how many tokens that proposes (`speculative.max_draft_tokens`:
{launch.gamma}). One text at a time, no beams. `{launch.target}/` alone decodes without a draft.

```python
import onnxruntime_genai as og

model = og.Model("THIS FOLDER")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length={NEW_TOKENS})  # the prompt's included
# parameters.set_speculative_options(max_draft_tokens={launch.gamma})  # 1 to 16
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)), generator.get_speculative_stats())
```
"""
    }


def _openvino(launch: Launch) -> dict[str, str]:
    from edgewright.export.runtimes.openvino import settings_of

    own, its = (json.dumps(settings_of(launch.place / part)) for part in (launch.target, launch.draft))
    script = f'''"""Continue a prompt with a target and its draft: python launch.py "Once upon a time" {NEW_TOKENS}

Needs: pip install openvino-genai openvino-tokenizers. With other settings than these, which the pair was certified
with, OpenVINO computes in bfloat16 where the processor has it, and rounds the cache to 8 bits.
"""

import sys
from pathlib import Path

import openvino_genai

here = Path(__file__).resolve().parent
target_settings = {own}
draft_settings = {its}
draft = openvino_genai.draft_model(str(here / "{launch.draft}"), "CPU", **draft_settings)
pipeline = openvino_genai.LLMPipeline(str(here / "{launch.target}"), "CPU", draft_model=draft, **target_settings)
config = pipeline.get_generation_config()
config.max_new_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else {NEW_TOKENS}
config.num_assistant_tokens = {launch.gamma}  # or assistant_confidence_threshold, not both
result = pipeline.generate([sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"], config)
print(result.texts[0])
metrics = result.extended_perf_metrics
print(f"accepted {{metrics.get_num_accepted_tokens()}} of {{metrics.get_num_draft_tokens()}}", file=sys.stderr)
'''
    return {
        "launch.py": script,
        README: f"""# A target and its draft for OpenVINO GenAI

`python launch.py "a prompt" {NEW_TOKENS}` (how many new tokens, which may be left out) runs the two folders
`{launch.target}/` and `{launch.draft}/`; in your own code:
`LLMPipeline(target, "CPU", draft_model=openvino_genai.draft_model(draft, "CPU"))` with the settings of the script, and
in the generation config `num_assistant_tokens = {launch.gamma}`. One text at a time, no beams.
""",
    }


def _gguf(launch: Launch) -> dict[str, str]:
    flags = f"-m {launch.target} -md {launch.draft}"
    whole = " --swa-full" if launch.windows else ""
    new = f"--spec-type draft-simple --spec-draft-n-max {launch.gamma} --spec-draft-n-min 0 --spec-draft-p-min 0.0"
    old = f"--draft-max {launch.gamma} --draft-min 0 --draft-p-min 0.0"
    window = "\nLayers of this model see a window: `--swa-full` keeps what a rejected token needs.\n" if whole else ""
    return {
        README: f"""# A target and its draft for llama.cpp

In this folder:

```
llama-server {flags} {new}{whole}
```

Builds before `--spec-type` came: `llama-server {flags} {old}{whole}`, and for a single text
`llama-speculative {flags} {old}{whole} -p "Once upon a time" -n {NEW_TOKENS}`.
{window}
From Python: `edgewright generate THIS_FOLDER --prompt ...`, or `edgewright.open_session(THIS_FOLDER)`;
llama-cpp-python's own `draft_model=` takes no second model.
"""
    }


def vllm_config(launch: Launch) -> dict[str, object]:
    """vLLM's `--speculative-config` for the draft's folder."""
    return {"method": "draft_model", "model": launch.draft, "num_speculative_tokens": launch.gamma}


def _hf(launch: Launch) -> dict[str, str]:
    script = f'''"""Continue a prompt with a target and its draft: python launch.py "Once upon a time" {NEW_TOKENS}

The draft's generation_config.json holds how many tokens it proposes.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).resolve().parent
tokenizer = AutoTokenizer.from_pretrained(here / "{launch.target}")
target = AutoModelForCausalLM.from_pretrained(here / "{launch.target}")
draft = AutoModelForCausalLM.from_pretrained(here / "{launch.draft}")
prompt = tokenizer(sys.argv[1] if len(sys.argv) > 1 else "Once upon a time", return_tensors="pt")
inputs = {{"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]}}
new = int(sys.argv[2]) if len(sys.argv) > 2 else {NEW_TOKENS}
found = target.generate(**inputs, assistant_model=draft, max_new_tokens=new, do_sample=False)
print(tokenizer.decode(found[0], skip_special_tokens=True))
'''
    config = json.dumps(vllm_config(launch))
    return {
        "launch.py": script,
        "vllm.json": json.dumps(vllm_config(launch), indent=2) + "\n",
        README: f"""# A target and its draft for transformers and vLLM

transformers: `python launch.py "a prompt" {NEW_TOKENS}` (how many new tokens, which may be left out), or
`target.generate(..., assistant_model=draft)`. The draft's `generation_config.json` says
`num_assistant_tokens: {launch.gamma}`, schedule `constant`, and `assistant_confidence_threshold: 0`: without the last,
transformers 5 stops drafting where the draft is unsure, and with scikit-learn learns when. One text at a
time, no beams. Do not give `assistant_tokenizer`: both have the same.

vLLM, in this folder (`vllm.json` holds the same):

```
vllm serve {launch.target} --speculative-config '{config}'
```

It drafts greedily unless `draft_sample_method` says otherwise.
""",
    }


_FILES: Mapping[str, Callable[[Launch], dict[str, str]]] = {
    "genai": _genai,
    "openvino": _openvino,
    "gguf": _gguf,
    "hf": _hf,
}
