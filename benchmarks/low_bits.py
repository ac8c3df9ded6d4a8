"""What 4 bits of Q and K save the kernel over 8 where there is no VNNI, by the clock of `attnpress bench`.

    ATTNPRESS_CPU_TARGET=avx2 python benchmarks/low_bits.py --json benchmarks/records/low_bits.json

Inputs are those of `attnpress bench`: synthetic, 12 heads of 64, about 1,536 tokens, 0.95 of the pairs pruned. V and P
have 8 bits on both sides. Without the variable it times the best target of this machine.
"""

from __future__ import annotations

from attnpress.benchmark.attention import usual_batch
from attnpress.benchmark.problem import Problem, make_problem
from attnpress.benchmark.variants import OURS, variants_main
from attnpress.config import AttentionSpec, TensorSpec

BITS = {OURS: 4, "8 bits": 8}
"""Of Q and K, by the name of the side."""


def problems(length: int) -> dict[str, Problem]:
    """The call with either bits."""
    specs = {name: AttentionSpec(q=TensorSpec(bits), k=TensorSpec(bits)) for name, bits in BITS.items()}
    return {name: make_problem(length, usual_batch(length), 12, 64, 0.95, spec=spec) for name, spec in specs.items()}


if __name__ == "__main__":
    variants_main(__doc__, problems, "8 bits")
