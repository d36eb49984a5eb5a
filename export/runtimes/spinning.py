"""ONNX Runtime's threads after a run: they wait for the next one spinning, unless they are told to stop.

Two models in one process, as a target and its draft, so keep each other from the cores. On two cores a draft's step
between steps of its target takes 7.3 ms, and 3.1 ms where the threads stop (100 MB and 80 MB in float32). A model alone
is better off spinning: to be woken up costs a step 0.05 to 0.1 ms. Not to spin at all
(`session.intra_op.allow_spinning`) costs it a third.
"""

from __future__ import annotations

STOP_SPINNING = {"session.force_spinning_stop": "1"}
"""Entry of a session's configuration."""
