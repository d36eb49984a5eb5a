"""What there is to train on: memory and rates of common devices, and of this machine.

Rates are the makers' for dense products with float32 accumulation; bf16 is None where the hardware has none. What a
training reaches of them is `UTILISATION`; a probe on the device itself is better.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from edgewright.errors import RecipeError
from edgewright.sizes import is_size, parse_bytes

UTILISATION = (0.15, 0.5)
"""Share of the peak rate that a training step reaches: small models on large devices, and large models well fed."""
CPU_SPREAD = (0.4, 1.6)
"""The same about `training.CPU_FLOPS_PER_CORE`, which is of real steps."""
CUDA_CONTEXT = 500 * 2**20
"""What the driver and the loaded kernels take on a GPU, outside of torch's allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a recipe would be trained.

    Args:
        memory: bytes; None where the system does not tell.
        bf16: peak products in bfloat16, operations a second; None without them, or where nobody knows.
        fp32: the same in float32.
        bandwidth: bytes a second.
        here: whether it is this machine's, so that it can be asked.
    """

    name: str
    kind: str
    memory: int | None
    bf16: float | None = None
    fp32: float | None = None
    bandwidth: float | None = None
    here: bool = False

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "kind": self.kind, "memory": self.memory, "here": self.here}


def _gpu(name: str, gigabytes: float, bf16: float | None, fp32: float, bandwidth: float) -> Device:
    """From units of sheets: GiB, 10^12 operations a second, 10^9 bytes a second."""
    return Device(
        name=name,
        kind="cuda",
        memory=int(gigabytes * 2**30),
        bf16=None if bf16 is None else bf16 * 1e12,
        fp32=fp32 * 1e12,
        bandwidth=bandwidth * 1e9,
    )


GPUS = {
    device.name: device
    for device in (
        _gpu("rtx-3060", 12, 25.5, 12.7, 360),
        _gpu("rtx-3070", 8, 40.6, 20.3, 448),
        _gpu("rtx-3080", 10, 59.5, 29.8, 760),
        _gpu("rtx-3090", 24, 71.2, 35.6, 936),
        _gpu("rtx-4060", 8, 30.2, 15.1, 272),
        _gpu("rtx-4060-ti", 16, 44.1, 22.1, 288),
        _gpu("rtx-4070", 12, 58.3, 29.1, 504),
        _gpu("rtx-4080", 16, 97.5, 48.7, 717),
        _gpu("rtx-4090", 24, 165.2, 82.6, 1008),
        _gpu("rtx-5070", 12, 61.7, 30.9, 672),
        _gpu("rtx-5080", 16, 112.6, 56.3, 960),
        _gpu("rtx-5090", 32, 209.5, 104.8, 1792),
        _gpu("rtx-a6000", 48, 154.8, 38.7, 768),
        _gpu("t4", 16, None, 8.1, 320),
        _gpu("v100", 32, None, 15.7, 900),
        _gpu("a10", 24, 125, 31.2, 600),
        _gpu("l4", 24, 121, 30.3, 300),
        _gpu("l40s", 48, 362, 91.6, 864),
        _gpu("a100-40gb", 40, 312, 19.5, 1555),
        _gpu("a100", 80, 312, 19.5, 2039),
        _gpu("h100", 80, 989, 67, 3350),
        _gpu("h200", 141, 989, 67, 4800),
        _gpu("b200", 180, 2250, 80, 8000),
    )
}


def find_device(name: str | None) -> Device:
    """A device of the table, `cpu` or `cuda` for this machine's, or a size such as 24GB; None: what a run would take.

    Raises:
        RecipeError: EW-760, nothing of that name.
    """
    if name is None:
        return _cuda_here() or _cpu_here()
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key in GPUS:
        return GPUS[key]
    if key == "cpu":
        return _cpu_here()
    if is_size(name):
        return Device(name=name.strip(), kind="cuda", memory=parse_bytes(name))
    here = _cuda_here() if key == "cuda" else None
    if here is not None:
        return here
    raise _unknown(name, key)


def _unknown(name: str, key: str) -> RecipeError:
    near = difflib.get_close_matches(key, GPUS, 1)
    return RecipeError(
        "EW-760",
        f"{name!r} is no device that the planner knows",
        expected=f"cpu, cuda where there is one, a size such as 24GB, or one of {', '.join(GPUS)}",
        found=name,
        fix=f"did you mean {near[0]}?" if near else "give the device's memory, such as --device 16GB",
    )


def _cpu_here() -> Device:
    from edgewright.machine import total_memory

    return Device(name="cpu", kind="cpu", memory=total_memory(), here=True)


def known_gpu(name: str) -> Device | None:
    """The one of the table that a driver means by a name such as `NVIDIA A100-SXM4-80GB`; None: none of them.

    Whole words count, and most of them: neither an L40S nor an L40 is an L4, and a 4060 Ti is no 4060.
    """
    words = re.sub(r"nvidia |geforce |tesla ", "", name.lower()).replace(" ", "-") + "-"
    return max(
        (device for key, device in GPUS.items() if words.startswith(f"{key}-")),
        key=lambda device: len(device.name),
        default=None,
    )


def _cuda_here() -> Device | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = known_gpu(properties.name)
    return Device(
        name=properties.name,
        kind="cuda",
        memory=properties.total_memory,
        bf16=None if known is None else known.bf16,
        fp32=None if known is None else known.fp32,
        bandwidth=None if known is None else known.bandwidth,
        here=True,
    )
