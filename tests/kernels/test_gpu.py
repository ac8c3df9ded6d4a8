"""The GPU kernel where there is no GPU: in Triton's interpreter, compiled to PTX, and refused with a reason."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnpress.config import AttentionSpec
from attnpress.kernels import gpu, ops
from attnpress.kernels.cpu import BackendUnavailableError
from tests.kernels.factories import make_case

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def in_a_process(*command: str, **variables: str) -> str:
    """What a fresh Python prints; its end is shown where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != gpu.INTERPRETER_VARIABLE}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-8000:]
    return ended.stdout


@needs_triton
@pytest.mark.timeout(900)  # half a minute of work, for each test of the suite a limit of its own
def test_integers_equal_the_reference_in_the_interpreter() -> None:
    suite = "tests/kernels/gpu_exactness.py"
    said = in_a_process("-m", "pytest", suite, "--quiet", "-p", "no:cacheprovider", **{gpu.INTERPRETER_VARIABLE: "1"})
    assert " passed" in said
    assert "skipped" not in said


KINDS = {
    "byte products": r"\b(?:wgmma\.mma_async|mma\.sync)\S*\.s8\.s8\b",
    "other products": r"\b(?:wgmma\.mma_async|mma\.sync)(?!\S*\.s8\.s8\b)",
    "float products": r"\bmul\.rn\.f32\b",
    "float sums": r"\b(?:add|sub)\.rn\.f32\b",
    "exact divisions": r"\bdiv\.rn\.f32\b",
    "fused": r"\b(?:fma|mad)\.\S*f(?:16|32|64)\b",
    "fusible": r"\b(?:mul|add|sub)\.f(?:16|32|64)\b",
    "approximate": r"\.(?:approx|full|ftz)\b",
}
"""Instructions by what they mean for the contract: ptxas may join what is not marked `.rn`."""


def count_kinds(text: str) -> dict[str, int]:
    code = re.sub(r"//.*", "", text)
    return {kind: len(re.findall(pattern, code)) for kind, pattern in KINDS.items()}


@needs_triton
def test_the_script_for_a_machine_with_a_gpu_works(tmp_path: Path) -> None:
    record = tmp_path / "device.json"
    in_a_process("benchmarks/device.py", "--tiny", "--only", "inference", "--json", str(record))
    found = json.loads(record.read_text("utf-8"))
    assert found["versions"].keys() >= {"torch", "triton", "attnpress"}
    assert found["inference"][0]["milliseconds"].keys() == {"ours", "sdpa"}
    assert 0 < found["inference"][0]["off_dense"] < 0.3


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Instructions in the PTX for compute capability 9.0, by case and kind."""
    cache = tmp_path_factory.mktemp("triton")
    texts = json.loads(in_a_process("-m", "tests.kernels.ptx", TRITON_CACHE_DIR=str(cache)))
    assert texts
    return {case: count_kinds(text) for case, text in texts.items()}


@needs_triton
def test_products_of_bytes_run_on_tensor_cores(counts: dict[str, dict[str, int]]) -> None:
    for case, found in counts.items():
        assert found["byte products"] > 0, case
        assert found["other products"] == 0, case


@needs_triton
def test_no_float_step_is_fused_or_approximate(counts: dict[str, dict[str, int]]) -> None:
    for case, found in counts.items():
        assert min(found["float products"], found["float sums"], found["exact divisions"]) > 0, case
        assert found["fused"] == found["fusible"] == found["approximate"] == 0, case


def test_counting_sees_each_kind() -> None:
    text = (
        "mul.rn.f32 %f1; add.rn.f32 %f2; div.rn.f32 %f3; fma.rn.f32 %f4; mul.f32 %f5; div.full.f32 %f6; // fma.rn.f32\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%r1}; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {"
    )
    assert count_kinds(text) == dict.fromkeys(KINDS, 1)


def unavailable(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(gpu, "why_unavailable", lambda: reason)


def test_a_gpu_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable(monkeypatch, "torch finds no NVIDIA GPU")
    case = make_case((1, 2, 2, 5, 5, 16), AttentionSpec())
    with pytest.raises(BackendUnavailableError, match="backend 'gpu' cannot run here: torch finds no NVIDIA GPU; use"):
        ops.attention(case, backend="gpu")
    with pytest.raises(BackendUnavailableError, match="torch finds no NVIDIA GPU"):
        ops.check(case.spec, case.scales, 16, "gpu")


def test_the_list_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable(monkeypatch, "triton is not installed (pip install 'attnpress[gpu]')")
    _, listed, _ = ops.backends()
    assert not listed.available
    assert listed.describe().endswith("cannot run here: triton is not installed (pip install 'attnpress[gpu]')")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"triton": False}, "triton is not installed"),
        ({"hip": "7.0"}, "made for NVIDIA GPUs"),
        ({"cuda": False}, "torch finds no NVIDIA GPU"),
        ({"capability": (7, 5)}, "Tesla T4 has compute capability 7.5, and 8.0 is needed"),
        ({}, None),
    ],
    ids=str,
)
def test_reasons(found: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found.get("triton", True) else None)
    monkeypatch.setattr(torch.version, "hip", found.get("hip"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.get("cuda", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found.get("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    said = gpu.why_unavailable()
    assert said == reason if reason is None else reason in str(said)


def test_the_operator_has_a_meta_function_where_nothing_can_run() -> None:
    case = make_case((2, 4, 2, 5, 7, 16), AttentionSpec(), mask="padding")
    scales = (case.scales.q, case.scales.k, case.scales.v)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        query, key, value = (mode.from_tensor(x) for x in (case.query, case.key, case.value))
        found = torch.ops.attnpress.attention_gpu(
            query,
            key,
            value,
            None,
            False,
            0.25,
            *scales,
            None,
            "relative",
            0.0,
            "row",
            127,
            127,
            127,
            255,
            False,
            False,
        )
    assert (found.shape, found.dtype) == ((2, 4, 5, 16), torch.float32)
    assert found.transpose(1, 2).is_contiguous()
