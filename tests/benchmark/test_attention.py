"""bench: real timings of real kernels on the same inputs, with the sparsity that was asked for or captured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpress.benchmark import sides
from attnpress.benchmark.attention import BenchmarkError, bench, bench_run
from attnpress.benchmark.capture import captured_problems
from attnpress.benchmark.problem import Problem, load_problem, make_problem, save_problem
from attnpress.benchmark.sides import PEERS
from attnpress.config import AttentionSpec, RunConfig, TailName
from attnpress.core.attention import TailedAttention, dense_attention, integer_attention
from attnpress.kernels import cpu
from attnpress.runs.evaluation import reevaluate
from tests.kernels.factories import needs_kernel

pytestmark = needs_kernel

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is an optional peer")
FIELDS = "seq_len batch heads head_dim sparsity threads target peer ours_ms peer_ms ratio spread"


@pytest.fixture(scope="module")
def captured(finished: Path, tiny_recipe: RunConfig) -> list[Problem]:
    return captured_problems(finished, tiny_recipe, rows=6)


def test_records_have_all_fields_and_add_up() -> None:
    peers = ["sdpa", "eager", "sdpa-bf16"]
    timings = bench([32, 48], sparsity=0.5, heads=2, head_dim=16, peers=peers, seconds=0.01)
    assert [(t.seq_len, t.batch, t.peer) for t in timings] == [(s, 8, p) for s in (32, 48) for p in peers]
    for timing in timings:
        assert timing.ratio > 0
        assert (timing.product_ms is not None) == cpu.has_vnni(), "a yardstick only where the library's is a fast one"
        if timing.product_ms is not None:
            assert timing.product_share == pytest.approx(timing.product_ms / timing.ours_ms)
            assert timing.product_ms > 0
        assert timing.target == timing.provenance["ours"]["target"] == cpu.active_target()
        assert timing.provenance["ours"]["threads"] == timing.threads == 1
        assert timing.ours_ms > 0
        assert min(timing.spread, timing.peer_spread) >= 0
        assert timing.provenance["versions"]["torch"] == torch.__version__
    plain = json.loads(json.dumps([dataclasses.asdict(timing) for timing in timings], allow_nan=False))
    assert set(FIELDS.split()) <= plain[0].keys()


@pytest.mark.parametrize(("tail", "rank"), [("mean", None), ("linear", 3), ("linear", 16)])
def test_a_tail_is_timed_beside_the_same_call_without_one(tail: TailName, rank: int | None) -> None:
    timing = bench([32], sparsity=0.9, heads=2, head_dim=16, seconds=0.01, tail=tail, tail_rank=rank or 8)[0]
    assert (timing.peer, timing.tail, timing.tail_rank) == ("no-tail", tail, rank)
    assert min(timing.ours_ms, timing.peer_ms, timing.ratio) > 0
    with pytest.raises(BenchmarkError, match="no peer called 'no-tail'"):
        bench([32], heads=2, head_dim=16, peers=["no-tail"])


def test_the_peer_without_a_tail_has_none_and_ours_has(tmp_path: Path) -> None:
    problem = make_problem(48, 2, 2, 16, 0.9, spec=AttentionSpec(tail="linear", tail_rank=3))
    save_problem(problem, tmp_path / "problem.safetensors")
    read = load_problem(tmp_path / "problem.safetensors")
    p = read.call
    exact = integer_attention(p)
    assert isinstance(exact, TailedAttention)
    bare = integer_attention(p.with_(spec=dataclasses.replace(p.spec, tail="none")))
    ours, theirs = (
        sides.prepare(name, str(tmp_path / "problem.safetensors"), threads=1).run() for name in ("ours", "no-tail")
    )
    assert torch.equal(ours, exact.output)  # type: ignore[arg-type]
    assert torch.equal(theirs, bare.output)  # type: ignore[arg-type]
    assert read.sparsity == problem.sparsity


def test_peers_are_held_to_the_target_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = next((name for name in ("avx2", "scalar") if name in cpu.supported_targets()), "scalar")
    monkeypatch.setenv(cpu.TARGET_VARIABLE, forced)
    timing = bench([16], heads=2, head_dim=16, seconds=0.01)[0]
    assert timing.target == forced
    assert timing.product_ms is timing.product_share is None, "neither has VNNI"
    assert timing.provenance["peer"]["instructions"] == {"avx2": "AVX2", "scalar": "DEFAULT"}[forced]


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_is_timed_with_the_threads_asked_for(threads: int) -> None:
    if hasattr(os, "sched_getaffinity") and threads > len(os.sched_getaffinity(0)):
        pytest.skip("OpenVINO starts no more threads than there are cores for this process")
    timing = bench([32], heads=2, head_dim=16, peers=["openvino"], threads=threads, seconds=0.01)[0]
    assert timing.peer_ms > 0
    assert timing.threads == timing.provenance["peer"]["threads"] == threads


@pytest.mark.parametrize("asked", [0.0, 0.5, 0.9, 0.95])
def test_synthetic_inputs_have_the_sparsity_they_state(asked: float) -> None:
    problem = make_problem(256, 1, 4, 64, asked)
    p = problem.call
    codes = integer_attention(p).p_codes
    assert problem.sparsity == pytest.approx(float((codes == 0).float().mean()), abs=1e-9)
    assert problem.sparsity == pytest.approx(asked, abs=0.01)


def test_a_problem_is_read_as_it_was_written(captured: list[Problem], tmp_path: Path) -> None:
    for problem in (make_problem(16, 2, 2, 16, 0.0), captured[1]):
        save_problem(problem, tmp_path / "problem.safetensors")
        read = load_problem(tmp_path / "problem.safetensors")
        assert read.call.query.stride() == problem.call.query.stride()
        assert torch.equal(sides._ours(read)(), sides._ours(problem)())  # type: ignore[arg-type]
        assert (read.call.spec, read.call.scaling) == (problem.call.spec, problem.call.scaling)
        for field in ("sparsity", "source", "layer"):
            assert getattr(read, field) == getattr(problem, field)


@pytest.mark.parametrize("name", [*(name for name in PEERS if name != "openvino"), pytest.param("openvino", marks=needs_openvino)])  # fmt: skip # noqa: E501
@pytest.mark.parametrize("kind", ["synthetic", "captured"])
def test_peers_compute_the_attention_of_the_same_inputs(
    name: str, kind: str, captured: list[Problem], tmp_path: Path
) -> None:
    problem = captured[0] if kind == "captured" else make_problem(48, 2, 2, 16, 0.5)
    assert (problem.call.valid is None) == (kind == "synthetic")
    save_problem(problem, tmp_path / "problem.safetensors")
    found: Any = sides.prepare(name, str(tmp_path / "problem.safetensors"), threads=torch.get_num_threads()).run()
    output = torch.from_numpy(found[0].copy()) if name == "openvino" else found.float()
    p = problem.call
    exact = dense_attention(p.query, p.key, p.value, p.valid, p.scaling)
    real = exact.abs().amax(-1, keepdim=True) > 0 if p.valid is None else p.valid.diagonal(0, -2, -1).unsqueeze(-1) if p.valid.shape[2] > 1 else p.valid.mT  # fmt: skip # noqa: E501
    off = ((output - exact) * real).norm() / (exact * real).norm()
    assert off < (0.1 if name == "openvino" else 0.01)


@needs_openvino
def test_openvino_fuses_attention_to_int8(captured: list[Problem], tmp_path: Path) -> None:
    if "avx512vnni" not in cpu.supported_targets():
        pytest.skip("its CPU plugin fuses int8 attention on AVX-512 VNNI and later")
    for problem in (make_problem(48, 2, 2, 16, 0.5), captured[0]):
        save_problem(problem, tmp_path / "problem.safetensors")
        facts = sides.prepare("openvino", str(tmp_path / "problem.safetensors"), threads=1).facts
        assert [node for node in facts["executed"] if node.endswith("_i8")] == ["Subgraph jit_avx512_i8"]
        assert not [node for node in facts["executed"] if node.startswith(("MatMul", "Softmax"))]


def test_the_bare_product_multiplies_every_row_with_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (torch.randint(-127, 128, (3, 40, 16), dtype=torch.int8) for _ in range(2))
    done: list[Tensor] = []
    multiply = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: done.append(multiply(a, b, out=out).clone()))
    sides._blocked_product(query, key, block=32)()
    heads = [torch.cat([torch.cat(done[4 * h + 2 * i : 4 * h + 2 * i + 2], 1) for i in range(2)]) for h in range(3)]
    assert torch.equal(torch.stack(heads), (query.double() @ key.double().mT).int())


def test_captured_inputs_are_what_the_trained_model_computes_with(captured: list[Problem]) -> None:
    assert [problem.layer for problem in captured] == [f"bert.encoder.layer.{n}.attention.self" for n in (0, 1)]
    for problem in captured:
        p = problem.call
        assert p.query.shape == (6, 2, p.valid.shape[-1], 16)  # type: ignore[union-attr]
        integers = integer_attention(p)
        assert torch.equal(sides._ours(problem)(), integers.output)  # type: ignore[arg-type]
        assert p.cutoff is not None
        assert p.cutoff.isfinite().all()


def test_captured_sparsity_is_that_of_the_record(finished: Path, tiny_recipe: RunConfig) -> None:
    problems = captured_problems(finished, tiny_recipe, rows=80)
    layers = reevaluate(finished, tiny_recipe).layers
    for problem, layer in zip(problems, layers, strict=True):
        assert problem.sparsity == pytest.approx(layer.sparsity, abs=1e-3), "a code may differ by rounding"


def test_a_run_is_timed_layer_by_layer(finished: Path, tiny_recipe: RunConfig) -> None:
    timings = bench_run(finished, tiny_recipe, rows=4, seconds=0.01)
    assert [(t.batch, t.heads, t.head_dim, t.source) for t in timings] == [(4, 2, 16, str(finished))] * 2
    assert len({t.layer for t in timings}) == 2
    one = bench_run(finished, tiny_recipe, rows=4, layers=[1], seconds=0.01)
    assert [(t.layer, t.sparsity) for t in one] == [(timings[1].layer, timings[1].sparsity)]
    with pytest.raises(BenchmarkError, match=r"has 2 compressed layers, counted from 0; no \[2\]"):
        bench_run(finished, tiny_recipe, layers=[0, 2])


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"pip install 'attnpress\[openvino\]'"):
        bench([16], peers=["openvino"])


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"threads: this process has \d+ cores?, found 4096"):
        bench([16], threads=4096)


@pytest.mark.parametrize(
    "wrong",
    [{"seq_lens": [0]}, {"seq_lens": [16], "threads": 0}, {"seq_lens": []}, {"seq_lens": [16], "batch": 0}],
)
def test_lengths_and_threads_start_at_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkError, match="starts at 1"):
        bench(**wrong)
