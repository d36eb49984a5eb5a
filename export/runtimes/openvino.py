"""Sessions in OpenVINO: folders that `to_openvino.py` or optimum wrote.

`append` runs the stateful model through an inference request; `native_generate` is OpenVINO GenAI's `LLMPipeline`. Each
compiles the model when it is first needed, so that who uses one does not pay for the other.

Files of fp32 and fp16 weights are computed in float32 throughout. Files of codes are computed in float32 with
activations rounded to 8 bits in groups, and the cache in float16: their fastest kernels, the same on every machine.
Without such settings OpenVINO computes in bfloat16 where the processor has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.guard import read_json
from edgewright.export.guard.openvino import check_openvino_folder
from edgewright.export.openvino.package import load, own_signal_stack
from edgewright.export.runtimes.session import GAMMA, Capabilities, Logits, Session
from edgewright.export.source import special_ids
from edgewright.export.tokenizer_files import open_tokenizer
from edgewright.speculative.counts import Counts

EXACT = {"EXECUTION_MODE_HINT": "ACCURACY", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""The settings in which weights alone are what a file may have lost."""

FAST = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
"""The settings for files of codes."""

OTHERWISE = {"KV_CACHE_PRECISION": "f32"}
"""What a twin has instead: no more than the rounding of the cache to float16 changes, and with it which of two codes an
activation is rounded to. As much lies between the pipelines, whose attention is another one than `append` has; that
gives the same logits in pieces of any width."""

CODES = ("u2", "i4", "u4", "i8", "u8")
"""The types that hold codes."""

CONTEXT_LENGTH = ["edgewright", "context_length"]
"""Where a model of ours says how many tokens it takes."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b  # 12345 + 678\n",
    "x = {'key': [1, 2.5, -3e-4]}\t!?\n\n\n  indented   and spaced",
    "naïve café, Ünïcödé, Привет, 你好, שלום, 🙂",
)
"""Texts that the folder's tokenizer model must split as its tokenizer.json does."""


