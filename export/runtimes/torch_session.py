"""transformers on torch, in float32: the reference that every exported file is compared with.

It also runs directories whose weights are packed. Those libraries compile small functions on the first call; here they
run as they are written, since that needs no compiler and gives the same numbers.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from edgewright.errors import BadInput
from edgewright.export.architecture import open_config, read_config
from edgewright.export.guard import read_json
from edgewright.export.runtimes.session import GAMMA, Capabilities, Logits, Session
from edgewright.export.source import Source, open_tokenizer, special_ids
from edgewright.speculative.counts import Counts
from edgewright.student import load_model

PACKAGES = {"bitsandbytes": ("bitsandbytes", "accelerate"), "bitnet": ("accelerate",)}
"""What transformers needs to open packed weights, by quant_method."""


class TorchSession(Session):
    """A Hugging Face model directory, computed in float32 with scaled-dot-product attention.

    Args:
        path: the directory.
        threads: of torch; None leaves the choice to it.
        source: the same directory as a source. Where the files only hold rounded or packed weights, the model is then
            made of the exact ones, as the reference should be; without, it is what transformers makes of the files.

    Raises:
        BadInput: what `load_model` refuses; EW-603, a package for packed weights is not installed.
    """

    runtime = "torch"

    def __init__(self, path: Path, *, threads: int | None = None, source: Source | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = path
        disable_progress_bar()
        settings = read_json(path / "config.json").get("quantization_config")
        # All packings round activations somewhere: BitNet and int8 to 8 bits, nf4 to bf16 where a CPU is fastest so.
        packed: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
        exact = source is not None and bool(source.restored)
        self._model: PreTrainedModel | None = _exact_model(source) if source and exact else _open(path, packed)
        self._model.generation_config = GenerationConfig()
        self._model.eval()
        self._tokenizer = open_tokenizer(path)
        self._cache = DynamicCache()
        config = self._model.config
        self.vocab_size = int(config.vocab_size)
        self.context_length = int(config.max_position_embeddings)
        self.capabilities = Capabilities(logits=True, rewind=True, fp32_compute=exact or not packed)
        eos, start = self._special("eos"), self._special("bos") or self._special("eos")
        self.start_id = start[0] if start else 0
        self.eos_ids = frozenset(eos)

    def _special(self, kind: str) -> list[int]:
        extra = self.path / "tokenizer_config.json"
        tokens = [self._tokenizer.id_to_token(index) or "" for index in range(self._tokenizer.get_vocab_size())]
        return special_ids(read_config(self.path), read_json(extra) if extra.exists() else {}, kind, tokens)

    @property
    def model(self) -> PreTrainedModel:
        """The open model.

        Raises:
            ValueError: the session is closed.
        """
        if self._model is None:
            raise ValueError("this session is closed")
        return self._model

    @property
    def length(self) -> int:
        return int(self._cache.get_seq_length())

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        if not tokens:
            return None if logits == "none" else np.empty((0, self.vocab_size), np.float32)
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            output = self.model(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if logits == "all" else 1,
            )
        return None if logits == "none" else output.logits[0].float().numpy().copy()

    def rewind(self, length: int) -> None:
        if length == 0:
            self._cache = DynamicCache()
        elif length < self.length:
            self._cache.crop(length - self.length)

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
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=0 if temperature > 0 else None,
            eos_token_id=sorted(self.eos_ids) if stop_at_eos and self.eos_ids else None,
            pad_token_id=0,
        )
        model: Any = self.model
        prompt = torch.tensor([list(tokens)])
        self.rewind(0)
        rounds = None if draft is None else _Rounds(self.model, len(tokens))
        logger = logging.getLogger("transformers.generation.utils")
        logger.addFilter(_asked_by_us)
        try:
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                whole = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    assistant_model=None if draft is None else self._assistant(draft, gamma or GAMMA),
                    streamer=rounds,
                )
        finally:
            logger.removeFilter(_asked_by_us)
            if rounds is not None:
                rounds.end()
        self.drafted = None if rounds is None else rounds.counts
        new = [int(token) for token in whole[0, len(tokens) :]]
        return new[:-1] if stop_at_eos and new and new[-1] in self.eos_ids else new

    def _assistant(self, draft: Session, gamma: int) -> PreTrainedModel:
        """The draft's model, told to draft exactly gamma tokens: by default transformers stops where it is unsure."""
        self.check_same_runtime(draft)
        assert isinstance(draft, TorchSession)
        draft.model.generation_config = GenerationConfig(
            num_assistant_tokens=gamma, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        return draft.model

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def close(self) -> None:
        self._model = None
        self._cache = DynamicCache()


def _asked_by_us(record: logging.LogRecord) -> bool:
    """A filter: transformers warns of how its own assisted generation asks the draft, about which no user can do
    anything."""
    return "`generation_config` together with" not in str(record.msg)


class _Rounds(BaseStreamer):
    """Counts what assisted generation drafts and accepts, of one text.

    The target is run once a round, on the drafted tokens and the one before them (in the first round: the prompt); then
    the accepted ones, and the target's own, are put into the streamer.
    """

    def __init__(self, target: PreTrainedModel, prompt: int) -> None:
        self.counts = Counts()
        self._known = prompt
        self._drafted = 0
        self._is_prompt = True
        self._hook = target.register_forward_pre_hook(self._before_target, with_kwargs=True)

    def _before_target(self, model: torch.nn.Module, inputs: Any, settings: dict[str, Any]) -> None:
        self._drafted = settings["input_ids"].shape[1] - self._known

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.counts.add_round(self._drafted, value.numel() - 1)
        self._known = 1

    def end(self) -> None:
        self._hook.remove()


def _open(path: Path, packed: Mapping[str, Any]) -> PreTrainedModel:
    """The model that transformers makes of the files."""
    wanted = PACKAGES.get(str(packed.get("quant_method")), ())
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInput(
            "EW-603",
            f"the weights of this model are packed, and {' and '.join(missing)} is not installed",
            where=path.absolute(),
            fix=f"pip install {' '.join(missing)}",
        )
    if not packed:
        return load_model(path)
    # It says at every product what it casts.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    dtype = getattr(torch, str(read_json(path / "config.json").get("dtype", "float32")))
    with torch.compiler.set_stance("force_eager"):
        return load_model(path, dtype)  # transformers leaves plain weights beside packed ones as they are


def _exact_model(source: Source) -> PreTrainedModel:
    """The model with the weights that the source has, in float32."""
    from transformers import AutoModelForCausalLM

    from edgewright.compress.factored_model import put_factors

    config = open_config(source.directory)
    config.tie_word_embeddings = source.tied
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    put_factors(model, source.architecture.factors)
    state = model.state_dict()
    with torch.no_grad():
        for name in source.names:
            state[name].copy_(torch.from_numpy(source.tensor(name)))
    return model
