"""ONNX Runtime's threads after a run: they wait for the next one spinning, unless they are told to stop.

Two models in one process, as a target and its draft, so keep each other from the cores. On two cores a draft's step
between steps of its target takes 7.3 ms, and 3.1 ms where the threads stop (100 MB and 80 MB in float32). A model alone
is better off spinning: to be woken up costs a step 0.05 to 0.1 ms. Not to spin at all
(`session.intra_op.allow_spinning`) costs it a third. So a pair is measured against its target in a session of its own,
which spins, and after which the pair waits until that has ended.
"""

from __future__ import annotations

STOP_SPINNING = {"session.force_spinning_stop": "1"}
"""Entry of a session's configuration."""

RUNTIMES = frozenset({"genai", "onnx"})
"""Runtimes whose sessions can be told."""

SETTLE_SECONDS = 0.1
"""After so long the threads of a model that ran have gone to sleep, and are in no other one's way."""
