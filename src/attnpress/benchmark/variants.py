"""The CPU kernel compared with itself: the same call with one change, by the clock of `attnpress bench`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attnpress.benchmark.attention import SECONDS, compared, held
from attnpress.benchmark.machine import provenance
from attnpress.benchmark.problem import Problem, save_problem
from attnpress.benchmark.turns import Side, in_turns
from attnpress.files import write_json

LENGTHS = (128, 384, 1024, 4096)
OURS = "ours"

Problems = Callable[[int], Mapping[str, Problem]]
"""The calls of a length, by the names of their sides."""


def time_variants(
    problems: Problems, other: str, threads: int, lengths: Sequence[int] = LENGTHS, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Time two calls of the kernel in turns, each in its own process.

    Args:
        problems: returns the call of "ours" and of the other side.
        other: name of the other side.
        seconds: for each side and length.

    Returns:
        For each length: `seq_len`, `batch`, `sparsity` by side, and the result of `benchmark.attention.compared`.
    """
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, held())) for name in (OURS, other)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for length in lengths:
            made, target = problems(length), ""
            for side in sides:
                file = folder / f"{side.name}.safetensors"
                save_problem(made[side.name], file)
                told = side.prepare("attnpress.benchmark.sides:prepare", name=OURS, file=str(file), threads=threads)
                target = told["target"]
            found.append(
                {
                    "seq_len": length,
                    "batch": len(made[OURS].call.query),
                    "sparsity": {name: round(problem.sparsity, 4) for name, problem in made.items()},
                    **compared(in_turns(sides, seconds), other, target),
                }
            )
        return found


def variants_main(description: str, problems: Problems, other: str) -> None:
    """The command line of a script that times two variants."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    timings = time_variants(problems, other, options.threads)
    tell({"threads": options.threads, "timings": timings}, options.json)


def tell(found: Mapping[str, Any], file: Path | None, *packages: str) -> None:
    """Print the result of a script of benchmarks/ with its provenance, and write it if a file is given."""
    whole = {**found, "provenance": {**provenance(*packages), "command": " ".join(["python", *sys.argv])}}
    print(json.dumps(whole, indent=1))
    if file is not None:
        write_json(file, whole)
