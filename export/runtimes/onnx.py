"""Sessions in ONNX Runtime itself: folders that `to_onnx.py` wrote, or others with a decoder of the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.guard import read_json
from edgewright.export.runtimes.huge_pages import use_huge_pages
from edgewright.export.runtimes.session import Capabilities, Logits, Session
from edgewright.export.runtimes.spinning import STOP_SPINNING
from edgewright.export.source import open_tokenizer, special_ids

PAST, PRESENT = "past_key_values.", "present."


class OnnxSession(Session):
    """A folder with model.onnx, config.json and tokenizer.json, on the CPU.

    The cache is what the graph gave last, and goes back into it without being copied.

    Args:
        path: the folder.
        threads: of the runtime; None leaves the choice to it.
        shares_cores: another session of this process takes turns with this one.

    Raises:
        BadInput: EW-613, the runtime cannot open the graph; EW-614, it is no decoder with a cache.
    """

    runtime = "onnx"

    def __init__(self, path: Path, *, threads: int | None = None, shares_cores: bool = False) -> None:
        self.path = path
        self._session: Any = _open(path, threads, STOP_SPINNING if shares_cores else {})
        use_huge_pages()
        self._cache_shapes = _cache_shapes(path, self._session)
        config = read_json(path / "config.json")
        self.vocab_size = _width_of_logits(path, self._session)
        self.context_length = _context_length(path, config)
        self._tokenizer = open_tokenizer(path)
        self.start_id, self.eos_ids = self._special(config)
        self._cache: dict[str, Any] = {}
        self._length = 0

    def _special(self, config: dict[str, Any]) -> tuple[int, frozenset[int]]:
        extra = self.path / "tokenizer_config.json"
        settings = read_json(extra) if extra.exists() else {}
        tokens = [self._tokenizer.id_to_token(index) or "" for index in range(self._tokenizer.get_vocab_size())]
        ends = special_ids(config, settings, "eos", tokens)
        start = special_ids(config, settings, "bos", tokens) or ends
        return (start[0] if start else 0), frozenset(ends)

    @cached_property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        # On demand: the package onnx takes as much memory as a small model, and who measures that does not ask.
        from edgewright.export.onnx.reader import quantizes_activations

        exact = not quantizes_activations(self.path)
        return Capabilities(logits=True, rewind=True, fp32_compute=exact, left_padding=True)

    @property
    def length(self) -> int:
        return self._length

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        if not tokens:
            return None if logits == "none" else np.empty((0, self.vocab_size), np.float32)
        end = self._length + len(tokens)
        found, self._cache = self._run(
            np.array([tokens], np.int64),
            np.ones((1, end), np.int64),
            np.arange(self._length, end)[None],
            self._cache or self._empty_cache(1),
        )
        self._length = end
        if logits == "none":
            return None
        rows: np.ndarray = found[0]
        return rows if logits == "all" else rows[-1:].copy()

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self._length
        if length == self._length:
            return
        cut = {name: value.numpy()[:, :, :length] for name, value in self._cache.items()}
        self._cache = {name: _value(part) for name, part in cut.items()} if length else {}
        self._length = length

    def batch_logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        width = max(map(len, texts))
        tokens, mask = np.zeros((2, len(texts), width), np.int64)
        for row, text in enumerate(texts):
            self.check_room(text, held=0)
            tokens[row, width - len(text) :] = text
            mask[row, width - len(text) :] = 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        found, _ = self._run(tokens, mask, positions, self._empty_cache(len(texts)))
        return [rows[width - len(text) :].copy() for rows, text in zip(found, texts, strict=True)]

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
        if draft is not None:
            raise BadInput(
                "EW-605",
                "ONNX Runtime has no speculative decoding of its own",
                where=self.path,
                expected="no draft",
                fix="export to genai, whose runtime takes a draft model",
            )
        self.check_generation(tokens, max_new_tokens)
        self.rewind(0)
        chance = np.random.default_rng(seed)
        found: list[int] = []
        following = list(tokens)
        while len(found) < max_new_tokens:
            row = self.append(following)
            assert row is not None
            token = _choose(row[0], temperature, chance)
            if stop_at_eos and token in self.eos_ids:
                break
            found.append(token)
            following = [token]
        return found

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def close(self) -> None:
        self._session = None
        self._cache = {}
        self._length = 0

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        shapes = self._cache_shapes.items()
        return {name: _value(np.empty((batch, heads, 0, size), np.float32)) for name, (heads, size) in shapes}

    def _run(
        self, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits `[batch, tokens, vocabulary]`, and the cache after the tokens by the names of the inputs."""
        feeds = {"input_ids": _value(tokens), "attention_mask": _value(mask), "position_ids": _value(positions)}
        layers = {PRESENT + name.removeprefix(PAST): name for name in self._cache_shapes}
        logits, *present = self._session.run_with_ort_values(["logits", *layers], feeds | cache)
        return logits.numpy(), dict(zip(layers.values(), present, strict=True))


def _choose(row: np.ndarray, temperature: float, chance: np.random.Generator) -> int:
    """The most likely token, or with a temperature one drawn from the distribution."""
    if temperature <= 0:
        return int(row.argmax())
    # The largest of the logits with Gumbel noise is a draw from their softmax.
    return int((row / temperature + chance.gumbel(size=row.shape)).argmax())


def _value(array: np.ndarray) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _open(path: Path, threads: int | None, entries: Mapping[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own classes derive from Exception alone
        raise BadInput(
            "EW-613",
            f"ONNX Runtime {onnxruntime.__version__} cannot open this graph",
            where=path,
            expected="operators and types that this version has kernels for",
            found=str(error).strip().splitlines()[0][:300],
            fix="pip install -U onnxruntime, or export the model again",
        ) from error


def _cache_shapes(path: Path, session: Any) -> dict[str, tuple[int, int]]:
    """Heads and head size of each part of the cache, by the name of its input."""
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    cache = {name: shape for name, shape in inputs.items() if name.startswith(PAST)}
    legal = {"input_ids", "attention_mask", "position_ids"} | cache.keys()
    present = {PRESENT + name.removeprefix(PAST) for name in cache}
    if not cache or inputs.keys() != legal or not present | {"logits"} <= outputs:
        raise _no_decoder(path, f"inputs {', '.join(list(inputs)[:5])}; outputs {', '.join(sorted(outputs)[:3])}")
    if not all(len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int) for shape in cache.values()):
        raise _no_decoder(path, "a cache without fixed heads and head size")
    return {name: (shape[1], shape[3]) for name, shape in cache.items()}


def _width_of_logits(path: Path, session: Any) -> int:
    width = next(value.shape[-1] for value in session.get_outputs() if value.name == "logits")
    if not isinstance(width, int):
        raise _no_decoder(path, "logits without a fixed width")
    return width


def _context_length(path: Path, config: dict[str, Any]) -> int:
    for name in ("max_position_embeddings", "n_positions"):  # GPT-2's own name is the second
        if isinstance(config.get(name), int):
            return int(config[name])
    raise _no_decoder(path, "a config.json without max_position_embeddings")


def _no_decoder(path: Path, found: str) -> BadInput:
    return BadInput(
        "EW-614",
        "this graph is no decoder with a key-value cache",
        where=path / "model.onnx",
        expected="inputs input_ids, attention_mask, position_ids and past_key_values.*.key|value of fixed heads, "
        "outputs logits and present.*.key|value, and their config.json",
        found=found,
        fix="export the model with `edgewright export --to onnx`",
    )
