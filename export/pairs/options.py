"""What a user asks of the draft in a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgewright.errors import RecipeError
from edgewright.export.runtimes.session import GAMMA


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """How a draft is exported beside its target."""

    draft: Path
    """Its checkpoint."""
    quant: str | None = None
    """Its width; None: the target's."""
    embedding_quant: str | None = None
    """The width of its token embedding and head; None: its target format's default."""
    gamma: int = GAMMA
    """Tokens that it proposes in a round."""
    prompts: tuple[Path, ...] = ()
    """Texts, one prompt each, that the pair is certified on; none: pieces of built-in texts."""


def pair_options(
    draft: Path | str | None,
    quant: str | None,
    embedding_quant: str | None,
    gamma: int | None,
    prompts: Sequence[Path | str] | None,
    *,
    budget_mb: float | None,
    calibrate: Sequence[Path | str] | None,
    to: str,
) -> PairOptions | None:
    """What was asked of a draft; None without one. Arguments as in `targets.export`.

    Raises:
        RecipeError: EW-820, the target takes no draft; EW-831, options that need a draft, or do not go with one.
    """
    asked = {
        "--draft-quant": quant,
        "--draft-embedding-quant": embedding_quant,
        "--gamma": gamma,
        "--prompts": prompts or None,
    }
    others = {"--budget-mb": budget_mb, "--calibrate": calibrate or None}
    wrong = [name for name, value in (asked if draft is None else others).items() if value is not None]
    if wrong:
        raise RecipeError(
            "EW-831",
            f"{wrong[0]} {'needs a draft' if draft is None else 'is not for pairs'}",
            found=wrong[0],
            fix=f"leave out {wrong[0]}"
            + (", or add --draft DIR" if draft is None else ": pairs are rounded to nearest"),
        )
    if draft is None:
        return None
    from edgewright.export.pairs.rules import rules_of  # which knows architectures, and so takes a while

    rules_of(to)
    return PairOptions(
        draft=Path(draft),
        quant=quant,
        embedding_quant=embedding_quant,
        gamma=GAMMA if gamma is None else gamma,
        prompts=tuple(Path(each) for each in prompts or ()),
    )
