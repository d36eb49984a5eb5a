"""The pre-check of a model's JSON files: keys that name code, sizes no model has, chat templates."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgewright.compress.factor_mark import is_marked
from edgewright.errors import BadInput, Unsafe
from edgewright.export.guard.files import open_regular, printable, read_json
from edgewright.export.guard.template import MAX_TEMPLATE_BYTES, check_template

MAX_TOKENIZER_BYTES = 256 * 2**20
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""A tokenizer is in one of these."""

CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json",
    "processor_config.json", "preprocessor_config.json", "quantize_config.json", "quantization_config.json",
)  # fmt: skip
"""Files whose keys decide what a library does."""

CODE_KEYS = frozenset({"auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "trust_remote_code"})
"""Keys that name a module, a class or a repository to import."""
PRIVATE_KEYS = frozenset({
    "_name_or_path", "_commit_hash", "_from_model_config", "_attn_implementation_autoset", "_sliding_window_pattern",
    "_load_in_4bit", "_load_in_8bit", "_remove_final_layer_norm",
})  # fmt: skip
"""The private keys that do nothing; any other `_key` reaches into the library's own attributes and is refused."""
IMPLEMENTATION_KEYS = frozenset({
    "attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation",
})  # fmt: skip
IMPLEMENTATIONS = frozenset({
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm",
})  # fmt: skip
"""What an implementation key may say; anything else is the name of a repository with a kernel to download and run."""

SIZES = {
    "num_hidden_layers": 10_000, "n_layer": 10_000, "n_layers": 10_000, "num_layers": 10_000,
    "hidden_size": 2**20, "n_embd": 2**20, "d_model": 2**20, "intermediate_size": 2**22, "n_inner": 2**22,
    "ffn_dim": 2**22, "head_dim": 2**16, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "n_head": 2**16,
    "vocab_size": 2**24, "num_local_experts": 2**16, "num_experts": 2**16,
}  # fmt: skip
"""Largest sizes that are believed. A library builds that many layers before it looks at the weights."""


def check_configs(directory: Path) -> None:
    """Refuse the JSON files and chat templates of a folder that name code or ask for the impossible.

    Raises:
        Unsafe: EW-313, a key names code; EW-339, a chat template that is none.
        BadInput: EW-312, a file is damaged, too large, or holds a size that no model has; EW-722, config.json speaks
            of factored layers as this package never does.
    """
    for name in CONFIG_FILES:
        path = directory / name
        if path.is_file():
            value = read_json(path)
            _check_keys(path, value)
            if name == "config.json" and is_marked(value):
                from edgewright.compress.factor_format import read_section

                read_section(value)
            for place, template in _templates(value.get("chat_template")):
                check_template(path, place, template.encode("utf-8", "surrogatepass"))
    for path in (*directory.glob("*.jinja"), *directory.glob("additional_chat_templates/*.jinja")):
        open_regular(path)
        with path.open("rb") as file:
            check_template(path, "this file", file.read(MAX_TEMPLATE_BYTES + 1))
    for name in TOKENIZER_FILES:
        path = directory / name
        if path.is_file() and open_regular(path) > MAX_TOKENIZER_BYTES:
            expected = f"at most {MAX_TOKENIZER_BYTES} bytes"
            raise _impossible(path, "this tokenizer is too large", expected, f"{open_regular(path)} bytes")


def _templates(value: object) -> Iterable[tuple[str, str]]:
    """The chat templates of a tokenizer_config.json: one, or a list of named ones."""
    if isinstance(value, str):
        yield "the key 'chat_template'", value
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict) and isinstance(item.get("template"), str):
                yield f"the key 'chat_template[{index}]'", item["template"]


def _check_keys(path: Path, value: object, at: str = "") -> None:
    """Refuse keys that name code, and sizes that no model has, at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_keys(path, item, f"{at}[{index}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        name = f"{at}.{key}" if at else key
        if key in IMPLEMENTATION_KEYS:
            _check_implementation(path, name, item)
        elif (key in CODE_KEYS and item) or (key.startswith("_") and key not in PRIVATE_KEYS):
            raise _names_code(path, name, item)
        if key in SIZES and isinstance(item, int) and not 0 <= item <= SIZES[key]:
            expected = f"a number up to {SIZES[key]}"
            raise _impossible(path, f"the key {printable(name)} holds a size that no model has", expected, str(item))
        _check_keys(path, item, name)


def _check_implementation(path: Path, name: str, value: object) -> None:
    for item in value.values() if isinstance(value, dict) else [value]:
        if item is not None and item not in IMPLEMENTATIONS:
            raise _names_code(path, name, item)


def _names_code(path: Path, key: str, value: object) -> Unsafe:
    return Unsafe(
        "EW-313",
        f"the key {printable(key)} asks for code that comes with the model",
        where=path.absolute(),
        expected="a model that transformers knows by itself",
        found=f"{printable(key)}: {ascii(value)[:120]}",
        fix="remove the key if the architecture is one that transformers knows; code from models is never run",
    )


def _impossible(path: Path, what: str, expected: str, found: str) -> BadInput:
    return BadInput(
        "EW-312", what, where=path.absolute(), expected=expected, found=printable(found), fix="copy the file again"
    )
