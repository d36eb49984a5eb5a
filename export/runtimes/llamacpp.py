"""llama.cpp, through the C functions of llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from edgewright.errors import BadInput
from edgewright.export.gguf.file import GgufFile, open_gguf
from edgewright.export.runtimes.session import GAMMA, Capabilities, Logits, Session
from edgewright.machine import available_cores

MAX_CONTEXT = 4096
"""Tokens of cache at most, unless asked for more: a cache for all that a model could hold may not fit in memory."""
BATCH = 512
CACHE_STEP = 256
"""llama.cpp rounds the size of a cache up to a multiple of this."""
HALF_GELU = frozenset({"gemma", "gemma2", "gemma3", "gpt2", "phi2", "starcoder2"})
"""Graphs with a tanh GELU, which llama.cpp looks up in a table of half-precision values on a processor."""
_F32 = 0

_problems: list[str] = []


@llama_cpp.llama_log_callback
def _keep_problems(level: int, text: bytes, unused: Any) -> None:
    """Keep what llama.cpp has to say for error messages, off the terminal."""
    if level >= 3:  # warnings and errors
        del _problems[:-8]
        _problems.append(text.decode(errors="replace").strip())


class LlamaCppSession(Session):
    """A GGUF file. Keys and values are cached in float32 and flash attention is off, so that logits can be compared.

    Args:
        path: the file.
        threads: by default all cores.
        context_length: tokens of cache; by default at most `MAX_CONTEXT`, and no more than the short factors of a
            LongRoPE model cover: llama.cpp chooses between short and long once, by the size of the cache.
        gpu_layers: so many layers, the last ones first, are computed on a GPU; -1 stands for all.

    Raises:
        BadInput: EW-535, layers for a GPU in a build of llama.cpp that has none; EW-604, it cannot open the file.
    """

    runtime = "llamacpp"

    def __init__(
        self, path: Path, *, threads: int | None = None, context_length: int | None = None, gpu_layers: int = 0
    ) -> None:
        file = open_gguf(path)
        self.path = path
        if gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise _no_gpu(path, gpu_layers)
        _problems.clear()
        llama_cpp.llama_log_set(_keep_problems, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._context: Any = None
        self._model: Any = None
        self._batch: Any = None
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise _refused(path)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        trained = int(llama_cpp.llama_model_n_ctx_train(self._model))
        self.context_length = min(trained, context_length or min(MAX_CONTEXT, _short_reach(file) or MAX_CONTEXT))
        self._open_context(threads or available_cores(), on_gpu=gpu_layers != 0)
        self._length = 0
        self._space_in_front = bool(file.settings.get("tokenizer.ggml.add_space_prefix"))
        self.capabilities = Capabilities(logits=True, rewind=True, fp32_compute=_computes_in_float32(file))
        is_end = llama_cpp.llama_vocab_is_eog
        self.eos_ids = frozenset(token for token in range(self.vocab_size) if is_end(self._vocabulary, token))
        bos = int(llama_cpp.llama_vocab_bos(self._vocabulary))
        self.start_id = bos if bos >= 0 else int(llama_cpp.llama_vocab_eos(self._vocabulary))

    def _open_context(self, threads: int, *, on_gpu: bool) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = self.context_length
        settings.n_batch = settings.n_ubatch = min(BATCH, self.context_length)
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.offload_kqv = settings.op_offload = on_gpu
        settings.swa_full = True  # keeps what has left a sliding window, so that the cache can be cut back
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise _refused(self.path)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        fields = (self._batch.token, self._batch.pos, self._batch.logits, self._batch.n_seq_id)
        self._tokens, self._positions, self._wanted, counts = (
            np.ctypeslib.as_array(field, shape=(BATCH,)) for field in fields
        )
        counts[:] = 1
        for index in range(BATCH):
            self._batch.seq_id[index][0] = 0

    @property
    def length(self) -> int:
        return self._length

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self._check_open()
        self.check_room(tokens)
        rows = np.empty((len(tokens) if logits == "all" else min(1, len(tokens)), self.vocab_size), np.float32)
        size = min(BATCH, self.context_length)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            is_last = start + size >= len(tokens)
            found = self._decode(part, "last" if logits == "none" and is_last else logits, is_last)
            if logits == "all":
                rows[start : start + len(part)] = found
            elif is_last:
                rows[:] = found
        return None if logits == "none" else rows

    def _decode(self, tokens: Sequence[int], logits: Logits, is_last: bool) -> np.ndarray:
        """Run at most one batch; the logits of the rows asked for, a view that the next call overwrites."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(self._length, self._length + count)
        self._wanted[:count] = logits == "all"
        if is_last:
            self._wanted[count - 1] = 1
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise _refused(self.path, f"llama_decode gave {status} for {count} tokens")
        self._length += count
        outputs = int(self._wanted[:count].sum())
        if not outputs:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape=(outputs, self.vocab_size))

    def rewind(self, length: int) -> None:
        self._check_open()
        if length < self._length:
            llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)
            self._length = length

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
        self._check_open()
        self.check_generation(tokens, max_new_tokens)
        if draft is not None:
            return self._generate_with(draft, tokens, max_new_tokens, gamma or GAMMA, temperature, seed, stop_at_eos)
        self.rewind(0)
        new: list[int] = []
        sampler = _sampler(temperature, seed)
        try:
            self.append(tokens, "none")
            while len(new) < max_new_tokens:
                token = int(llama_cpp.llama_sampler_sample(sampler, self._context, -1))
                if stop_at_eos and token in self.eos_ids:
                    break
                new.append(token)
                if len(new) < max_new_tokens:
                    self._decode([token], "last", True)
        finally:
            llama_cpp.llama_sampler_free(sampler)
        return new

    def _generate_with(
        self,
        draft: Session,
        tokens: Sequence[int],
        max_new_tokens: int,
        gamma: int,
        temperature: float,
        seed: int,
        stop_at_eos: bool,
    ) -> list[int]:
        """Speculative decoding. llama.cpp's own loop is in its programs, not in the library; this is ours."""
        from edgewright.speculative import DraftModel, Sampler, decode

        self.check_same_runtime(draft)
        sampler = Sampler(temperature=temperature, seed=seed)
        ends = self.eos_ids if stop_at_eos else frozenset()
        proposer = DraftModel(draft, sampler, width=self.vocab_size, ends=ends)
        decoded = decode(
            self, proposer, tokens, max_new_tokens=max_new_tokens, gamma=gamma, sampler=sampler, stop_at_eos=stop_at_eos
        )
        self.drafted = decoded.counts
        return decoded.tokens

    def tokenize(self, text: str) -> list[int]:
        self._check_open()
        data = text.encode()
        room = len(data) + 2
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), tokens, room, False, False)
        assert count >= 0  # a text has no more tokens than bytes, but for a space in front
        return list(tokens[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._check_open()
        plain = [token for token in tokens if not llama_cpp.llama_vocab_is_control(self._vocabulary, token)]
        first = 1 if self._space_in_front else 0
        pieces = [self._piece(token, first if index == 0 else 0) for index, token in enumerate(plain)]
        return b"".join(pieces).decode(errors="replace")

    def _piece(self, token: int, strip: int) -> bytes:
        """The bytes of a token, less so many spaces in front. (llama_detokenize would tidy up spaces before signs.)"""
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            size = llama_cpp.llama_token_to_piece(self._vocabulary, token, text, room, strip, False)
            if size >= 0:
                return text.raw[:size]
            room = -size

    def close(self) -> None:
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def _check_open(self) -> None:
        if self._context is None:
            raise ValueError("this session is closed")


def _sampler(temperature: float, seed: int) -> Any:
    """llama.cpp's own sampler: greedy, or temperature and a draw."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if temperature > 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    else:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
    return chain


def _short_reach(file: GgufFile) -> int | None:
    """The largest cache for the short factors of a LongRoPE model; None for other models."""
    arch = file.settings["general.architecture"]
    reach = file.settings.get(f"{arch}.rope.scaling.original_context_length")
    if "rope_factors_short.weight" not in file.tensors or not isinstance(reach, int):
        return None
    return reach // CACHE_STEP * CACHE_STEP


def _computes_in_float32(file: GgufFile) -> bool:
    """llama.cpp rounds or quantizes activations to suit every matrix that is not float32, and some functions."""
    whole = file.settings["general.architecture"] not in HALF_GELU
    return whole and all(tensor.kind == "f32" for tensor in file.tensors.values())


def _no_gpu(path: Path, layers: int) -> BadInput:
    return BadInput(
        "EW-535",
        "this llama.cpp was built without a GPU",
        where=path.absolute(),
        expected="a build for CUDA, Vulkan or Metal",
        found=f"{layers} layers for a GPU, and a build for processors only",
        fix="install llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=on, or leave the layers to the processor",
    )


def _refused(path: Path, what: str = "llama.cpp cannot open this file") -> BadInput:
    return BadInput(
        "EW-604",
        what,
        where=path.absolute(),
        expected="a GGUF model that this llama.cpp knows",
        found="; ".join(_problems[-3:]) or None,
        fix="export the model again, or install a newer llama-cpp-python",
    )
