"""Validation and the choice of a backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnpress.config import AttentionSpec, TensorSpec
from attnpress.core.call import Scales
from attnpress.kernels import cpu, ops
from attnpress.kernels.cpu import BackendUnavailableError
from tests.kernels.factories import make_case, needs_kernel


def test_reference_backend_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    case = make_case((1, 2, 2, 5, 5, 16), AttentionSpec())
    output = ops.attention(case, backend="reference")
    assert torch.equal(output, case.integer().output)
    assert [(backend.name, backend.available) for backend in ops.backends()][::2] == [
        ("cpu", False),
        ("reference", True),
    ]


def test_a_missing_kernel_is_listed_with_the_ways_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    listed = ops.backends()[0].describe()
    assert "cannot run here: the CPU kernel is not built: install the wheel" in listed
    assert "make kernel" in listed
    assert "pip install ." in listed


def test_a_library_for_a_newer_torch_says_which_one_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_attention.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    cpu.load.cache_clear()
    assert "it needs torch 2.10 or newer, and torch 2.9.1+cpu is installed" in str(ops.backends()[0].reason)
    monkeypatch.undo()
    cpu.load.cache_clear()


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    cpu.load.cache_clear()
    case = make_case((1, 2, 2, 5, 5, 16), AttentionSpec())
    with pytest.raises(BackendUnavailableError, match="make kernel"):
        ops.attention(case, backend="cpu")
    monkeypatch.undo()
    cpu.load.cache_clear()
    with pytest.raises(ValueError, match="'tpu' does not exist; use one of cpu, gpu, reference"):
        ops.attention(case, backend="tpu")


def test_a_broken_library_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_attention.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    cpu.load.cache_clear()
    with pytest.raises(BackendUnavailableError, match="does not load"):
        cpu.load()
    monkeypatch.undo()
    cpu.load.cache_clear()


@needs_kernel
def test_backends_lists_targets_best_first() -> None:
    compiled, _, reference = ops.backends()
    assert compiled.name == "cpu"
    assert compiled.targets[-1] == "scalar"
    assert compiled.active_target in compiled.targets
    assert reference == ops.Backend("reference", available=True)


@needs_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": AttentionSpec(rule="mass", sparsity=0.5)}, "no kernel for rule 'mass'"),
        (
            {"spec": AttentionSpec(rule="nm", sparsity=0.5)},
            "no kernel for rule 'nm', only for .*; use backend 'reference'",
        ),
        ({"spec": AttentionSpec(v=TensorSpec(bits=None))}, "set bits for all"),
        ({"scales": Scales()}, "q, k, v: no scale yet"),
        (
            {"query": torch.zeros(1, 2, 5, 18), "key": torch.zeros(1, 2, 5, 18), "value": torch.zeros(1, 2, 5, 18)},
            "head size 18",
        ),
        ({"query": torch.zeros(1, 2, 5, 16, dtype=torch.float64)}, "query: .* found torch.float64"),
        ({"key": torch.zeros(1, 2, 6, 16)}, "do not fit together"),
        ({"valid": torch.zeros(1, 1, 5, 5)}, "valid: a bool mask"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change: dict[str, object], message: str) -> None:
    case = make_case((1, 2, 2, 5, 5, 16), AttentionSpec()).with_(**change)
    with pytest.raises(ValueError, match=message):
        ops.attention(case)


@needs_kernel
def test_strides_of_any_kind() -> None:
    case = make_case((1, 2, 2, 6, 6, 16), AttentionSpec(sparsity=0.5), cutoff=2.0)
    scattered = torch.randn(1, 2, 16, 6).mT  # the last dimension is not contiguous
    case = case.with_(query=scattered, valid=torch.rand(6, 1) > 0.5)
    assert torch.equal(ops.attention(case), case.integer().output)
