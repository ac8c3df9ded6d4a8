"""bench: real timings of real kernels, with the sparsity that was asked for."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch

from attnpress.benchmark import PEERS, BenchmarkError, as_records, bench, make_problem, measured_sparsity
from attnpress.kernels import cpu
from tests.kernels.factories import needs_kernel

pytestmark = needs_kernel


def test_records_have_all_fields_and_add_up() -> None:
    before = torch.get_num_threads()
    timings = bench([32, 48], sparsity=0.5, heads=2, head_dim=16, peers=["sdpa", "eager", "sdpa-bf16"], seconds=0.01)
    assert torch.get_num_threads() == before
    assert [(t.seq_len, t.peer) for t in timings] == [(s, p) for s in (32, 48) for p in ("sdpa", "eager", "sdpa-bf16")]
    for timing in timings:
        assert timing.ratio == pytest.approx(timing.peer_ms / timing.ours_ms)
        assert timing.target == cpu.active_target()
        assert timing.ours_ms > 0
        assert timing.spread >= 0
    fields = "seq_len batch heads head_dim sparsity threads target peer ours_ms peer_ms ratio spread"
    assert list(json.loads(json.dumps(as_records(timings)))[0]) == fields.split()


@pytest.mark.parametrize("asked", [0.5, 0.9, 0.95])
def test_synthetic_inputs_have_the_sparsity_they_state(asked: float) -> None:
    assert measured_sparsity(make_problem(256, 1, 4, 64, asked)) == pytest.approx(asked, abs=0.01)


def test_unknown_peer_is_named() -> None:
    with pytest.raises(BenchmarkError, match=f"no peer called flash; use some of {', '.join(PEERS)}"):
        bench([16], peers=["flash"])


@pytest.mark.parametrize("wrong", [{"seq_lens": [0]}, {"seq_lens": [16], "threads": 0}])
def test_lengths_and_threads_start_at_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkError, match="start at 1"):
        bench(**wrong)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match="pip install openvino"):
        bench([16], peers=["openvino"])


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is an optional peer")
def test_openvino_peer() -> None:
    assert bench([32], heads=2, head_dim=16, peers=["openvino"], seconds=0.01)[0].peer_ms > 0
