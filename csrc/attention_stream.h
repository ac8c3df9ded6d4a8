// Part of attention_body.h: exponents, products, masks, and the streaming way (rule relative, mode row).
#pragma once

#include "attention_pack.h"

namespace attnpress {
namespace {

// core/exponential.py: exponent of a distance, then its power, in units of 2^-16.
template <class I> ATTN_INLINE typename I::I32 probability(typename I::I32 distance, typename I::F32 rate) {
    const auto t = I::round(I::minf(I::mulf(I::to_float(distance), rate), I::set1f(static_cast<float>(T_MAX))));
    const auto octaves = I::template shr<10>(t);
    const auto fraction = I::template shl<6>(I::band(t, I::set1(1023)));
    const auto inner = I::sub(I::set1(15148), I::mulhi(fraction, I::set1(2596)));
    const auto drop = I::mulhi(fraction, I::sub(I::set1(45324), I::mulhi(fraction, inner)));
    const auto half = I::template shr<1>(I::sllv(I::set1(1), octaves));
    return I::srlv(I::add(I::sub(I::set1(ONE), drop), half), octaves);
}

// round_half_up(p * qmax / 2^16) with qmax = 2^n - 1: no product needed. `bits` is n in every lane.
template <class I> ATTN_INLINE typename I::I32 row_code(typename I::I32 p, typename I::I32 bits) {
    return I::template shr<16>(I::add(I::sub(I::sllv(p, bits), p), I::set1(ONE / 2)));
}

ATTN_INLINE int32_t bits_of(int32_t qmax) { return 32 - __builtin_clz(static_cast<uint32_t>(qmax)); }

// The same for one distance, to find where codes end.
inline int32_t row_code_at(int32_t t, int32_t qmax) {
    const int64_t fraction = (t & 1023) << 6;
    const int32_t octaves = t >> 10;
    const int64_t drop = (fraction * (45324 - ((fraction * (15148 - ((fraction * 2596) >> 16))) >> 16))) >> 16;
    const int64_t p = ((ONE - drop) + ((int64_t{1} << octaves) >> 1)) >> octaves;
    return static_cast<int32_t>((p * qmax + ONE / 2) >> 16);
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

// acc[r][c] = the products of R rows of 4-byte groups with one tile [steps][W][GROUP].
struct ScoreDot {
    template <class I> static ATTN_INLINE typename I::I32 dot(typename I::I32 acc, typename I::I32 tile, typename I::I32 group) {
        return I::dot_scores(acc, tile, group);
    }
};
struct ValueDot {
    template <class I> static ATTN_INLINE typename I::I32 dot(typename I::I32 acc, typename I::I32 tile, typename I::I32 group) {
        return I::dot_values(acc, group, tile);
    }
};

template <class I, class Dot, int R, class Left, class Right>
ATTN_INLINE void product(const Left* rows, int64_t stride, const Right* tile, int64_t steps, typename I::I32 (&acc)[R][I::COLS]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) acc[r][c] = I::set1(0);
    }
    for (int64_t step = 0; step < steps; ++step) {
        typename I::I32 columns[I::COLS];
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) columns[c] = I::load_codes(tile + (step * I::COLS + c) * I::LANES * I::GROUP);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const typename I::I32 group = I::broadcast(rows + r * stride + step * I::GROUP);
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) acc[r][c] = Dot::template dot<I>(acc[r][c], columns[c], group);
        }
    }
}

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

template <class I> ATTN_INLINE typename I::I32 largest(const typename I::I32 (&acc)[I::COLS]) {
    typename I::I32 most_of = acc[0];
#pragma GCC unroll 4
    for (int c = 1; c < I::COLS; ++c) most_of = I::max(most_of, acc[c]);
    return most_of;
}

struct Range {
    int64_t begin, end;          // keys that some row of the group may attend to
    int64_t all_begin, all_end;  // keys that all rows may attend to
};

