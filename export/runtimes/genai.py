"""Sessions in ONNX Runtime GenAI: folders that `to_genai.py` or the vendor's builder wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.guard import read_json
from edgewright.export.pairs.bundle import bundle_of
from edgewright.export.runtimes.huge_pages import use_huge_pages
from edgewright.export.runtimes.session import Capabilities, Logits, Session
from edgewright.export.runtimes.spinning import STOP_SPINNING
from edgewright.speculative.counts import Counts

_FIRST_CAPACITY = 128
_GROWTH = 4
"""Tokens that the cache of a new session holds, and by what it grows when it is full. The runtime writes all of a new
cache, so that it is in memory whole: at 200M parameters 512 tokens take 12 MB."""


class GenaiSession(Session):
    """A GenAI folder on the CPU.

    The runtime allocates its key-value cache whole, for the length that a generator may reach. A session starts with a
    short one and moves to a longer one, by running its tokens again, when it is full.

    Args:
        path: the folder with genai_config.json.
        threads: of the runtime's thread pool; None leaves the choice to the runtime.
        shares_cores: another session of this process takes turns with this one.

    Raises:
        BadInput: EW-604 when the runtime cannot open the folder.
    """

    runtime = "genai"
    _closed = False

    def __init__(self, path: Path, *, threads: int | None = None, shares_cores: bool = False) -> None:
        _runtime()
        self.path = path
        self._shares_cores = shares_cores
        model = _model_section(path)
        self.vocab_size = model["vocab_size"]
        self.context_length = model["context_length"]
        ends = model["eos_token_id"]
        self.eos_ids = frozenset(ends if isinstance(ends, list) else [ends])
        start = model.get("bos_token_id")
        self.start_id = min(self.eos_ids) if start is None else start
        self._threads = threads
        self._drafts = isinstance(model.get("draft"), dict)
        self._models: dict[Path, Any] = {}
        if not _is_part(path):
            self._open(path)
        self._generator: Any = None
        self._capacity = 0
        self._tokens: list[int] = []

    @property
    def _model(self) -> Any:
        """The model of the folder. A part of a bundle is opened on demand: the bundle may be all that is used."""
        return self._open(self.path)

    def _open(self, path: Path, *, drafts: bool = False) -> Any:
        """The model of a folder, opened once; `drafts`: it holds a draft, which gets the same options."""
        if path not in self._models:
            if self._closed:
                raise ValueError("this session is closed")
            og = _runtime()
            try:
                config = og.Config(str(path))
                pair = drafts or self._drafts
                options: dict[str, Any] = dict(STOP_SPINNING) if pair or self._shares_cores else {}
                if self._threads is not None:
                    options |= {"intra_op_num_threads": self._threads, "inter_op_num_threads": 1}
                sections = ("decoder", "draft") if pair else ("decoder",)
                config.overlay(json.dumps({"model": dict.fromkeys(sections, {"session_options": options})}))
                self._models[path] = og.Model(config)
            except RuntimeError as error:
                raise _cannot_open(path, error) from error
            use_huge_pages()
        return self._models[path]

    @cached_property
    def _tokenizer(self) -> Any:
        # On demand: with 32,000 tokens it takes 12 MB, and who measures the model gives token numbers.
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        self._check_tokenizer(tokenizer)
        return tokenizer

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """The runtime reads tokenizer.json with code of its own, which does not know all that may stand there.

        Raises:
            BadInput: EW-619, it splits a text otherwise.
        """
        from edgewright.export.gate.texts import PROBES

        try:
            own = _runtime().Tokenizer(self._model)
            wrong = [
                text
                for text in PROBES
                if list(own.encode(text)) != tokenizer.encode(text, add_special_tokens=False).ids
            ]
        except RuntimeError as error:
            wrong = [str(error)[:200]]
        if wrong:
            raise BadInput(
                "EW-619",
                "ONNX Runtime GenAI splits text into other tokens than tokenizer.json says",
                where=self.path,
                expected="a tokenizer that the runtime knows: BPE as Llama, GPT-2 or Qwen have it",
                found=ascii(wrong[0]),
                fix="export to openvino, onnx or gguf",
            )

    @cached_property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        # On demand: the package onnx takes as much memory as a small model, and who measures that does not ask.
        from edgewright.export.onnx.reader import quantizes_activations

        return Capabilities(logits=True, rewind=True, fp32_compute=not quantizes_activations(self.path))

    @property
    def length(self) -> int:
        return len(self._tokens)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        if not tokens:
            return None if logits == "none" else np.empty((0, self.vocab_size), np.float32)
        self._make_room(self.length + len(tokens))
        self._generator.append_tokens(np.asarray(tokens, np.int32))
        self._tokens.extend(tokens)
        if logits == "none":
            return None
        if logits == "last":
            return np.asarray(self._generator.get_logits()[0], np.float32)
        rows = np.asarray(self._generator.get_output("logits")[0], np.float32)
        if len(rows) != len(tokens):
            raise _cannot_open(self.path, f"a graph that gives logits of {len(rows)} of {len(tokens)} tokens")
        return rows

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        if length < self.length:
            self._generator.rewind_to(length)
            del self._tokens[length:]

    def native_generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        draft: Session | None = None,
        gamma: int | None = None,
    ) -> list[int]:
        self.check_room(tokens, held=0, more=max_new_tokens)
        model = self._model if draft is None else self._open(self._folder_with(draft), drafts=True)
        self.rewind(0)
        generator = self._new_generator(
            len(tokens) + max_new_tokens,
            model=model,
            gamma=None if draft is None else gamma,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=0,
            top_p=1.0,
            random_seed=seed,
        )
        generator.append_tokens(np.asarray(tokens, np.int32))
        found: list[int] = []
        while len(found) < max_new_tokens:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.eos_ids:
                if stop_at_eos:
                    break
                generator.append_tokens(np.array([token], np.int32))  # the runtime ends here; this goes on
            found.append(token)
        self.drafted = _counts(generator) if draft is not None or self._drafts else None
        return found

    def _folder_with(self, draft: Session) -> Path:
        """The folder that holds this target, and this draft for it: the runtime takes one in no other way.

        Raises:
            BadInput: EW-604, the draft is open in another runtime; EW-605, the two are not in one bundle.
        """
        self.check_same_runtime(draft)
        bundle = self.path.parent
        if not _is_part(self.path) or draft.path.resolve() != (bundle / "draft").resolve():
            raise BadInput(
                "EW-605",
                "ONNX Runtime GenAI takes a draft model only as a part of the folder",
                where=self.path,
                expected="target and draft in one bundle",
                found=f"a draft in {draft.path}",
                fix="edgewright export TARGET --draft DRAFT --to genai --out DIR, and open DIR",
            )
        return bundle

    def tokenize(self, text: str) -> list[int]:
        # Not og.Tokenizer: it parses special tokens in the text and stops at a NUL.
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def close(self) -> None:
        self._generator = None
        self._models = {}
        self._closed = True
        self._tokens = []

    def _new_generator(self, max_length: int, *, model: Any = None, gamma: int | None = None, **options: Any) -> Any:
        og = _runtime()
        model = self._model if model is None else model
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=max_length, batch_size=1, num_beams=1, **options)
        if gamma is not None:
            params.set_speculative_options(max_draft_tokens=gamma)
        return og.Generator(model, params)

    def _make_room(self, length: int) -> None:
        """See to a generator whose cache holds `length` tokens, with the tokens so far in it."""
        if self._generator is not None and length <= self._capacity:
            return
        self._capacity = min(self.context_length, max(_FIRST_CAPACITY, _GROWTH * self._capacity, length))
        self._generator = None  # before the new one, so that there is one cache at a time
        self._generator = self._new_generator(self._capacity, do_sample=False)
        if self._tokens:
            self._generator.append_tokens(np.asarray(self._tokens, np.int32))


def _is_part(path: Path) -> bool:
    """Whether a folder is the target or the draft of a bundle of ours."""
    bundle = bundle_of(path.parent)
    return bundle is not None and path in (bundle.target, bundle.draft)


def _counts(generator: Any) -> Counts:
    """What the runtime says of a text that it decoded with a draft."""
    found = generator.get_speculative_stats()
    return Counts(
        drafted=int(found["draft_tokens_proposed"]),
        accepted=int(found["draft_tokens_accepted"]),
        rounds=int(found["rounds"]),
    )


def _runtime() -> Any:
    """The package, with its telemetry off."""
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def _model_section(path: Path) -> dict[str, Any]:
    """The `model` of genai_config.json, with the keys that a session needs."""
    model = read_json(path / "genai_config.json").get("model")
    needed = ("vocab_size", "context_length", "eos_token_id")
    if not isinstance(model, dict) or not all(isinstance(model.get(key), int | list) for key in needed):
        raise _cannot_open(path, f"a genai_config.json without {', '.join(needed)}")
    return model


def _cannot_open(path: Path, found: object) -> BadInput:
    return BadInput(
        "EW-604",
        "ONNX Runtime GenAI cannot run this folder",
        where=path,
        expected="genai_config.json, model.onnx with its data, and a tokenizer",
        found=found,
        fix="export the model again",
    )
