"""What coding P as the paper does costs the kernel: mode `unit` beside `row`, by the clock of `attnpress bench`.

    python benchmarks/modes.py --json benchmarks/records/modes.json

Inputs are those of `attnpress bench`: synthetic, 12 heads of 64, about 1,536 tokens, 0.95 of the pairs pruned.
"""

from __future__ import annotations

import dataclasses

from attnpress.benchmark.attention import usual_batch
from attnpress.benchmark.problem import Problem, make_problem
from attnpress.benchmark.variants import OURS, variants_main


def problems(length: int) -> dict[str, Problem]:
    """The same call in either mode."""
    row = make_problem(length, usual_batch(length), heads=12, head_dim=64, sparsity=0.95)
    coding = dataclasses.replace(row.call.spec.p, mode="unit")
    call = row.call.with_(spec=dataclasses.replace(row.call.spec, p=coding))
    return {OURS: row, "unit": dataclasses.replace(row, call=call)}


if __name__ == "__main__":
    variants_main(__doc__, problems, "unit")
