"""docs/never_changes.md: the output of a text is the same bits whatever surrounds it, on every target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from attnpress.kernels import cpu
from attnpress.kernels.cpu import TARGET_VARIABLE
from tests.deployment.unchanging import (
    FULL,
    HASHES,
    TEXTS,
    Around,
    digest,
    hashes,
    outputs,
    sums_are_exact,
    unchanging_model,
)
from tests.kernels.factories import needs_kernel

pytestmark = needs_kernel

ROOT = Path(__file__).parents[2]
HELD: dict[str, dict[str, str]] = {
    "amx": {},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "scalar": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
"""Variables that hold libraries to what our targets are for. They are read once, so each is a process of its own."""

SQUARE = [FULL[0], FULL[4], FULL[8], FULL[10], FULL[14], FULL[15], FULL[20], FULL[21], FULL[25]]
"""Every pair of a batch size, a padding and a number of threads, each once."""


@pytest.mark.parametrize("padding", ["skip", "keep"])
@pytest.mark.parametrize("name", HASHES)
def test_a_text_gets_the_same_bits_whatever_surrounds_it(name: str, padding: Literal["skip", "keep"]) -> None:
    around: list[Around] = SQUARE if name == "BERT, 7 bits" and padding == "skip" else SQUARE[::4]
    assert hashes(name, padding, around) == dict.fromkeys(around, HASHES[name])


def test_the_surroundings_are_every_pair_once() -> None:
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len({(around[one], around[other]) for around in SQUARE}) == 9


def test_neither_order_nor_neighbours_count() -> None:
    model = unchanging_model("BERT")
    backwards = list(range(TEXTS))[::-1]
    assert digest(outputs(model, 7, None, backwards)) == HASHES["BERT, 7 bits"]


def test_sums_are_exact_here() -> None:
    assert sums_are_exact()


@pytest.mark.parametrize("target", cpu.supported_targets() if cpu.is_built() else ["none"])
def test_every_target_gives_the_same_bits(target: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in cpu.ONEDNN_VARIABLES}
    run = subprocess.run(
        [sys.executable, "-m", "tests.deployment.unchanging"], cwd=ROOT, text=True, capture_output=True, check=False,
        env=variables | {TARGET_VARIABLE: target, "PYTHONPATH": os.pathsep.join(sys.path)} | HELD[target],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["target"] == target
    assert found["torch"] == {"avx2": "AVX2", "scalar": "DEFAULT"}.get(target, torch.backends.cpu.get_cpu_capability())
    assert found["exact"]
    assert found["hashes"] == {name: [value] for name, value in HASHES.items()}


def test_the_page_has_the_hashes() -> None:
    page = (ROOT / "docs" / "never_changes.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (.*) \| `([0-9a-f]{64})` \|$", page, re.MULTILINE) == list(HASHES.items())
