"""What coding P as the paper does costs the kernel: mode `unit` beside `row`, by the clock of `attnpress bench`.

    python benchmarks/modes.py --json benchmarks/records/modes.json

Inputs are those of `attnpress bench`: synthetic, 12 heads of 64, about 1,536 tokens, 0.95 of the pairs pruned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attnpress.benchmark.attention import SECONDS, compared, held, usual_batch
from attnpress.benchmark.machine import provenance
from attnpress.benchmark.problem import make_problem, save_problem
from attnpress.benchmark.turns import Side, in_turns

MODES = {"ours": "row", "unit": "unit"}
"""By the name of the side."""


def compare(sides: list[Side], length: int, threads: int, folder: Path) -> dict[str, Any]:
    """Both modes at one length, in turns."""
    problem = make_problem(length, usual_batch(length), heads=12, head_dim=64, sparsity=0.95)
    for side in sides:
        call = problem.call
        coding = dataclasses.replace(call.spec.p, mode=MODES[side.name])
        file = folder / f"{side.name}.safetensors"
        save_problem(dataclasses.replace(problem, call=call.with_(spec=dataclasses.replace(call.spec, p=coding))), file)
        facts = side.prepare("attnpress.benchmark.sides:prepare", name="ours", file=str(file), threads=threads)
    measured = compared(in_turns(sides, SECONDS), "unit", facts["target"])
    return {"seq_len": length, "batch": len(problem.call.query), "sparsity": round(problem.sparsity, 4), **measured}


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, held())) for name in MODES]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        timings = [compare(sides, length, options.threads, folder) for length in (128, 384, 1024, 4096)]
    found = {"threads": options.threads, "timings": timings, "provenance": provenance()}
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
