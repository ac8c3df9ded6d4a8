"""What a tail costs a call of the CPU kernel, on each target: processor time, in turns with the same call without it.

    python benchmarks/tail_cost.py --json benchmarks/records/tail_cost.json

For machines that others use too: time that a process waits does not count, and the least of many calls is the one
that was disturbed least. On a quiet machine `attnpress bench --tail` says the same in wall time, with a process for
each side.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from attnpress.benchmark.attention import usual_batch
from attnpress.benchmark.machine import provenance
from attnpress.benchmark.problem import Problem, make_problem, without_tail
from attnpress.config import AttentionSpec, TailName
from attnpress.kernels import cpu, ops
from attnpress.kernels.cpu import TARGET_VARIABLE

HEADS, DIM, SPARSITY = 12, 64, 0.95
TAILS: dict[str, tuple[TailName, int]] = {"mean": ("mean", 1), "linear 8": ("linear", 8), "linear 64": ("linear", 64)}


def calls(length: int) -> dict[str, Callable[[], Any]]:
    """A call without a tail, and one with each."""
    found: dict[str, Callable[[], Any]] = {}
    for name, (tail, rank) in TAILS.items():
        spec = AttentionSpec(tail=tail, tail_rank=rank)
        problem = make_problem(length, usual_batch(length), HEADS, DIM, SPARSITY, spec=spec)
        found["none"] = _call(without_tail(problem))
        found[name] = _call(problem)
    return found


def _call(problem: Problem) -> Callable[[], Any]:
    return lambda: ops.attention(problem.call)


def least(made: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Processor time of each call in milliseconds, the least; they are called in turn, for `seconds` each."""
    for call in made.values():
        call()
    times: dict[str, float] = dict.fromkeys(made, float("inf"))
    end = time.monotonic() + seconds * len(made)
    while time.monotonic() < end:
        for name, call in made.items():
            begin = time.thread_time_ns()
            call()
            times[name] = min(times[name], (time.thread_time_ns() - begin) / 1e6)
    return times


def main() -> None:
    """One row for each target and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=cpu.supported_targets())
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128, 384, 1024])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for target in options.target:
        os.environ[TARGET_VARIABLE] = target
        for length in options.seq_len:
            times = least(calls(length), options.seconds)
            row = {"target": target, "seq_len": length, "batch": usual_batch(length), "heads": HEADS, "head_dim": DIM,
                   "sparsity": SPARSITY, "none_ms": round(times["none"], 4),
                   "ratio": {name: round(times[name] / times["none"], 3) for name in TAILS}}  # fmt: skip
            rows.append(row)
            print(target, length, row["ratio"], flush=True)
    options.json.write_text(json.dumps({"rows": rows, "provenance": provenance("none")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
