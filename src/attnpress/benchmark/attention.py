"""bench: one call of attention on the compiled kernel against existing implementations, on the same inputs."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.benchmark.machine import cores, provenance
from attnpress.benchmark.problem import Problem, make_problem, save_problem
from attnpress.benchmark.sides import PEERS, UNTAILED
from attnpress.benchmark.turns import Side, in_turns, median_of, paired_ratio, spread
from attnpress.config import LARGEST_HEAD, AttentionSpec, RunConfig, TailName
from attnpress.kernels import cpu

SECONDS = 4.0
"""How long each side of each problem is timed."""

HELD = {
    "amx": {},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1"},  # no AMX
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
"""Environment variables that restrict torch and OpenVINO to a target's instructions, by target."""


NEVER_HELD = ("onnxruntime-int8",)
"""Peers that always use all instructions of the processor."""


class BenchmarkError(ValueError):
    """A comparison cannot be run. The message gives the reason and says what to do."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our side compared with a peer, on the same inputs.

    Attributes:
        sparsity: measured over valid pairs.
        target: of the kernel; ATTNPRESS_CPU_TARGET restricts peers to its instructions.
        ours_ms, peer_ms: medians, in milliseconds.
        ratio: peer over ours, turn by turn; see `turns.paired_ratio`.
        spread, peer_spread: interquartile range of the times, as a fraction of their median.
        provenance: versions, machine, and the instructions that the peer's process reported.
    """

    seq_len: int
    batch: int
    sparsity: float
    threads: int
    target: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    spread: float
    peer_spread: float
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Timing(Comparison):
    """A comparison of single calls of attention.

    Attributes:
        product_ms: the bare integer product Q K^T by torch._int_mm, without quantization, packing, softmax or P V. None
            without VNNI, where it is slower than attention.
        product_share: product_ms over ours_ms; 1 would be a kernel that does everything else in no time.
        source, layer: "synthetic" and None, or the run folder and the module of the captured inputs.
        tail, tail_rank: of our side; for peer "no-tail", 1 / ratio is the cost of the tail.
    """

    heads: int
    head_dim: int
    product_ms: float | None
    product_share: float | None
    source: str
    layer: str | None
    tail: TailName = "none"
    tail_rank: int | None = None


def bench(
    seq_lens: Iterable[int],
    *,
    sparsity: float = 0.95,
    batch: int | None = None,
    heads: int = 12,
    head_dim: int = 64,
    threads: int = 1,
    peers: Iterable[str] | None = None,
    seconds: float = SECONDS,
    tail: TailName = "none",
    tail_rank: int = LARGEST_HEAD,
) -> list[Timing]:
    """Time synthetic attention at a given sparsity.

    Args:
        seq_lens: tokens; each length is timed against each peer.
        sparsity: fraction of pairs pruned; the cutoff of each head is fitted to it on the inputs.
        batch: None selects one of about 1,536 tokens, at most 8.
        threads: of each side.
        peers: of PEERS, or "no-tail", the same call without its tail. None selects "no-tail" if there is a tail, else
            "sdpa".
        seconds: timing of each side, at least seven calls.
        tail, tail_rank: see `config.AttentionSpec`; directions are fitted to the inputs.

    Raises:
        BenchmarkError: an unknown peer, or one whose package is not installed; a number out of its range.
        BackendUnavailableError: the kernel is not built.
        SideError: a side failed.
    """
    names, lengths = list(peers or ([UNTAILED] if tail != "none" else ["sdpa"])), list(seq_lens)
    check_peers(names, (*PEERS, UNTAILED) if tail != "none" else PEERS)
    check_counts(lengths=lengths, threads=[threads], batch=[1 if batch is None else batch])
    check_threads(threads)
    check_sparsity(sparsity)
    cpu.load()
    spec = AttentionSpec(tail=tail, tail_rank=tail_rank)
    problems = (
        make_problem(length, usual_batch(length) if batch is None else batch, heads, head_dim, sparsity, spec=spec)
        for length in lengths
    )
    return _compare(problems, names, threads, seconds)


def bench_run(
    run_folder: Path,
    config: RunConfig,
    *,
    layers: Sequence[int] | None = None,
    rows: int = 8,
    threads: int = 1,
    peers: Iterable[str] = ("sdpa",),
    seconds: float = SECONDS,
) -> list[Timing]:
    """Time attention on the inputs that a finished run's model produces for its first evaluation rows.

    Args:
        run_folder, config: the run.
        layers: numbers of attention modules in the order of the model, from 0; None selects all.
        rows: evaluation rows, in one batch padded to the longest.
        threads, peers, seconds: see `bench`.

    Raises:
        BenchmarkError: as for `bench`; a layer does not exist; or the run compresses nothing.
        ConfigError: the run has no compressed model yet.
    """
    from attnpress.benchmark.capture import captured_problems

    names = list(peers)
    check_peers(names, PEERS)
    check_counts(rows=[rows], threads=[threads])
    check_threads(threads)
    cpu.load()
    problems = captured_problems(run_folder, config, rows)
    chosen = range(len(problems)) if layers is None else layers
    missing = [layer for layer in chosen if layer not in range(len(problems))]
    if missing or not problems:
        raise BenchmarkError(f"{run_folder}: has {len(problems)} compressed layers, counted from 0; no {missing}")
    return _compare((problems[layer] for layer in chosen), names, threads, seconds)


