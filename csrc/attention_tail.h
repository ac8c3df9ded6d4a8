// Part of attention_body.h: what the pairs of a row without a P code add to its output (numerics, section 8).
#pragma once

#include "attention_survivors.h"

namespace attnpress {
namespace {

constexpr int32_t TAIL_END = 64 * 1024;  // core/tail.py: exponent from which a level is 0

// One row's tail; names in brackets are those of numerics, section 8.
struct RowTail {
    int64_t count = 0, distance = 0, score = 0;  // g, T, Y
    int32_t exponent = 0;                        // t
    float level = 0, step = 0, mean = 0;         // u, lambda, sbar
};

// From count, distance and score to the rest.
template <class I> void find_level(const Job<I>& job, const Head<I>& unit, const Row& row, RowTail& tail) {
    const Tail& fitted = job.a.tail;
    const float some = static_cast<float>(most<int64_t>(tail.count, 1));
    const float steps = std::nearbyint(least((static_cast<float>(tail.distance) / some) * row.rate, static_cast<float>(TAIL_END)));
    tail.exponent = static_cast<int32_t>(least(most(steps - fitted.lift[unit.head], 0.0f), static_cast<float>(TAIL_END)));
    if (tail.count > 0 && tail.exponent < TAIL_END) {
        const uint32_t scale = static_cast<uint32_t>(127 - 16 - (tail.exponent >> 10)) << 23;  // bits of a power of two
        float octaves;
        std::memcpy(&octaves, &scale, sizeof(octaves));
        tail.level = static_cast<float>((ONE - drop_of((tail.exponent & 1023) << 6)) * job.a.p_max) * octaves;
    }
    tail.step = fitted.step == nullptr ? row.alpha : row.alpha * fitted.step[unit.kv_head];
    tail.mean = static_cast<float>(tail.score) / some;
}

// out = ((weighted + u (V_G + lambda (X - sbar V_G))) v_scale) / (sum(code) + u g): `weighted(d)`, `value(d)` and `slope(d)` give
// LANES of float32 each.
template <class I, class Weighted, class Value, class Slope>
ATTN_INLINE void emit_tailed(const Job<I>& job, const Row& row, const RowTail& tail, int64_t code_sum, Weighted weighted, Value value, Slope slope) {
    const auto level = I::set1f(tail.level), step = I::set1f(tail.step), mean = I::set1f(tail.mean);
    const bool linear = job.a.tail.kind == TailKind::linear && tail.level > 0;
    const Rescale<I> scaled(row, static_cast<float>(most<int64_t>(code_sum, 1)) + tail.level * static_cast<float>(tail.count));
    const auto output = [&](int64_t d) {
        typename I::F32 values = value(d);
        if (linear) values = I::addf(values, I::mulf(step, I::subf(slope(d), I::mulf(mean, values))));
        return scaled(I::addf(weighted(d), I::mulf(level, values)), d);
    };
    const int64_t dim = job.a.dim;
    int64_t d = 0;
    for (; d + I::LANES <= dim; d += I::LANES) I::storef(row.output + d, output(d));
    if (d == dim) return;
    alignas(64) float room[I::LANES];
    I::storef(room, output(d));
    std::memcpy(row.output + d, room, (dim - d) * sizeof(float));
}

template <class I, class Value, class Slope> void record_tail(const Job<I>& job, const Row& row, const RowTail& tail, Value value, Slope slope) {
    const Trace& trace = *job.a.trace;
    trace.tail_count[row.place] = static_cast<int32_t>(tail.count);
    trace.tail_distance[row.place] = tail.distance;
    trace.tail_exponent[row.place] = tail.exponent;
    trace.tail_level[row.place] = tail.level;
    trace.tail_score[row.place] = tail.score;
    for (int64_t d = 0; d < job.a.dim; ++d) {
        trace.tail_value[row.place * job.a.dim + d] = value(d);
        trace.tail_slope[row.place * job.a.dim + d] = job.a.tail.kind == TailKind::linear ? slope(d) : 0;
    }
}

// Scores of packed keys [begin, end), whole tiles, as the directions see them.
template <class I> void see_all_keys(const Job<I>& job, const Head<I>& unit, const int16_t* query, int64_t begin, int64_t end, int32_t* to) {
    for (int64_t key = begin; key < end; key += 4) {
        const int16_t* from[4];
        for (int g = 0; g < 4; ++g) from[g] = unit.seen + (key + g) * job.seen_width;
        int32_t scores[4];
        I::dot_four(query, from, job.seen_width, scores);
        std::memcpy(to + key, scores, sizeof(scores));
    }
}

}  // namespace
}  // namespace attnpress
