"""csrc/hold_avx2.sh: a command runs as on a processor that ends at AVX2, and faults are still told as they were."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = Path("/proc/cpuinfo").read_text("utf-8").split() if Path("/proc/cpuinfo").is_file() else []
SAYS = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.cpu._is_vnni_supported())"
FREE = {name: text for name, text in os.environ.items() if not name.startswith(("ATTNPRESS", "ATEN", "ONEDNN"))}

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="holds x86-64 processors, on Linux"
)
needs_faulting = pytest.mark.skipif(
    "cpuid_fault" not in FLAGS or not ({"avx512f", "avx_vnni"} & set(FLAGS)) or shutil.which("cc") is None,
    reason="no C compiler, no CPUID faulting, or nothing to hold",
)


def held(script: Path, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(script), sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env={**FREE, **variables})


@needs_faulting
def test_libraries_and_children_find_a_processor_without_vnni() -> None:
    child = (
        f"import faulthandler, subprocess, sys; faulthandler.enable(); subprocess.run([sys.executable, '-c', '{SAYS}'])"
    )
    assert held(CSRC / "hold_avx2.sh", f"{child}; {SAYS}").stdout == "AVX2 False\n" * 2


@pytest.mark.skipif(not {"cpuid_fault", "amx_tile", "avx512_vnni"} <= set(FLAGS), reason="no AMX to do without")
def test_libraries_find_vnni_without_amx() -> None:
    says = "import torch; print(torch.cpu._is_vnni_supported(), torch.cpu._is_amx_tile_supported())"
    assert held(CSRC / "hold_avx2.sh", says, HOLD_TO="avx512vnni").stdout == "True False\n"


@pytest.mark.skipif("avx512_vnni" in FLAGS, reason="nothing to refuse here")
def test_vnni_is_refused_where_there_is_none() -> None:
    found = held(CSRC / "hold_avx2.sh", SAYS, HOLD_TO="avx512vnni")
    assert (found.returncode, found.stdout) == (2, "")
    assert "needs a processor with AVX-512 VNNI" in found.stderr


def test_another_processor_than_these_is_refused() -> None:
    found = held(CSRC / "hold_avx2.sh", SAYS, HOLD_TO="sse")
    assert found.returncode == 2
    assert "HOLD_TO is avx2 or avx512vnni, found sse" in found.stderr


@needs_faulting
def test_faults_that_are_not_cpuid_go_where_they_went() -> None:
    enabled = "import faulthandler; faulthandler.enable(); "
    for program in (enabled + "faulthandler._sigsegv()", "import ctypes; ctypes.string_at(0)"):
        found = held(CSRC / "hold_avx2.sh", program)
        assert found.returncode == -signal.SIGSEGV
        assert ("Fatal Python error: Segmentation fault" in found.stderr) == ("faulthandler" in program)
    assert held(CSRC / "hold_avx2.sh", "import os; os.kill(os.getpid(), 11)").returncode == -signal.SIGSEGV
    caught = "import os, signal; signal.signal(11, lambda number, _: print(number)); os.kill(os.getpid(), 11)"
    assert held(CSRC / "hold_avx2.sh", caught).stdout == "11\n"


@pytest.mark.skipif(not ({"avx512f", "avx_vnni"} & set(FLAGS)), reason="nothing to hold")
def test_without_a_compiler_variables_hold_what_listens_to_them(tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    found = held(tmp_path / "csrc" / "hold_avx2.sh", SAYS, CC="false")
    assert found.stdout.split()[0] == "AVX2"
    assert (
        found.stderr == "held to AVX2: by variables alone (no CPUID faulting here), which ONNX Runtime does not know\n"
    )
