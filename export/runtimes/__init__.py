"""Every runtime behind one `Session` interface."""

from edgewright.export.runtimes.opening import open_session
from edgewright.export.runtimes.session import Capabilities, Logits, Session

__all__ = ["Capabilities", "Logits", "Session", "open_session"]
