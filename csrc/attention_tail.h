// Part of attention_body.h: what the pairs of a row without a P code add to its output (numerics, section 8).
#pragma once

#include "attention_survivors.h"

namespace attnpress {
namespace {

constexpr int32_t TAIL_END = 64 * STEPS_PER_OCTAVE;  // core/tail.py: exponent from which a level is 0

// One row's tail; names in brackets are those of numerics, section 8.
struct RowTail {
    int64_t count = 0, distance = 0, score = 0;  // g, T, Y
    int32_t exponent = 0;                        // t
    float level = 0, step = 0, mean = 0;         // u, lambda, sbar
};

// From count, distance and score of some rows to the rest.
template <class I> void find_levels(const Job<I>& job, const Head<I>& unit, const Row* rows, RowTail* tails, int64_t rows_count) {
    using V = typename I::I32;
    const Tail& fitted = job.a.tail;
    const auto end = I::set1f(static_cast<float>(TAIL_END)), zero = I::set1f(0.0f), lift = I::set1f(fitted.lift[unit.head]);
    const V bits = I::set1(bits_of(job.a.p_max));
    for (int64_t from = 0; from < rows_count; from += I::LANES) {
        alignas(64) float distances[I::LANES] = {}, counts[I::LANES], rates[I::LANES] = {}, levels[I::LANES];
        alignas(64) int32_t exponents[I::LANES];
        const int64_t some = least<int64_t>(I::LANES, rows_count - from);
        for (int64_t r = 0; r < I::LANES; ++r) {
            counts[r] = 1.0f;
            if (r >= some) continue;
            const RowTail& tail = tails[from + r];
            distances[r] = static_cast<float>(tail.distance);
            counts[r] = static_cast<float>(most<int64_t>(tail.count, 1));
            rates[r] = rows[from + r].rate;
        }
        const auto mean = I::quotient(I::loadf(distances), I::loadf(counts));
        const auto steps = I::subf(I::nearest(I::minf(I::mulf(mean, I::loadf(rates)), end)), lift);
        const V t = I::round(I::minf(I::maxf(steps, zero), end));
        const V power = power_of_steps<I>(t);
        const V weight = I::select_le(t, I::set1(TAIL_END - 1), I::sub(I::sllv(power, bits), power));
        const V octaves = I::template shl<23>(I::sub(I::set1(127 - ONE_BITS), I::template shr<STEP_BITS>(t)));  // bits of a power of two
        I::store(exponents, t);
        I::storef(levels, I::mulf(I::to_float(weight), I::as_float(octaves)));
        for (int64_t r = 0; r < some; ++r) {
            RowTail& tail = tails[from + r];
            tail.exponent = exponents[r];
            tail.level = tail.count > 0 ? levels[r] : 0.0f;
            tail.step = fitted.step == nullptr ? rows[from + r].alpha : rows[from + r].alpha * fitted.step[unit.kv_head];
            tail.mean = static_cast<float>(tail.score) / counts[r];
        }
    }
}

// out = ((weighted + u (V_G + lambda (X - sbar V_G))) v_scale) / (sum(code) + u g), LANES of float32 at a time.
template <class I> class TailedOutput {
  public:
    TailedOutput(const Job<I>& job, const Row& row, const RowTail& tail, int64_t code_sum)
        : linear_(job.a.tail.kind == TailKind::linear && tail.level > 0), level_(I::set1f(tail.level)), step_(I::set1f(tail.step)), mean_(I::set1f(tail.mean)),
          scaled_(row, static_cast<float>(most<int64_t>(code_sum, 1)) + tail.level * static_cast<float>(tail.count)) {}

    // slope() gives X.
    template <class Slope> ATTN_INLINE typename I::F32 operator()(int64_t d, typename I::F32 weighted, typename I::F32 values, Slope slope) const {
        if (linear_) values = I::addf(values, I::mulf(step_, I::subf(slope(), I::mulf(mean_, values))));
        return scaled_(I::addf(weighted, I::mulf(level_, values)), d);
    }

  private:
    bool linear_;
    typename I::F32 level_, step_, mean_;
    Rescale<I> scaled_;
};

// `weighted(d)`, `value(d)` and `slope(d)` give LANES of float32 each.
template <class I, class Weighted, class Value, class Slope>
ATTN_INLINE void emit_tailed(const Job<I>& job, const Row& row, const RowTail& tail, int64_t code_sum, Weighted weighted, Value value, Slope slope) {
    const TailedOutput<I> output(job, row, tail, code_sum);
    const auto at = [&](int64_t d) { return output(d, weighted(d), value(d), [&] { return slope(d); }); };
    const int64_t dim = job.a.dim;
    int64_t d = 0;
    for (; d + I::LANES <= dim; d += I::LANES) I::storef(row.output + d, at(d));
    if (d == dim) return;
    alignas(64) float room[I::LANES];
    I::storef(room, at(d));
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
