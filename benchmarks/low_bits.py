"""What 4 bits of Q and K save the kernel over 8 where there is no VNNI, by the clock of `attnpress bench`.

    ATTNPRESS_CPU_TARGET=avx2 python benchmarks/low_bits.py --json benchmarks/records/low_bits.json

Inputs are those of `attnpress bench`: synthetic, 12 heads of 64, about 1,536 tokens, 0.95 of the pairs pruned. V and P
have 8 bits on both sides. Without the variable it times the best target of this machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attnpress.benchmark.attention import SECONDS, compared, held, usual_batch
from attnpress.benchmark.machine import provenance
from attnpress.benchmark.problem import make_problem, save_problem
from attnpress.benchmark.turns import Side, in_turns
from attnpress.config import AttentionSpec, TensorSpec

BITS = {"ours": 4, "8 bits": 8}
"""Of Q and K, by the name of the side."""


def compare(sides: list[Side], length: int, threads: int, folder: Path) -> dict[str, Any]:
    """Both at one length, in turns."""
    found: dict[str, Any] = {"seq_len": length, "batch": usual_batch(length)}
    for side in sides:
        few = TensorSpec(bits=BITS[side.name])
        problem = make_problem(length, usual_batch(length), 12, 64, 0.95, spec=AttentionSpec(q=few, k=few))
        file = folder / f"{side.name}.safetensors"
        save_problem(problem, file)
        facts = side.prepare("attnpress.benchmark.sides:prepare", name="ours", file=str(file), threads=threads)
        found[f"sparsity_{BITS[side.name]}bit"] = round(problem.sparsity, 4)
    return {**found, **compared(in_turns(sides, SECONDS), "8 bits", facts["target"])}


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, held())) for name in BITS]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        timings = [compare(sides, length, options.threads, folder) for length in (128, 384, 1024, 4096)]
    found = {"threads": options.threads, "timings": timings, "provenance": provenance()}
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
