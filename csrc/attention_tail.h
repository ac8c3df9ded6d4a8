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

// t and u of LANES rows, from the mean distance of their tails; no count, no level.
template <class I> struct Levels {
    typename I::I32 exponent;
    typename I::F32 level;
};
template <class I> ATTN_INLINE Levels<I> levels_of(const Job<I>& job, float lift, typename I::I32 counts, typename I::F32 mean, typename I::F32 rate) {
    const auto end = I::set1f(static_cast<float>(TAIL_END));
    const auto steps = I::subf(I::nearest(I::minf(I::mulf(mean, rate), end)), I::set1f(lift));
    const auto t = I::round(I::minf(I::maxf(steps, I::set1f(0.0f)), end));
    const auto power = power_of_steps<I>(t);
    const auto near = I::select_le(I::set1(1), counts, I::sub(I::sllv(power, I::set1(bits_of(job.a.p_max))), power));
    const auto weight = I::select_le(t, I::set1(TAIL_END - 1), near);
    const auto octaves = I::template shl<23>(I::sub(I::set1(127 - ONE_BITS), I::template shr<STEP_BITS>(t)));  // bits of a power of two
    return {t, I::mulf(I::to_float(weight), I::as_float(octaves))};
}

ATTN_INLINE float step_of(const Tail& fitted, const Row& row, int64_t kv_head) {
    return fitted.step == nullptr ? row.alpha : row.alpha * fitted.step[kv_head];
}

// From count, distance and score of some rows to the rest.
template <class I> void find_levels(const Job<I>& job, const Head<I>& unit, const Row* rows, RowTail* tails, int64_t rows_count) {
    for (int64_t from = 0; from < rows_count; from += I::LANES) {
        alignas(64) float distances[I::LANES] = {}, counts[I::LANES], rates[I::LANES] = {}, levels[I::LANES];
        alignas(64) int32_t exponents[I::LANES], present[I::LANES] = {};
        const int64_t some = least<int64_t>(I::LANES, rows_count - from);
        for (int64_t r = 0; r < I::LANES; ++r) {
            counts[r] = 1.0f;
            if (r >= some) continue;
            const RowTail& tail = tails[from + r];
            distances[r] = static_cast<float>(tail.distance);
            counts[r] = static_cast<float>(most<int64_t>(tail.count, 1));
            rates[r] = rows[from + r].rate;
            present[r] = tail.count > 0;
        }
        const Levels<I> found = levels_of<I>(job, job.a.tail.lift[unit.head], I::load(present), I::quotient(I::loadf(distances), I::loadf(counts)), I::loadf(rates));
        I::store(exponents, found.exponent);
        I::storef(levels, found.level);
        for (int64_t r = 0; r < some; ++r) {
            RowTail& tail = tails[from + r];
            tail.exponent = exponents[r];
            tail.level = levels[r];
            tail.step = step_of(job.a.tail, rows[from + r], unit.kv_head);
            tail.mean = static_cast<float>(tail.score) / counts[r];
        }
    }
}

// out = ((weighted + u (V_G + lambda (X - sbar V_G))) v_scale) / (sum(code) + u g), LANES of float32 at a time.
template <class I> class TailedOutput {
  public:
    TailedOutput(bool linear, const Row& row, int32_t count, float level, float step, float mean, int64_t code_sum)
        : linear_(linear && level > 0), level_(I::set1f(level)), step_(I::set1f(step)), mean_(I::set1f(mean)),
          scaled_(row, static_cast<float>(most<int64_t>(code_sum, 1)) + level * static_cast<float>(count)) {}

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
    const TailedOutput<I> output(job.a.tail.kind == TailKind::linear, row, static_cast<int32_t>(tail.count), tail.level, tail.step, tail.mean, code_sum);
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
template <class I> void see_all_keys(const Job<I>& job, const Head<I>& unit, const typename I::SeenQuery* query, int64_t begin, int64_t end, int32_t* to) {
    uint16_t places[I::LANES];
    int32_t sum = 0;
    for (int64_t i = 0; i < job.seen_width; ++i) sum += query[i];
    for (int i = 0; i < I::LANES; ++i) places[i] = static_cast<uint16_t>(i);
    const auto raised = I::set1(I::SEEN_OFFSET * sum);
    for (int64_t key = begin; key < end; key += I::LANES) {
        I::store(to + key, I::sub(I::see(query, unit.seen + key * job.seen_width, job.seen_width, places), raised));
    }
}

}  // namespace
}  // namespace attnpress
