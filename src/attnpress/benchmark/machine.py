"""What a time rests on: versions and machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of attnpress, torch and those of `packages` that have one to tell, the machine, and how busy it is."""
    named = ["attnpress", "torch", *(name for name in packages if name in ("openvino", "transformers"))]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in named}},
        "machine": {
            "system": platform.platform(terse=True),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        },
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