def check_peers(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise BenchmarkError for a peer that does not exist, or is not installed."""
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise BenchmarkError(f"no peer called {', '.join(unknown)!r}; use some of {', '.join(known)}")
    if "openvino" in names:
        require("openvino", "openvino", "openvino")


def require(peer: str, extra: str, *packages: str) -> None:
    """Raise BenchmarkError, naming the extra, if a package of a peer is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise BenchmarkError(
            f"peer {peer}: {', '.join(missing)} not installed here; pip install 'attnpress[{extra}]', or leave this "
            "peer out"
        )


def check_counts(**counts: Sequence[int]) -> None:
    """Raise BenchmarkError for a number below 1."""
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise BenchmarkError(f"{name}: starts at 1, found {', '.join(map(str, values)) or 'none'}")


def check_threads(threads: int) -> None:
    """Raise BenchmarkError for more threads than this process has cores."""
    if threads > cores():
        raise BenchmarkError(f"threads: this process has {cores()} core{'s' * (cores() > 1)}, found {threads}")


def check_held(peers: Iterable[str]) -> None:
    """Raise BenchmarkError for a peer that would use more instructions than the forced target."""
    best = cpu.supported_targets()[0]
    if cpu.active_target() != best and (free := [name for name in peers if name in NEVER_HELD]):
        raise BenchmarkError(
            f"peer {free[0]}: has no setting that holds it to {cpu.active_target()}, and would run as on {best}; "
            "hold all to AVX2 with csrc/hold_avx2.sh attnpress bench ..., or leave this peer out"
        )


def check_sparsity(sparsity: float) -> None:
    """Raise BenchmarkError for a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise BenchmarkError(f"sparsity is the fraction of pairs pruned, from 0 to below 1, found {sparsity}")


def usual_batch(length: int) -> int:
    """A batch of about 1,536 tokens, at most 8 rows."""
    return max(1, min(8, 1536 // length))


def held() -> dict[str, str]:
    """Environment that restricts peers to the target's instructions, if ATTNPRESS_CPU_TARGET forces one."""
    return HELD[cpu.active_target()] if os.environ.get(cpu.TARGET_VARIABLE) else {}


def compared(times: Mapping[str, Sequence[Sequence[float]]], peer: str, target: str) -> dict[str, Any]:
    """The fields of `Comparison` that follow from the times of "ours", on that target, and of the peer."""
    ours, theirs = times["ours"], times[peer]
    return {
        "target": target,
        "peer": peer,
        "ours_ms": median_of(ours),
        "peer_ms": median_of(theirs),
        "ratio": paired_ratio(theirs, ours),
        "spread": spread(ours),
        "peer_spread": spread(theirs),
    }


def _compare(problems: Iterable[Problem], peers: Sequence[str], threads: int, seconds: float) -> list[Timing]:
    yardstick = ["product"] if cpu.has_vnni() else []
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, held())) for name in ("ours", *yardstick, *dict.fromkeys(peers))]
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "problem.safetensors"
        return [timing for problem in problems for timing in _timings(problem, file, sides, peers, threads, seconds)]


def _timings(
    problem: Problem, file: Path, sides: Sequence[Side], peers: Sequence[str], threads: int, seconds: float
) -> Iterator[Timing]:
    save_problem(problem, file)
    make = "attnpress.benchmark.sides:prepare"
    facts = {side.name: side.prepare(make, name=side.name, file=str(file), threads=threads) for side in sides}
    times = in_turns(sides, seconds)
    for peer in peers:
        yield _timing(problem, peer, threads, times, facts)


def _timing(
    problem: Problem,
    peer: str,
    threads: int,
    times: Mapping[str, Sequence[Sequence[float]]],
    facts: Mapping[str, dict[str, Any]],
) -> Timing:
    batch, heads, length, dim = problem.call.query.shape
    product = median_of(times["product"]) if "product" in times else None
    shared = compared(times, peer, facts["ours"]["target"])
    return Timing(
        seq_len=length,
        batch=batch,
        heads=heads,
        head_dim=dim,
        sparsity=round(problem.sparsity, 4),
        threads=threads,
        **shared,
        product_ms=product,
        product_share=None if product is None else product / shared["ours_ms"],
        source=problem.source,
        layer=problem.layer,
        tail=problem.call.spec.tail,
        tail_rank=min(problem.call.spec.tail_rank, dim) if problem.call.spec.tail == "linear" else None,
        provenance={**provenance(peer), "ours": facts["ours"], "peer": facts[peer]},
    )
