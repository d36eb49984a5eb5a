"""What may be wrong with a model that is to decode speculatively."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgewright.errors import BadInput

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session


def no_numbers(session: Session, found: object) -> BadInput:
    """EW-805: a model whose logits cannot be compared."""
    return BadInput(
        "EW-805",
        "the logits of this model are not numbers",
        where=session.path,
        expected="finite logits",
        found=found,
        fix="run `edgewright verify` on it, or export the model again",
    )


def check_session(session: Session, role: str) -> None:
    """Whether a session can take part in speculative decoding at all.

    Raises:
        BadInput: EW-802, it gives no logits, or its cache cannot be cut back.
    """
    able = session.capabilities
    if able.logits and able.rewind:
        return
    raise BadInput(
        "EW-802",
        f"this {role} cannot be used in speculative decoding",
        where=session.path,
        expected="a session that gives logits and whose cache can be cut back",
        found="no logits" if not able.logits else "a cache that cannot be cut back",
        fix="export the model to another target, such as gguf or genai",
    )
