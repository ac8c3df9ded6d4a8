"""What an export refuses, and the packages it asks for."""

from __future__ import annotations

import importlib.util


class ExportError(ValueError):
    """An export that cannot be made, or that did not give what the model gives; the message says what to do."""


def require(extra: str, *packages: str) -> None:
    """Ask for the packages of an extra before any work is done.

    Raises:
        ExportError: one is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"--to {extra} needs {', '.join(missing)}, not installed here: pip install 'attnpress[{extra}]'"
        )
