"""One file per way out: what is trained leaves as a file for a runtime, bit-exact and certified.

The package is also the verb: `edgewright.export(model, to="gguf", quant="tq2_0", out="DIR")`.
"""

import sys

from edgewright._verbs import VerbModule
from edgewright.export.targets import export

__all__ = ["export"]

sys.modules[__name__].__class__ = VerbModule