template <int R> ATTN_INLINE Range range_of(const Row* rows) {
    Range range{rows[0].begin, rows[0].end, rows[0].begin, rows[0].end};
    bool bytes = false;
    for (int r = 0; r < R; ++r) {
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

template <class I, int R>
ATTN_INLINE void scores(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, const Row* rows, const Range& range, int64_t base, typename I::I32 (&acc)[R][I::COLS]) {
    product<I, ScoreDot, R>(codes, job.width, unit.keys + base * job.a.dim, job.steps, acc);
    if (base >= range.all_begin && base + job.W <= range.all_end) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) mask<I>(rows[r], base, acc[r]);
}

// Rare: a score so far above its row's base that 16 bits cannot hold the difference. The base moves up, and with it the
// list. Scores are computed again, so that the usual way need not keep them.
template <class I, int R>
__attribute__((noinline)) void rebase(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, const Range& range, int64_t base) {
    typename I::I32 acc[R][I::COLS];
    scores<I, R>(job, unit, codes, rows, range, base, acc);
    for (int r = 0; r < R; ++r) {
        const int32_t top = I::highest(largest<I>(acc[r])) - rows[r].cut, drop = top - rows[r].base;
        if (drop + rows[r].cut <= MAX_CUT) continue;
        rows[r].count = drop > MAX_CUT ? 0 : I::sift(rows[r].keys, rows[r].slack, rows[r].count, drop);
        rows[r].base = top;
        rows[r].floor = 0;
        I::store_short(rows[r].top, I::set1_short(0));  // this tile holds the row's maximum, and is about to be taken
    }
}

// One tile of keys meets R rows. A row's base is its maximum over the first tile, less the cut. Slack is what a score has
// above the base; what has at least the floor is listed. The floor rises now and then with the largest slack so far, on a
// fixed schedule, since a branch for each new maximum would be mispredicted; a last sift makes the list exact.
template <class I, int R>
void stream(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, const Range& range, int64_t tile) {
    const int64_t base = tile * job.W;
    if (base >= range.end || base + job.W <= range.begin) return;
    const int64_t turn = tile - range.begin / job.W;
    typename I::Slack slack[R];
    for (;;) {
        typename I::I32 acc[R][I::COLS];
        scores<I, R>(job, unit, codes, rows, range, base, acc);
        if (turn == 0) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) rows[r].base = I::highest(largest<I>(acc[r])) - rows[r].cut;
        }
        typename I::Short peak = I::set1_short(0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            slack[r] = I::narrow(acc[r], rows[r].base);
            const typename I::Short most_of = I::max_slack(slack[r]);
            peak = I::max_short(peak, most_of);
            I::store_short(rows[r].top, I::max_short(I::load_short_top(rows[r].top), most_of));
        }
        if (__builtin_expect(!I::any_above(peak, MAX_CUT), 1)) break;
        rebase<I, R>(job, unit, codes, rows, range, base);
    }
    if (turn > 0 && (turn & (turn - 1)) == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) rows[r].floor = I::highest_short(I::load_short_top(rows[r].top)) - rows[r].cut;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        Row& row = rows[r];
        row.count += I::list(slack[r], row.floor, static_cast<int32_t>(base), row.keys + row.count, row.slack + row.count);
    }
}

// weighted[d] = sum over the list of code * value; `tiles` tiles of W columns at a time.
template <class I, int T>
ATTN_INLINE void gather(const typename I::Value* values, int64_t width, const uint16_t* keys, const typename I::Prob* codes, int64_t count, int32_t* weighted) {
    typename I::I32 acc[T * I::COLS];
#pragma GCC unroll 16
    for (int c = 0; c < T * I::COLS; ++c) acc[c] = I::set1(0);
    for (int64_t i = 0; i < count; i += I::GROUP) {
        const typename I::Value* from[I::GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < I::GROUP; ++g) from[g] = values + keys[i + g] * width;
        const typename I::I32 group = I::broadcast(codes + i);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            typename I::I32 columns[I::COLS];
            I::interleave(from, t * I::COLS * I::LANES, columns);
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) acc[t * I::COLS + c] = I::dot_values(acc[t * I::COLS + c], group, columns[c]);
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < T * I::COLS; ++c) I::store(weighted + c * I::LANES, acc[c]);
}

// Codes past the list, up to a whole group, must be 0. They are not set here: narrow stores among wide ones would keep the
// loads of gather waiting until every older store has left for memory.
template <class I> void weigh_list(const Job<I>& job, const typename I::Value* values, uint16_t* keys, const typename I::Prob* codes, int64_t count, int32_t* weighted) {
    for (int g = 0; g < I::GROUP - 1; ++g) keys[count + g] = 0;
    for (int64_t d = 0; d < job.width;) {
        const int64_t tiles = (job.width - d) / job.W;
        if (tiles >= 4) {
            gather<I, 4>(values + d, job.width, keys, codes, count, weighted + d);
            d += 4 * job.W;
        } else if (tiles >= 2) {
            gather<I, 2>(values + d, job.width, keys, codes, count, weighted + d);
            d += 2 * job.W;
        } else {
            gather<I, 1>(values + d, job.width, keys, codes, count, weighted + d);
            d += job.W;
        }
    }
}

