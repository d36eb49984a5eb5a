"""What a number was measured on: processor, memory, operating system, package versions. No host names, no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "edgewright",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "gguf",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "llama-cpp-python",
    "openvino",
)


def describe_machine(*, threads: int | None = None, device: str = "cpu") -> dict[str, object]:
    """Describe this machine well enough for somebody else to judge a measurement.

    Args:
        threads: threads that the measurement used; None = all that this process may use.
        device: where the computation ran, `cpu` or the name of an accelerator.

    Returns:
        `{cpu, cores, threads, memory, os, python, device, packages: {name: version}}`; memory in bytes,
        null where the system does not tell.
    """
    return {
        "cpu": processor_name(),
        "cores": available_cores(),
        "threads": available_cores() if threads is None else threads,
        "memory": total_memory(),
        "os": operating_system(),
        "python": platform.python_version(),
        "device": device,
        "packages": package_versions(),
    }


def available_cores() -> int:
    """Logical cores that this process may use (its affinity on Linux, all of them elsewhere)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's model name, else its architecture."""
    if sys.platform == "darwin":
        brand = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout.strip()
        return brand or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{model.group(1).strip()} ({platform.machine()})" if model else platform.machine()


def total_memory() -> int | None:
    """Physical memory in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def operating_system() -> str:
    """Name and version of the operating system."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    kernel = re.match(r"[\d.]+", platform.release())
    name = " ".join(part for part in (platform.system(), kernel.group(0) if kernel else "") if part)
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    except (OSError, KeyError):
        return name


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a number depends on; packages that are not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now; None outside Linux."""
    status = _proc_status()
    return status.get("VmRSS")


def memory_in_use() -> int:
    """Bytes of this process that are in memory now; the peak so far where the system tells no current value."""
    return resident_memory() or peak_memory()


def peak_memory() -> int:
    """The most bytes that this process ever had in memory: VmHWM on Linux, getrusage elsewhere."""
    status = _proc_status()
    if "VmHWM" in status:
        return status["VmHWM"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _proc_status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes; empty where there is no such file."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    found = re.findall(r"^(Vm\w+):\s+(\d+) kB$", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}
