// Part of attention_body.h: exponents, products and masks.
#pragma once

#include "attention_types.h"

namespace attnpress {
namespace {

// core/exponential.py: the power of an exponent's steps within its octave, in units of 2^-16.
template <class I> ATTN_INLINE typename I::I32 power_of_steps(typename I::I32 t) {
    const auto fraction = I::template shl<FRACTION_SHIFT>(I::band(t, I::set1(STEPS_PER_OCTAVE - 1)));
    const auto inner = I::sub(I::set1(C2), I::mulhi(fraction, I::set1(C3)));
    return I::sub(I::set1(ONE), I::mulhi(fraction, I::sub(I::set1(C1), I::mulhi(fraction, inner))));
}

// Exponent of a distance, then its power.
template <class I> ATTN_INLINE typename I::I32 probability(typename I::I32 distance, typename I::F32 rate) {
    const auto t = I::round(I::minf(I::mulf(I::to_float(distance), rate), I::set1f(static_cast<float>(T_MAX))));
    const auto octaves = I::template shr<STEP_BITS>(t);
    const auto half = I::template shr<1>(I::sllv(I::set1(1), octaves));
    return I::srlv(I::add(power_of_steps<I>(t), half), octaves);
}

// round_half_up(p * qmax / 2^16) with qmax = 2^n - 1: no product needed. `bits` is n in every lane.
template <class I> ATTN_INLINE typename I::I32 row_code(typename I::I32 p, typename I::I32 bits) {
    return I::template shr<ONE_BITS>(I::add(I::sub(I::sllv(p, bits), p), I::set1(ONE / 2)));
}

ATTN_INLINE int32_t bits_of(int32_t qmax) { return 32 - __builtin_clz(static_cast<uint32_t>(qmax)); }

inline int64_t power_of_steps(int32_t t) {
    const int64_t fraction = (t & (STEPS_PER_OCTAVE - 1)) << FRACTION_SHIFT;
    return ONE - ((fraction * (C1 - ((fraction * (C2 - ((fraction * C3) >> ONE_BITS))) >> ONE_BITS))) >> ONE_BITS);
}

// P code of one exponent, to find where codes end.
inline int32_t row_code_at(int32_t t, int32_t qmax) {
    const int32_t octaves = t >> STEP_BITS;
    const int64_t p = (power_of_steps(t) + ((int64_t{1} << octaves) >> 1)) >> octaves;
    return static_cast<int32_t>((p * qmax + ONE / 2) >> ONE_BITS);
}

inline int32_t last_coded_exponent(int32_t qmax) {
    int32_t low = 0, high = T_MAX;  // powers never rise with t: bisect between a code and none
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (row_code_at(middle, qmax) > 0 ? low : high) = middle;
    }
    return low;
}

inline bool has_code(int32_t distance, float rate, int32_t last) {
    return std::nearbyint(static_cast<float>(distance) * rate) <= static_cast<float>(last);
}

// Largest distance that the rule keeps and that has a code above zero; VALID - 1 if that is out of reach.
inline int32_t find_cut(float cutoff, float alpha, float rate, int32_t last) {
    const float kept = cutoff / alpha;
    const float coded = (static_cast<float>(last) + 0.5f) / rate;
    int32_t cut = VALID - 1;
    if (coded < 0x1p24f) {
        cut = static_cast<int32_t>(coded);
        while (cut > 0 && !has_code(cut, rate, last)) --cut;
        while (has_code(cut + 1, rate, last)) ++cut;
    }
    return kept < static_cast<float>(cut) ? static_cast<int32_t>(kept) : cut;
}

// The two products: keys in groups of GROUP codes a lane, values in groups of VALUE_GROUP.
struct ScoreDot {
    template <class I> static constexpr int GROUP = I::GROUP;
    template <class I> static constexpr bool SHORT_SUMS = I::SHORT_SUMS;
    template <class I> static ATTN_INLINE typename I::I32 dot(typename I::I32 acc, typename I::I32 tile, typename I::I32 group) {
        return I::dot_scores(acc, tile, group);
    }
};
struct ValueDot {
    template <class I> static constexpr int GROUP = I::VALUE_GROUP;
    template <class I> static constexpr bool SHORT_SUMS = false;
    template <class I> static ATTN_INLINE typename I::I32 dot(typename I::I32 acc, typename I::I32 tile, typename I::I32 group) {
        return I::dot_values(acc, group, tile);
    }
};

// Adds to acc[r][c] the products of R rows of groups with one tile [steps][W][GROUP].
template <class I, class Dot, int R, class Left, class Right>
ATTN_INLINE void accumulate(const Left* rows, int64_t stride, const Right* tile, int64_t steps, typename I::I32 (&acc)[R][I::COLS]) {
    constexpr int GROUP = Dot::template GROUP<I>;
    for (int64_t step = 0; step < steps; ++step) {
        typename I::I32 columns[I::COLS];
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) columns[c] = I::load_codes(tile + (step * I::COLS + c) * I::LANES * GROUP);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const typename I::I32 group = I::broadcast(rows + r * stride + step * GROUP);
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) acc[r][c] = Dot::template dot<I>(acc[r][c], columns[c], group);
        }
    }
}