// out = (weighted * v_scale) / divisor. Weighted sums are 32-bit, or 64-bit where keys fill several chunks.
template <class I> void emit(const Job<I>& job, const Row& row, const int32_t* weighted, const int64_t* wide, int64_t code_sum) {
    const Attention& a = job.a;
    const float divisor = a.mode == ProbMode::unit ? static_cast<float>(a.p_max) : static_cast<float>(most<int64_t>(code_sum, 1));
    const typename I::F32 by = I::set1f(divisor), inverse = I::set1f(1.0f / divisor);
    const auto scaled = [&](typename I::F32 sum, int64_t d) { return I::divide(I::mulf(sum, I::loadf(row.scale + d)), by, inverse); };
    const int64_t dim = a.dim;
    float* output = row.output;
    if (wide == nullptr && dim % I::LANES == 0) {
        for (int64_t d = 0; d < dim; d += I::LANES) I::storef(output + d, scaled(I::to_float(I::load(weighted + d)), d));
    } else {
        alignas(64) float room[MAX_DIM + 64];
        for (int64_t d = 0; d < dim; ++d) room[d] = wide == nullptr ? static_cast<float>(weighted[d]) : static_cast<float>(wide[d]);
        for (int64_t d = dim; d % I::LANES != 0; ++d) room[d] = 0.0f;
        for (int64_t d = 0; d < dim; d += I::LANES) I::storef(room + d, scaled(I::loadf(room + d), d));
        std::memcpy(output, room, dim * sizeof(float));
    }
    if (a.trace == nullptr) return;
    a.trace->code_sum[row.place] = code_sum;
    const bool empty = row.max == LOW;
    a.trace->row_max[row.place] = empty ? 0 : row.max - I::KEY_OFFSET * row.query_sum;
    for (int64_t d = 0; d < a.dim; ++d) a.trace->weighted[row.place * a.dim + d] = wide == nullptr ? weighted[d] : wide[d];
}

// The streaming way's second half: codes of a list, in `codes`; returns their sum.
template <class I> int64_t code_list(const Job<I>& job, const Row& row, typename I::Prob* codes) {
    const auto rate = I::set1f(row.rate);
    const auto cut = I::set1(row.cut), bits = I::set1(bits_of(job.a.p_max)), end = I::set1(row.count);
    auto sum = I::set1(0);
    for (int64_t i = 0; i < row.count; i += I::LANES) {
        const auto p = probability<I>(I::sub(cut, I::load_short(row.slack + i)), rate);
        // Past its end the list holds leftovers: only position + 1 <= count counts.
        const auto code = I::select_le(I::add(I::iota(), I::set1(static_cast<int32_t>(i) + 1)), end, row_code<I>(p, bits));
        I::store_code(codes + i, code);
        sum = I::add(sum, code);
    }
    return I::total(sum);
}

template <class I> void record_list(const Job<I>& job, const Head<I>& unit, const Row& row, const typename I::Prob* codes) {
    for (int64_t i = 0; i < row.count; ++i) {
        job.a.trace->p_codes[row.place * job.a.key_rows + unit.mask.packed[row.keys[i]]] = static_cast<uint8_t>(codes[i]);
    }
}

// All codes first, then all sums of values: what one row waits for, another fills.
template <class I> void finish(const Job<I>& job, const Head<I>& unit, Row* rows, int64_t count, Scratch<I>& scratch) {
    const int64_t room = unit.padded + 2 * I::LANES;
    auto* codes = scratch.listed.template get<typename I::Prob>(job.PASS * room);
    auto* weighted = scratch.weighted.template get<int32_t>(I::ROWS * job.width);
    int64_t sums[Job<I>::PASS];
    for (int64_t r = 0; r < count; ++r) {
        Row& row = rows[r];
        const int32_t top = row.begin < row.end ? I::highest_short(I::load_short_top(row.top)) : 0;
        row.max = row.begin < row.end ? row.base + top : LOW;
        // Without a valid key the list holds pairs that are not valid.
        row.count = row.max == LOW ? 0 : I::sift(row.keys, row.slack, row.count, top - row.cut);
        sums[r] = code_list(job, row, codes + r * room);
    }
    for (int64_t r = 0; r < count; ++r) {
        weigh_list(job, unit.values, rows[r].keys, codes + r * room, rows[r].count, weighted);
        if (job.a.trace != nullptr) record_list(job, unit, rows[r], codes + r * room);
        emit(job, rows[r], weighted, nullptr, sums[r]);
    }
}

}  // namespace
}  // namespace attnpress
