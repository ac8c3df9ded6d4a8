"""The steps of docs/numerics.md on tiles, in Triton, with the same bits on every machine.

Each float32 step is one IEEE 754 operation. To prevent fusing of a product and a sum, there is a minimum between the
two, and launches disable fusion. Divisions use `div_rn`, since Triton's `/` is approximate.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23. Numbers from here to 2^23 + 2^22 are integers in float32, so adding it rounds half to even."""

MAGIC_BITS = tl.constexpr(0x4B400000)
"""MAGIC as an int32: adding a small integer to the bits adds it to the number."""

SMALLEST_SCALE, LARGEST_SCALE = tl.constexpr(2.0**-40), tl.constexpr(2.0**40)
MANTISSA = tl.constexpr(2**23 - 1)

LOG2_E = tl.constexpr(1.4426950408889634)
C1, C2, C3 = tl.constexpr(45324), tl.constexpr(15148), tl.constexpr(2596)
T_MAX = tl.constexpr(18432.0)


@triton.jit
def reciprocal(scale):
    """1 / scale, float32, rounded once."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def codes_of(x, inverse, qmax):
    """Codes of section 1, int8. Clamping before rounding gives the same integers."""
    scaled = x.to(tl.float32) * inverse
    scaled = tl.where(scaled == scaled, scaled, 0.0)  # NaN has no direction
    scaled = tl.minimum(tl.maximum(scaled, -qmax), qmax)
    return ((scaled + MAGIC) - MAGIC).to(tl.int8)


@triton.jit
def token_scale(x, qmax, POWER_OF_TWO: tl.constexpr):
    """Scale of each row from its largest finite magnitude, float32 [rows]."""
    magnitude = tl.abs(x)
    largest = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 1)
    scale = tl.div_rn(largest, tl.full(largest.shape, 1.0, tl.float32) * qmax)
    scale = tl.where(scale > 0.0, tl.minimum(tl.maximum(scale, SMALLEST_SCALE), LARGEST_SCALE), 1.0)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + MANTISSA) & ~MANTISSA
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def exact_float(integers):
    """MAGIC + integers as float32, without a conversion; exact for magnitudes below 2^22, such as scores."""
    return (integers + MAGIC_BITS).to(tl.float32, bitcast=True)


@triton.jit
def power(distance, rate):
    """p~ of section 3, int32 in units of 2^-16, for float32 distances that are nonnegative integers."""
    t = (tl.minimum(distance * rate, T_MAX) + MAGIC).to(tl.int32, bitcast=True) & 0x7FFF
    octaves = t >> 10
    step = t & 1023
    # high(step << 6, b) is (step * b) >> 10, and stays below 2^31.
    drop = (step * (C1 - ((step * (C2 - ((step * C3) >> 10))) >> 10))) >> 10
    half = (tl.full(octaves.shape, 1, tl.int32) << octaves) >> 1
    return ((65536 - drop) + half) >> octaves


@triton.jit
def row_code(probability, P_MAX: tl.constexpr):
    """P code of mode `row`, int32."""
    return (probability * P_MAX + 32768) >> 16


@triton.jit
def unit_code(probability, ratio, P_MAX: tl.constexpr):
    """P code of mode `unit`, int32; `ratio` is float32(qmax / sum of p~) of the row."""
    scaled = tl.minimum(probability.to(tl.float32) * ratio, P_MAX * 1.0)
    return (scaled + MAGIC).to(tl.int32, bitcast=True) & 0x1FF