template <class I> ATTN_INLINE void fill(typename I::I32 (&acc)[I::COLS], int32_t x) {
#pragma GCC unroll 4
    for (int c = 0; c < I::COLS; ++c) acc[c] = I::set1(x);
}

// acc[r][c] = start(r) and the products.
template <class I, class Dot, int R, class Left, class Right, class Start>
ATTN_INLINE void product(const Left* rows, int64_t stride, const Right* tile, int64_t steps, Start start, typename I::I32 (&acc)[R][I::COLS]) {
    constexpr bool SHORT_SUMS = Dot::template SHORT_SUMS<I>;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) fill<I>(acc[r], SHORT_SUMS ? 0 : start(r));
    accumulate<I, Dot, R>(rows, stride, tile, steps, acc);
    if constexpr (SHORT_SUMS) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) acc[r][c] = I::add(I::widen(acc[r][c]), I::set1(start(r)));
        }
    }
}

ATTN_INLINE int32_t from_zero(int) { return 0; }

// Bit i: the row may attend to packed key base + i.
template <class I> ATTN_INLINE uint64_t valid_bits(const Row& row, int64_t base) {
    constexpr int W = I::COLS * I::LANES;
    const int64_t begin = most<int64_t>(row.begin - base, 0), end = least<int64_t>(row.end - base, W);
    if (begin >= end) return 0;
    const uint64_t bits = (end == 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1);
    return row.bytes == nullptr ? bits : bits & I::byte_bits(row.bytes + base, static_cast<int>(end));
}

template <class I> ATTN_INLINE void mask(const Row& row, int64_t base, typename I::I32 (&acc)[I::COLS]) {
    const uint64_t bits = valid_bits<I>(row, base);
#pragma GCC unroll 4
    for (int c = 0; c < I::COLS; ++c) acc[c] = I::where(bits >> (c * I::LANES), acc[c], LOW);
}

template <class I> ATTN_INLINE void raise(const typename I::I32 (&acc)[I::COLS], int32_t by, typename I::I32 (&to)[I::COLS]) {
#pragma GCC unroll 4
    for (int c = 0; c < I::COLS; ++c) to[c] = I::add(acc[c], I::set1(by));
}

template <class I> ATTN_INLINE typename I::I32 largest(const typename I::I32 (&acc)[I::COLS]) {
    typename I::I32 most_of = acc[0];
#pragma GCC unroll 4
    for (int c = 1; c < I::COLS; ++c) most_of = I::max(most_of, acc[c]);
    return most_of;
}

struct Range {
    int64_t begin, end;          // keys that some row of the group may attend to
    int64_t all_begin, all_end;  // keys that all rows may attend to
    bool has_whole(int64_t base, int64_t width) const { return base >= all_begin && base + width <= all_end; }
};

ATTN_INLINE Range range_of(const Row* rows, int64_t count) {
    Range range{rows[0].begin, rows[0].end, rows[0].begin, rows[0].end};
    bool bytes = false;
    for (int64_t r = 0; r < count; ++r) {
        const Row& row = rows[r];
        bytes |= row.bytes != nullptr;
        range.all_begin = most<int64_t>(range.all_begin, row.begin);
        range.all_end = least<int64_t>(range.all_end, row.end);
        if (row.begin == row.end) continue;
        const bool none = range.begin == range.end;
        range.begin = none ? row.begin : least<int64_t>(range.begin, row.begin);
        range.end = none ? row.end : most<int64_t>(range.end, row.end);
    }
    if (bytes) range.all_end = range.all_begin = 0;
    return range;
}

template <class I, int R, class Start>
ATTN_INLINE void scores_from(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, const Row* rows, const Range& range, int64_t base, Start start, typename I::I32 (&acc)[R][I::COLS]) {
    product<I, ScoreDot, R>(codes, job.width, unit.keys + base * job.a.dim, job.steps, start, acc);
    if (range.has_whole(base, job.W)) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) mask<I>(rows[r], base, acc[r]);
}

template <class I, int R>
ATTN_INLINE void scores(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, const Row* rows, const Range& range, int64_t base, typename I::I32 (&acc)[R][I::COLS]) {
    scores_from<I, R>(job, unit, codes, rows, range, base, from_zero, acc);
}

// The same, but sums begin at each row's start: no addition afterwards makes slack of them.
template <class I, int R>
ATTN_INLINE void slacks(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, const Row* rows, const Range& range, int64_t base, typename I::I32 (&acc)[R][I::COLS]) {
    scores_from<I, R>(job, unit, codes, rows, range, base, [&](int r) { return rows[r].start; }, acc);
}

}  // namespace
}  // namespace attnpress