class OpenVinoSession(Session):
    """An OpenVINO folder on the CPU.

    Args:
        path: the folder with openvino_model.xml, a stateful model.
        threads: of the runtime; None leaves the choice to it.
        exact: whether activations are left alone in files of codes as well.

    Raises:
        BadInput, Unsafe: what `check_openvino_folder` refuses; EW-603 without OpenVINO; EW-604 when it cannot open the
            folder; EW-618 when the model has no state.
    """

    runtime = "openvino"

    def __init__(self, path: Path, *, threads: int | None = None, exact: bool = False) -> None:
        self.path = path
        check_openvino_folder(path)
        try:
            self._model: Any = load().Core().read_model(path / "openvino_model.xml")
        except RuntimeError as error:
            raise _cannot_open(path, error) from error
        self._check_stateful()
        exact = exact or not _holds_codes(self._model)
        self._settings = _settings(exact)
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._opened: Any = None
        self._pipelines: dict[Path | None, Any] = {}
        self._length = 0
        self._describe(exact)

    def _describe(self, exact: bool) -> None:
        """Sizes and special tokens, from config.json and the tokenizer."""
        config = read_json(self.path / "config.json")
        extra = self.path / "tokenizer_config.json"
        settings = read_json(extra) if extra.exists() else {}
        self._tokenizer = open_tokenizer(self.path)
        tokens = [self._tokenizer.id_to_token(index) or "" for index in range(self._tokenizer.get_vocab_size())]
        ends = special_ids(config, settings, "eos", tokens)
        start = special_ids(config, settings, "bos", tokens) or ends
        self.vocab_size = self._model.output("logits").get_partial_shape()[2].get_length()
        self.context_length = self._context_length(config)
        self.capabilities = Capabilities(logits=True, rewind=True, fp32_compute=exact)
        self.start_id = start[0] if start else 0
        self.eos_ids = frozenset(ends)

    def _context_length(self, config: dict[str, Any]) -> int:
        """What the writer noted in the model, since a config.json may leave out its family's default."""
        if self._model.has_rt_info(CONTEXT_LENGTH):
            return int(self._model.get_rt_info(CONTEXT_LENGTH).astype(str))
        found = config.get("max_position_embeddings", config.get("n_positions"))
        if not isinstance(found, int):
            raise _cannot_open(self.path, "a config.json without max_position_embeddings")
        return found

    def _check_stateful(self) -> None:
        names = {name for place in self._model.inputs for name in place.get_names()}
        if not {"input_ids", "attention_mask", "beam_idx"} <= names or not self._model.get_sinks():
            raise BadInput(
                "EW-618",
                "this OpenVINO model keeps no cache of its own",
                where=self.path,
                expected="a stateful model with the inputs input_ids, attention_mask and beam_idx",
                found=", ".join(sorted(names)[:6]),
                fix="export the model again with --to openvino",
            )
        self._inputs = names

    @property
    def length(self) -> int:
        return self._length

    @property
    def _request(self) -> Any:
        """The inference request, which holds the cache."""
        if self._opened is None:
            if self._model is None:
                raise ValueError("this session is closed")
            try:
                with own_signal_stack():
                    compiled = load().Core().compile_model(self._model, "CPU", self._settings)
                self._opened = compiled.create_infer_request()
            except RuntimeError as error:
                raise _cannot_open(self.path, error) from error
        return self._opened

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        if not tokens:
            return None if logits == "none" else np.empty((0, self.vocab_size), np.float32)
        total = self._length + len(tokens)
        fed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request = self._request
        request.infer({name: value for name, value in fed.items() if name in self._inputs}, share_inputs=True)
        self._length = total
        if logits == "none":
            return None
        rows = request.get_tensor("logits").data[0]
        return np.array(rows if logits == "all" else rows[-1:], np.float32)

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self._length
        if length == self._length:
            return
        self._length = length
        if length == 0:
            self._request.reset_state()
            return
        for state in self._request.query_state():
            kept = np.ascontiguousarray(state.state.data[:, :, :length])
            state.state = load().Tensor(kept)

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
        self.check_generation(tokens, max_new_tokens)
        genai = load("openvino_genai")
        config = genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.do_sample = temperature > 0
        config.temperature = temperature or 1.0
        config.top_k, config.top_p = 2**31 - 1, 1.0
        config.rng_seed = seed
        config.ignore_eos = not stop_at_eos
        config.stop_token_ids = set(self.eos_ids) if stop_at_eos else set()
        if draft is not None:
            config.num_assistant_tokens = gamma or GAMMA
        prompt = load().Tensor(np.array([tokens], np.int64))
        try:
            found = self._pipeline(draft).generate(prompt, config)
        except RuntimeError as error:  # what the pipeline holds after that is not defined
            self._pipelines.clear()
            raise _cannot_open(self.path, error) from error
        new = [int(token) for token in found.tokens[0]]
        self.drafted = None if draft is None else _counts(found.extended_perf_metrics, len(new))
        return new[:-1] if stop_at_eos and new and new[-1] in self.eos_ids else new

    def _pipeline(self, draft: Session | None) -> Any:
        """The pipeline with this draft, compiled once."""
        if draft is not None:
            self.check_same_runtime(draft)
            assert isinstance(draft, OpenVinoSession)
        key = None if draft is None else draft.path
        if key not in self._pipelines:
            genai = load("openvino_genai")
            try:
                with own_signal_stack():
                    extra = (
                        {}
                        if draft is None
                        else {"draft_model": genai.draft_model(str(draft.path), "CPU", **draft._settings)}
                    )
                    self._pipelines[key] = genai.LLMPipeline(str(self.path), "CPU", **self._settings, **extra)
            except RuntimeError as error:
                raise _cannot_open(self.path, error) from error
        return self._pipelines[key]

    def twin(self) -> OpenVinoSession | None:
        if self.capabilities.fp32_compute:
            return None
        found = OpenVinoSession(self.path)
        found._settings = self._settings | OTHERWISE
        return found

    def tokenize(self, text: str) -> list[int]:
        # Not the tokenizer model: it parses special tokens in the text.
        return list(self._checked_tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    @cached_property
    def _checked_tokenizer(self) -> Any:
        """tokenizer.json, once the tokenizer model that the pipeline uses was seen to split text alike."""
        model = load("openvino_genai").Tokenizer(str(self.path))
        for text in PROBES:
            own = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
            found = [int(token) for token in model.encode(text, add_special_tokens=False).input_ids.data[0]]
            if own != found:
                raise BadInput(
                    "EW-617",
                    "the tokenizer model of this folder splits text otherwise than its tokenizer.json",
                    where=self.path,
                    expected=f"{own[:12]} for {text[:30]!r}",
                    found=found[:12],
                    fix="export the model again; if it fails again, export to genai or onnx",
                )
        return self._tokenizer

    def close(self) -> None:
        self._opened = None
        self._model = None
        self._pipelines = {}
        self._length = 0


def _counts(metrics: Any, tokens: int) -> Counts:
    """What the pipeline says of a text of so many new tokens; it does not tell the positions.

    Each pass of the target adds one token of its own to those that were accepted.
    """
    accepted = int(metrics.get_num_accepted_tokens())
    return Counts(drafted=int(metrics.get_num_draft_tokens()), accepted=accepted, rounds=tokens - accepted)


def settings_of(path: Path) -> dict[str, Any]:
    """The settings in which a folder of ours is opened."""
    return _settings(exact=not _holds_codes(load().Core().read_model(path / "openvino_model.xml")))


def _settings(exact: bool) -> dict[str, Any]:
    return dict(EXACT if exact else FAST)


def _holds_codes(model: Any) -> bool:
    types = {node.get_output_element_type(0).get_type_name() for node in _constants(model)}
    return not types.isdisjoint(CODES)


def _constants(model: Any) -> list[Any]:
    return [node for node in model.get_ops() if node.get_type_name() == "Constant"]


def _cannot_open(path: Path, found: object) -> BadInput:
    return BadInput(
        "EW-604",
        "OpenVINO cannot run this folder",
        where=path,
        expected="openvino_model.xml with its data, config.json and a tokenizer",
        found=str(found).strip()[-300:],
        fix="export the model again, or install a newer openvino",
    )
