"""OpenVINO's packages, loaded so that they stay silent.

`import openvino` alone reports itself to its vendor over the network, through the package openvino_telemetry, and keeps
an identifier in the home directory. The vendor's code has a stub for the case that this package is not installed; that
is what it gets here.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from edgewright.errors import BadInput

_TELEMETRY = "openvino_telemetry"


def load(package: str = "openvino") -> Any:
    """Import one of OpenVINO's packages without its telemetry.

    Args:
        package: `openvino`, `openvino_genai` or `openvino_tokenizers`.

    Raises:
        BadInput: EW-603, it is not installed.
    """
    # In Python, None as a module means: there is no such package.
    sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise BadInput(
            "EW-603",
            f"OpenVINO is not installed: there is no {error.name}",
            expected="the packages of the extra `openvino`",
            found=f"no {error.name}",
            fix="pip install 'edgewright[openvino]'",
        ) from error
