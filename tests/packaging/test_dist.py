"""The wheel of `make dist`, installed in a new environment without a compiler, runs the kernel's tests.

`make test-dist` sets ATTNPRESS_DIST to the folder of the wheel and the source distribution.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = os.environ.get("ATTNPRESS_DIST")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
KERNEL = "attnpress/kernels/_attention.abi3.so"

pytestmark = [
    pytest.mark.skipif(DIST is None, reason="no distribution to test: `make test-dist` builds it"),
    pytest.mark.timeout(600),
]


def only(pattern: str) -> Path:
    (found,) = (ROOT / str(DIST)).glob(pattern)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel, which borrows the packages that it needs: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    wheel = str(only("*.whl"))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", wheel],
        env=without_checkout(), check=True,
    )  # fmt: skip
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return folder


def without_checkout() -> dict[str, str]:
    """The variables of this process, less those that lead to the checkout or to a compiler."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC")}


def run(environment: Path, *words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A program of the environment, where no compiler and no checkout is in reach."""
    return subprocess.run(
        [str(environment / "bin" / words[0]), *words[1:]],
        cwd=folder, env=without_checkout() | {"PATH": str(environment / "bin")}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_wheel_is_for_one_abi_and_many_linux_systems() -> None:
    wheel = only("*.whl")
    assert re.fullmatch(rf"attnpress-{re.escape(VERSION)}-cp311-abi3-manylinux_2_\d+_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        size = archive.getinfo(KERNEL).file_size
    assert libraries == [KERNEL], "no library of torch or of the compiler goes along"
    assert size < 4 * 2**20, "debugging symbols are left out"


def test_the_source_distribution_holds_what_a_build_needs() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "src", "csrc", "pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    with tarfile.open(only("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path for path in tracked if not Path(path).name.startswith(".")} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_the_installed_package_is_that_of_the_wheel(environment: Path) -> None:
    done = run(environment, "python", "-I", "-c", "import attnpress; print(attnpress.__file__)")
    assert done.stdout.startswith(str(environment)), done.stderr


def test_the_command_lists_the_kernel(environment: Path) -> None:
    done = run(environment, "attnpress", "ls", "backends")
    assert re.search(r"^cpu +the compiled kernel; targets .*; runs \w+$", done.stdout, re.MULTILINE), done


def test_the_quickstart_of_the_readme_runs(environment: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "my-bert")
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line]) <= 8
    done = run(environment, "python", "-c", block[1], folder=tmp_path)
    assert re.search(r"^tensor\(\[[01], [01]\]\)$", done.stdout, re.MULTILINE), done.stderr
    assert (tmp_path / "compressed" / "model.safetensors").is_file()


def test_the_kernel_of_the_wheel_passes_its_tests(environment: Path) -> None:
    tests = [f"tests/kernels/{name}.py" for name in ("test_ops", "test_cpu", "test_packed")]
    done = run(environment, "python", "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d\d+ passed", done.stdout)
