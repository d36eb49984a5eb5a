"""Speculative decoding over any two sessions: proposers, the rule that keeps the target's law, loop, figures."""

from edgewright.speculative.counts import Counts
from edgewright.speculative.loop import Decoded, decode, plain
from edgewright.speculative.proposers import DraftModel, PromptLookup, Proposal, Proposer
from edgewright.speculative.sampling import Sampler

__all__ = ["Counts", "Decoded", "DraftModel", "PromptLookup", "Proposal", "Proposer", "Sampler", "decode", "plain"]
