"""What coding P as the paper does costs the kernel: mode `unit` beside `row`, the same inputs, in turns.

    python benchmarks/modes.py --json benchmarks/records/modes.json

Inputs are those of `attnpress bench`: synthetic, 12 heads of 64, 0.95 of the pairs pruned, about 1,536
tokens; one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from attnpress.benchmark.attention import usual_batch
from attnpress.benchmark.machine import provenance
from attnpress.benchmark.problem import Problem, make_problem
from attnpress.kernels import ops

MODES = ("row", "unit")


def compare(problem: Problem, rounds: int) -> dict[str, Any]:
    """Milliseconds of both modes (median), and the ratio of their turns (median, least, most)."""
    spec = problem.spec
    specs = [dataclasses.replace(spec, p=dataclasses.replace(spec.p, mode=mode)) for mode in MODES]
    p, times = problem, []
    for _ in range(rounds + 3):
        times.append([])
        for one in specs:
            begin = time.perf_counter()
            ops.attention(p.query, p.key, p.value, None, p.scales, p.cutoff, one, p.scaling)
            times[-1].append(1000 * (time.perf_counter() - begin))
    row, unit = zip(*times[3:], strict=True)
    ratios = [theirs / ours for ours, theirs in zip(row, unit, strict=True)]
    return {
        "seq_len": p.query.shape[2], "batch": p.query.shape[0], "sparsity": round(p.sparsity, 4), "rounds": rounds,
        "row_ms": statistics.median(row), "unit_ms": statistics.median(unit),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems = (make_problem(length, usual_batch(length), 12, 64, 0.95) for length in (128, 384, 1024, 4096))
    found = {"timings": [compare(problem, options.rounds) for problem in problems], "provenance": provenance()}
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
