"""bench: time the compiled attention kernel against the best that users have today, on the same inputs.

Ours and one peer alternate, call by call, and medians are compared, so that both see the same machine. OpenVINO keeps
worker threads of its own that spin and slow torch's, so with more than one thread it is timed in a process of its own,
ours with it in turns of whole processes.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnpress.config import AttentionSpec
from attnpress.core.attention import Scales
from attnpress.core.quantizer import positive_scale
from attnpress.kernels import cpu, ops

PEERS = ("sdpa", "sdpa-bf16", "eager", "openvino")
SECONDS = 2.0
"""How long each pair is timed, at least seven calls."""

Run = Callable[[], object]


class BenchmarkError(ValueError):
    """A comparison that cannot be run; the message says why, and what to do."""


@dataclass(frozen=True)
class Timing:
    """One comparison.

    Times are medians in milliseconds; ratio is peer over ours; spread is the distance between the quartiles of our
    times, as a fraction of their median.
    """

    seq_len: int
    batch: int
    heads: int
    head_dim: int
    sparsity: float
    threads: int
    target: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    spread: float


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention call: query, key, value [B, H, S, D] as models store them, scales, cutoff [H]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scales: Scales
    cutoff: Tensor | None
    spec: AttentionSpec

    @property
    def scaling(self) -> float:
        """1 / sqrt(D)."""
        return float(self.query.shape[-1] ** -0.5)


def bench(
    seq_lens: Iterable[int], *, sparsity: float = 0.95, batch: int | None = None, heads: int = 12, head_dim: int = 64,
    threads: int = 1, peers: Iterable[str] = ("sdpa",), seconds: float = SECONDS,
) -> list[Timing]:  # fmt: skip
    """Time synthetic attention of a stated sparsity.

    Args:
        seq_lens: tokens; each length is timed against each peer.
        sparsity: fraction of pairs pruned; the cutoff of each head is fitted to it on the inputs themselves.
        batch: None picks one that makes about 1,536 tokens, at most 8.
        threads: of torch, and of OpenVINO.
        peers: of PEERS.

    Raises:
        BenchmarkError: an unknown peer, or one whose package is not installed; a length or thread count below 1; a
            sparsity outside [0, 1).
        BackendUnavailableError: the kernel is not built.
    """
    names, lengths = list(peers), list(seq_lens)
    _check(names, lengths, threads, sparsity)
    cpu.load()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [
            _compare(
                make_problem(length, batch or _usual_batch(length), heads, head_dim, sparsity), name, threads, seconds
            )
            for length in lengths
            for name in names
        ]
    finally:
        torch.set_num_threads(before)


def make_problem(length: int, batch: int, heads: int, head_dim: int, sparsity: float, seed: int = 0) -> Problem:
    """Normal Q, K, V with absmax scales, and the cutoff that prunes `sparsity` of the pairs, on a sample of rows."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, length, heads, head_dim, generator=generator).transpose(1, 2) for _ in range(3)
    )
    spec = AttentionSpec(sparsity=sparsity)
    scales = Scales(*(positive_scale(x.abs().amax((0, 2, 3), keepdim=True) / 127) for x in (query, key, value)))
    if sparsity == 0:
        return Problem(query, key, value, scales, None, spec)
    scores = query[0, :, :: max(1, length // 64)] @ key[0].mT * head_dim**-0.5
    below = (scores.amax(-1, keepdim=True) - scores).flatten(1).sort(-1).values
    return Problem(query, key, value, scales, below[:, round((1 - sparsity) * (below.shape[1] - 1))].contiguous(), spec)


def _check(peers: list[str], lengths: list[int], threads: int, sparsity: float) -> None:
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise BenchmarkError(f"no peer called {', '.join(unknown)}; use some of {', '.join(PEERS)}")
    if "openvino" in peers and importlib.util.find_spec("openvino") is None:
        raise BenchmarkError(
            "peer openvino: the package is not installed; pip install openvino, or leave this peer out"
        )
    if threads < 1 or min(lengths, default=1) < 1:
        raise BenchmarkError(f"lengths and threads start at 1, found lengths {lengths} and {threads} threads")
    if not 0 <= sparsity < 1:
        raise BenchmarkError(f"sparsity is the fraction of pairs pruned, from 0 to below 1, found {sparsity}")


def measured_sparsity(problem: Problem) -> float:
    """Fraction of pairs whose P code is zero in the first batch element."""
    p = problem
    first = ops.compiled_integers(p.query[:1], p.key[:1], p.value[:1], None, p.scales, p.cutoff, p.spec, p.scaling)
    return float((first["p_codes"] == 0).float().mean())


def _usual_batch(length: int) -> int:
    return max(1, min(8, 1536 // length))


def _compare(problem: Problem, peer: str, threads: int, seconds: float) -> Timing:
    ours = _ours(problem)
    if peer == "openvino" and threads > 1:
        ours_ms, peer_ms = _in_turns(problem, threads, seconds)
    else:
        ours_ms, peer_ms = _alternate(ours, _peer(peer, problem, threads), seconds)
    batch, heads, length, dim = problem.query.shape
    low, middle, high = statistics.quantiles(ours_ms, n=4)
    theirs = statistics.median(peer_ms)
    return Timing(
        length, batch, heads, dim, round(measured_sparsity(problem), 4), threads, cpu.active_target(), peer,
        middle, theirs, theirs / middle, (high - low) / middle,
    )  # fmt: skip


def _alternate(ours: Run, peer: Run, seconds: float) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for run in (ours, peer, ours, peer):
        run()  # warm caches and lazy initialisation
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 7:
        for run, found in zip((ours, peer), times, strict=True):
            start = time.perf_counter()
            run()
            found.append((time.perf_counter() - start) * 1e3)
    return times


def _ours(problem: Problem) -> Run:
    p = problem
    return lambda: ops.attention(p.query, p.key, p.value, None, p.scales, p.cutoff, p.spec, p.scaling)


def _peer(name: str, problem: Problem, threads: int) -> Run:
    q, k, v = problem.query, problem.key, problem.value
    if name == "sdpa":
        return lambda: scaled_dot_product_attention(q, k, v)
    if name == "sdpa-bf16":
        low_q, low_k, low_v = (x.bfloat16() for x in (q, k, v))
        return lambda: scaled_dot_product_attention(low_q, low_k, low_v)
    if name == "eager":
        return lambda: torch.softmax(q @ k.mT * problem.scaling, -1) @ v
    return _openvino(problem, threads)


def _openvino(problem: Problem, threads: int) -> Run:
    """Int8 attention as OpenVINO's CPU plugin fuses it: FakeQuantize on Q, K, V and P."""
    import numpy as np
    import openvino as ov  # type: ignore[import-not-found]
    from openvino import opset13 as op

    arrays = [x.contiguous().numpy() for x in (problem.query, problem.key, problem.value)]

    def quantized(x: ov.Output, low: float, high: float, levels: int) -> ov.Output:
        bounds = [op.constant(np.array(bound, np.float32)) for bound in (low, high, low, high)]
        return op.fake_quantize(x, *bounds, levels)

    inputs = [op.parameter(array.shape, np.float32) for array in arrays]
    q, k, v = (quantized(x, -abs(a).max(), abs(a).max(), 255) for x, a in zip(inputs, arrays, strict=True))
    scores = op.multiply(op.matmul(q, k, False, True), op.constant(np.array(problem.scaling, np.float32)))
    probs = quantized(op.softmax(scores, 3), 0.0, 1.0, 256)
    model = ov.Model([op.matmul(probs, v, False, False)], inputs)
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    request = compiled.create_infer_request()
    return lambda: request.infer(arrays)


_TURN = """
import json, sys, torch
from attnpress import benchmark
shape, threads, name, seconds = json.loads(sys.argv[1])
torch.set_num_threads(threads if name == "ours" else 1)
problem = benchmark.make_problem(*shape)
run = benchmark._ours(problem) if name == "ours" else benchmark._openvino(problem, threads)
print(json.dumps(benchmark._alternate(run, lambda: None, seconds)[0]))
"""


def _in_turns(problem: Problem, threads: int, seconds: float, turns: int = 3) -> tuple[list[float], list[float]]:
    batch, heads, length, dim = problem.query.shape
    shape = (length, batch, heads, dim, problem.spec.sparsity)
    times: dict[str, list[float]] = {"ours": [], "openvino": []}
    for name in ("ours", "openvino") * turns:
        argument = json.dumps([shape, threads, name, seconds / turns])
        done = subprocess.run([sys.executable, "-c", _TURN, argument], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"timing {name} in its own process failed: {done.stderr.strip().splitlines()[-1]}")
        times[name] += json.loads(done.stdout)
    return times["ours"], times["openvino"]


def as_records(timings: Iterable[Timing]) -> list[dict[str, object]]:
    """Plain data for JSON, in the order of the fields of `Timing`."""
    return [asdict(timing) for timing in timings]
