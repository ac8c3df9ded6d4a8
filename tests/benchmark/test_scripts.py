"""Scripts of benchmarks/: they import, and their usage names a way by which Python finds their imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_imports_and_says_how_to_run_it(file: Path) -> None:
    module = importlib.import_module(f"benchmarks.{file.stem}")
    usage = (module.__doc__ or "").partition("--")[0]
    # A script that imports another one is found only as a module.
    needed = f"-m benchmarks.{file.stem}" if "from benchmarks." in file.read_text() else f"benchmarks/{file.name}"
    assert needed in usage or f"-m benchmarks.{file.stem}" in usage
