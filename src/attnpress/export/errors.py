"""Errors of exports, and checks for their packages."""

from __future__ import annotations

import importlib.util


class ExportError(ValueError):
    """An export cannot be made, or does not reproduce the model. The message says what to do."""


def require(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed, before any work is done.

    Raises:
        ExportError: a package is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"--to {extra} needs {', '.join(missing)}, not installed here: pip install 'attnpress[{extra}]'"
        )
