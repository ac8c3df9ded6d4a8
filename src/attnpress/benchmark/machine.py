"""Provenance of a timing: versions and machine."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnpress.kernels import cpu
from attnpress.records.provenance import machine, versions

TOLD = ("nncf", "onnxruntime", "openvino", "sageattention", "transformers", "triton")
"""Packages whose versions affect a timing, besides attnpress and torch."""


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of attnpress, torch and `packages`, the machine, and its load."""
    named = [
        "attnpress",
        "torch",
        *(name for name in packages if name in TOLD),
    ]
    return {
        "versions": versions(named),
        "machine": machine(processor=processor(), load=round(os.getloadavg()[0], 1), **_gpu()),
    }


def _gpu() -> dict[str, Any]:
    """The GPU that torch would use; None if there is none."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "gigabytes": round(found.total_memory / 1e9, 1),
    }


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instructions() -> str:
    """Instruction set that torch detects and uses, such as "AVX2" or "AVX512, VNNI"."""
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *(["VNNI"] if cpu.has_vnni() else [])])


def resident_megabytes() -> float:
    """Resident memory of this process, in MB; 0 if /proc does not report it (Linux does)."""
    return _status("VmRSS") if Path("/proc/self/status").exists() else 0.0


def peak_megabytes(run: Callable[[], object]) -> float:
    """Largest resident memory of this process during one call, in MB; 0 if /proc does not report it (Linux does)."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return 0.0
    gc.collect()
    forget.write_text("5", encoding="ascii")  # the peak counts from here
    run()
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1e3


def processor() -> str:
    """The processor's name as the system reports it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
