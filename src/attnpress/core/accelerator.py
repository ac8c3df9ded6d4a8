"""Analytic model of an accelerator: cycles and bytes of attention, from lengths and survivors (docs/accelerator.md).

The machine is a weight-stationary array of R x C multipliers of `bits` bits, with a buffer. docs/accelerator.md has all
formulas with their sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnpress.config import AttentionSpec
from attnpress.core.cost import tail_work


@dataclass(frozen=True)
class Accelerator:
    """Parameters of the machine.

    Attributes:
        rows, columns: R and C of the array; for P V with survivors, C lanes of R multipliers.
        bits: operand width of a multiplier. With b-bit operands it computes (bits / b) products at once per operand.
        buffer: bytes on the chip.
    """

    rows: int = 32
    columns: int = 32
    bits: int = 8
    buffer: int = 64 * 1024


@dataclass(frozen=True)
class Shape:
    """Attention of one head on one sequence.

    Attributes:
        length: number of tokens (queries and keys).
        head_dim: D.
        survivors: pairs with a P code; length * length without pruning.
        balance: ideal cycles over actual cycles of the lanes, above 0 and up to 1.
    """

    length: int
    head_dim: int
    survivors: float
    balance: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Cost of one head on one sequence.

    Attributes:
        scores, values, tail: cycles of Q K^T, of P V, and of the tail.
        off_chip: bytes of Q, K, V and the output transferred from and to the chip.
        on_chip: bytes of P, with the index of each survivor if it is pruned.
    """

    scores: float
    values: float
    tail: float
    off_chip: float
    on_chip: float

    @property
    def cycles(self) -> float:
        """Sum of all cycles."""
        return self.scores + self.values + self.tail


OUTPUT_BITS, INDEX_BITS = 8, 16
"""Bits of an output number, and of the index of a survivor."""


def packed_products(machine: Accelerator, left: int, right: int) -> int:
    """Products per multiplier and cycle (Bit Fusion, Sharma et al., ISCA 2018); 1 if the widths do not divide."""
    return max(1, machine.bits // left) * max(1, machine.bits // right)


def systolic_cycles(machine: Accelerator, m: int, n: int, k: int, products: int = 1) -> int:
    """Cycles of [m, k] [k, n], the second matrix stationary (SCALE-Sim, Samajdar et al., ISPASS 2020, equation 3).

    Args:
        products: per multiplier and cycle; counted as that many columns.
    """
    folds = math.ceil(k / machine.rows) * math.ceil(n / (machine.columns * products))
    return (2 * machine.rows + machine.columns + m - 2) * folds


def lane_array_cycles(machine: Accelerator, shape: Shape, products: int = 1) -> float:
    """Cycles of P V over survivors: a lane adds R numbers of V per cycle; it is filled and drained once."""
    busy = shape.survivors * shape.head_dim / (machine.rows * machine.columns * products * shape.balance)
    return 2 * machine.rows + machine.columns - 2 + busy


def off_chip_bytes(machine: Accelerator, shape: Shape, bits: dict[str, int]) -> float:
    """Bytes of Q and the output, once, and of K and V, once per block of rows whose Q fits the buffer.

    If K and V fit completely, they are read once; otherwise as in theorem 2 of Dao et al., FlashAttention, NeurIPS
    2022.
    """
    rows = shape.length * shape.head_dim / 8
    both = rows * (bits["k"] + bits["v"])
    own = rows * (bits["q"] + OUTPUT_BITS)
    passes = 1 if both <= machine.buffer else math.ceil(own / (machine.buffer / 2))
    return own + both * passes


def estimate(machine: Accelerator, shape: Shape, spec: AttentionSpec) -> Estimate:
    """Cycles and bytes of one head on one sequence.

    Args:
        spec: bits of all four matrices, whether anything is pruned, and the tail.

    Raises:
        ValueError: a matrix has no bits, or the mask is predicted.
    """
    if spec.predictor_bits is not None:
        raise ValueError("the model of an accelerator computes every score in full; give a spec without predictor_bits")
    bits = {name: width for name, width in spec.bits.items() if width is not None}
    if len(bits) < len(spec.bits):
        raise ValueError(f"the model of an accelerator needs bits for all of q, k, v and p; found {spec.bits}")
    n, d, pairs = shape.length, shape.head_dim, shape.length**2
    scores = systolic_cycles(machine, n, n, d, packed_products(machine, bits["q"], bits["k"]))
    products = packed_products(machine, bits["p"], bits["v"])
    if shape.survivors >= pairs:
        values: float = systolic_cycles(machine, d, n, n, products)
        on_chip = pairs * bits["p"] / 8
    else:
        values = lane_array_cycles(machine, shape, products)
        on_chip = shape.survivors * (bits["p"] + INDEX_BITS) / 8
    tail = tail_work(n, n, round(shape.survivors), 1, spec, d).macs_remaining / (machine.rows * machine.columns)
    return Estimate(scores, values, tail, off_chip_bytes(machine, shape, bits), on_chip)
