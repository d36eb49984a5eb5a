"""Corpus to batches: sources, tokenizers, packed shards, and the order of training."""

from typing import Annotated

from pydantic import Field

from edgewright.data.batches import IGNORED, Batch, Batches, MixedBatches
from edgewright.data.documents import iterate_documents
from edgewright.data.files import FilesData
from edgewright.data.hf import HfData
from edgewright.data.instruct import InstructData
from edgewright.data.prepare import Corpus, prepare_data
from edgewright.data.shards import TokenStream
from edgewright.data.stdlib import StdlibData
from edgewright.data.text import Counts
from edgewright.data.tokenizer import PretrainedTokenizer, TrainTokenizer

DataConfig = Annotated[StdlibData | FilesData | HfData | InstructData, Field(discriminator="type")]
"""The `data:` section of a recipe; `type` chooses the source."""

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "Corpus",
    "Counts",
    "DataConfig",
    "FilesData",
    "HfData",
    "InstructData",
    "MixedBatches",
    "PretrainedTokenizer",
    "StdlibData",
    "TokenStream",
    "TrainTokenizer",
    "iterate_documents",
    "prepare_data",
]
