"""Provenance that every record holds: versions of packages, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and the packages, by name.

    Raises:
        PackageNotFoundError: a package is not installed.
    """
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine(**more: Any) -> dict[str, Any]:
    """The operating system and the number of cores, with `more` fields of the record."""
    return {"system": platform.platform(terse=True), "cores": os.cpu_count(), **more}
