// Part of attention_body.h: the tails of rows that see all packed keys, by sums over all keys less those over survivors.
#pragma once

#include "attention_matrix.h"
#include "attention_thorough.h"

namespace attnpress {
namespace {

constexpr int32_t RAISED = 128;  // makes codes of K, and of what directions see, codes of P

template <class I> bool see_all(const Head<I>& unit, const Row* rows, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
        if (rows[r].bytes != nullptr || rows[r].begin != 0 || rows[r].end != unit.count) return false;
    }
    return unit.count > 0;
}

template <class I> void add_tiles(const Job<I>& job, const int32_t* sums, int64_t padded, int32_t* to) {
    std::memset(to, 0, job.width * sizeof(*to));
    for (int64_t tile = 0; tile < padded / job.W; ++tile) {
        for (int64_t d = 0; d < job.width; ++d) to[d] += sums[tile * job.width + d];
    }
}

// K of a head turned round, raised to codes of P: [rank][padded]. What padding gets meets values of 0.
template <class I> const typename I::Prob* turned_keys(const Job<I>& job, const Head<I>& unit, Scratch<I>& scratch) {
    const int64_t rank = job.a.tail.rank, padded = unit.padded;
    auto* to = scratch.key_codes.template get<typename I::Prob>((rank + I::BLOCK) * padded);
    if (job.directed) {
        for (int64_t i = 0; i < rank; ++i) {
            for (int64_t key = 0; key < padded; ++key) to[i * padded + key] = static_cast<typename I::Prob>(unit.seen[key * job.seen_width + i] + RAISED);
        }
        return to;
    }
    const auto offset = I::set1(RAISED - I::KEY_OFFSET);
    for (int64_t base = 0; base < padded; base += job.W) {
        for (int64_t step = 0; step < job.steps; ++step) {
            for (int c = 0; c < I::COLS; ++c) {
                const auto group = I::load_codes(unit.keys + base * job.a.dim + (step * I::COLS + c) * I::LANES * I::GROUP);
                for (int g = 0; g < I::GROUP; ++g) I::store_code(to + (step * I::GROUP + g) * padded + base + c * I::LANES, I::add(I::member(group, g), offset));
            }
        }
    }
    return to;
}

// sum_A k' v^T and sum_A k', for `linear`; they stay below 2^31, since there are at most CHUNK keys.
template <class I> void sum_slopes(const Job<I>& job, const Head<I>& unit, HeadSums<I>& sums, Scratch<I>& scratch) {
    const int64_t rank = job.a.tail.rank, width = job.width, padded = unit.padded;
    const auto* codes = turned_keys(job, unit, scratch);
    auto* raw = scratch.raw.template get<int32_t>((rank + I::BLOCK) * width);
    in_groups<I>(rank, [&](auto R, int64_t first) {
        weigh<I, R.value>(job, unit, codes + first * padded, 0, padded, true, scratch, raw + first * width);
    });
    sums.largest = 0;
    for (int64_t i = 0; i < rank; ++i) {
        int32_t largest = 0;
        for (int64_t d = 0; d < width; ++d) {
            raw[i * width + d] -= RAISED * sums.values[d];
            largest = most(largest, raw[i * width + d] < 0 ? -raw[i * width + d] : raw[i * width + d]);
        }
        sums.largest = most<int64_t>(sums.largest, largest);
    }
    sums.slopes = shape_matrix<I>(rank, width, sums.largest);
    sums.slopes.tiles = sums.slope_buffer.template get<typename I::Digit>(sums.slopes.size());
    fill_matrix<I>(sums.slopes, rank, [&](int64_t i, int64_t d) -> int64_t { return raw[i * width + d]; });
    if (!job.directed) return;
    sums.seen = sums.seen_buffer.template get<int32_t>(job.seen_width);
    std::memset(sums.seen, 0, job.seen_width * sizeof(*sums.seen));
    for (int64_t key = 0; key < unit.count; ++key) {
        for (int64_t i = 0; i < job.seen_width; ++i) sums.seen[i] += unit.seen[key * job.seen_width + i];
    }
}

template <class I> const HeadSums<I>& head_sums(const Job<I>& job, const Head<I>& unit, Scratch<I>& scratch) {
    HeadSums<I>& sums = scratch.sums;
    const int64_t which = unit.batch * job.a.kv_heads + unit.kv_head;
    if (sums.of == which) return sums;
    sums.of = which;
    sums.values = sums.value_buffer.template get<int32_t>(job.width);
    add_tiles(job, unit.value_sums, unit.padded, sums.values);
    int32_t keys[MAX_DIM + 64];
    add_tiles(job, unit.key_sums, unit.padded, keys);
    int64_t largest = 255;  // two digits at least, so that the first of the ones is 1 whatever is added to them
    for (int64_t d = 0; d < job.a.dim; ++d) largest = most<int64_t>(largest, keys[d] < 0 ? -keys[d] : keys[d]);
    sums.keys = shape_matrix<I>(job.a.dim, 2, largest);
    sums.keys.tiles = sums.key_buffer.template get<typename I::Digit>(sums.keys.size());
    fill_matrix<I>(sums.keys, job.a.dim, [&](int64_t d, int64_t column) -> int64_t { return column == 0 ? keys[d] : 1; });
    if (job.a.tail.kind == TailKind::linear) sum_slopes(job, unit, sums, scratch);
    return sums;
}

// What `linear` needs of one row beyond its tail: how its query sees keys, and its survivors' scores.
struct RowSlope {
    const int32_t* applied;     // from `apply`, with the slopes of the head
    int64_t query_sum;          // of the codes that were applied
    int64_t query_magnitude;    // and of their magnitudes
    int64_t survivors;          // sum of magnitudes of the survivors' scores
    int32_t offset;             // what bytes of scores lack
};

// X of a row, modulo the range of Whole, an unsigned type.
template <class Whole, class I>
void slopes_of(const Job<I>& job, const Matrix<I>& matrix, const RowSlope& row, const int32_t* survivors, int bytes, Whole* to) {
    const int64_t width = job.width;
    const int32_t* present = survivors + (1 + bytes) * width;
    const auto common = static_cast<Whole>(-matrix.bias() * row.query_sum), offset = static_cast<Whole>(static_cast<int64_t>(row.offset));
    for (int64_t d = 0; d < width; ++d) to[d] = common - offset * static_cast<Whole>(static_cast<int64_t>(present[d]));
    for (int p = 0; p < matrix.planes; ++p) {
        const int32_t* digit = row.applied + p * matrix.columns;
        for (int64_t d = 0; d < width; ++d) to[d] += static_cast<Whole>(static_cast<int64_t>(digit[d])) << (I::DIGIT_BITS * p);
    }
    for (int byte = 0; byte < bytes; ++byte) {
        const int32_t* own = survivors + (1 + byte) * width;
        for (int64_t d = 0; d < width; ++d) to[d] -= static_cast<Whole>(static_cast<int64_t>(own[d])) << (8 * byte);
    }
}

// The tails of a pass whose rows have their survivors, and its output.
template <class I> class PassTails {
  public:
    PassTails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, int64_t count, Survivors<I>& survivors, Scratch<I>& scratch)
        : job_(job), unit_(unit), survivors_(survivors), sums_(head_sums(job, unit, scratch)) {
        const int64_t width = job.width;
        left_ = as_left<I>(codes, count * width, scratch);
        of_keys_ = scratch.mapped.template get<int32_t>(count * sums_.keys.line());
        apply<I, 8>(sums_.keys, left_, width, count, of_keys_);
        if (job.a.tail.kind != TailKind::linear) return;
        of_slopes_ = scratch.raw.template get<int32_t>(count * sums_.slopes.line());
        if (!job.directed) {
            stride_ = width;
            apply<I, 8>(sums_.slopes, left_, stride_, count, of_slopes_);
            return;
        }
        stride_ = job.seen_width;
        seen_ = scratch.slopes.template get<int16_t>(count * stride_ + 64);
        project(job, of_head(job.query_map, unit.kv_head), codes, count, nullptr, seen_, scratch);
        auto* narrow = scratch.planes.template get<typename I::Left>(count * stride_);
        for (int64_t i = 0; i < count * stride_; ++i) narrow[i] = static_cast<typename I::Left>(seen_[i]);
        left_ = narrow;
        apply<I, 8>(sums_.slopes, left_, stride_, count, of_slopes_);
    }

    void emit_row(Row& row, int64_t r) {
        const int32_t* of_keys = of_keys_ + r * sums_.keys.line();
        const int64_t query_sum = of_keys[1], seen = entry_of(sums_.keys, of_keys, 0, query_sum);
        const int64_t top = row.max - I::KEY_OFFSET * query_sum, slack = survivors_.slack_sum(row);
        RowTail tail;
        tail.count = unit_.count - row.count;
        tail.distance = unit_.count * top - seen - (static_cast<int64_t>(row.count) * row.cut - slack);
        if (job_.a.tail.kind == TailKind::mean) return emit<1>(row, tail, nullptr);
        RowSlope slope{of_slopes_ + r * sums_.slopes.line(), query_sum, 0, 0, 0};
        const auto* left = left_ + r * stride_;
        for (int64_t i = 0; i < stride_; ++i) slope.query_magnitude += left[i] < 0 ? -left[i] : left[i];
        if (!job_.directed) {
            slope.offset = static_cast<int32_t>(top) - row.cut;
            slope.survivors = static_cast<int64_t>(row.count) * (slope.offset < 0 ? -slope.offset : slope.offset) + slack;
            tail.score = seen - (static_cast<int64_t>(row.count) * slope.offset + slack);
            return emit<3>(row, tail, &slope);
        }
        int64_t scores;
        survivors_.score(job_, unit_, row, seen_ + r * stride_, scores, slope.survivors);
        slope.offset = -SCORE_OFFSET;
        slope.query_sum = 0;
        for (int64_t i = 0; i < stride_; ++i) {
            slope.query_sum += left[i];
            tail.score += static_cast<int64_t>(left[i]) * sums_.seen[i];
        }
        tail.score -= scores;
        emit<1 + SCORE_BYTES>(row, tail, &slope);
    }

  private:
    // P lists of codes: those of P, and bytes of scores.
    template <int P> void emit(Row& row, RowTail& tail, const RowSlope* slope) {
        const int64_t width = job_.width;
        alignas(64) int32_t survivors[(P + 1) * (MAX_DIM + 64)];
        alignas(64) float slopes[MAX_DIM + 64];
        const int32_t code_sum = survivors_.template weigh<P>(job_, unit_, row, survivors);
        const int32_t *present = survivors + P * width, *values = sums_.values;
        find_level(job_, unit_, row, tail);
        if constexpr (P > 1) find_slopes(*slope, survivors, P - 1, slopes);
        emit_tailed(job_, row, tail, code_sum, [&](int64_t d) { return I::to_float(I::load(survivors + d)); },
                    [&](int64_t d) { return I::to_float(I::sub(I::load(values + d), I::load(present + d))); },
                    [&](int64_t d) {
                        if constexpr (P > 1) return I::loadf(slopes + d); else return I::set1f(0.0f);
                    });
        if (job_.a.trace == nullptr) return;
        record_row(job_, row, survivors, nullptr, code_sum);
        survivors_.record_codes(job_, unit_, row);
        uint64_t exact[MAX_DIM + 64] = {};
        if constexpr (P > 1) slopes_of(job_, sums_.slopes, *slope, survivors, P - 1, exact);
        record_tail(job_, row, tail, [&](int64_t d) { return values[d] - present[d]; }, [&](int64_t d) { return static_cast<int64_t>(exact[d]); });
    }

    // float32(X), which 32 bits hold unless codes are far larger than usual.
    void find_slopes(const RowSlope& row, const int32_t* survivors, int bytes, float* to) const {
        const int64_t width = job_.width, reach = sums_.largest * row.query_magnitude + 127 * row.survivors;
        if (reach < INT32_MAX) {
            uint32_t whole[MAX_DIM + 64];
            slopes_of(job_, sums_.slopes, row, survivors, bytes, whole);
            for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(static_cast<int32_t>(whole[d]));
        } else {
            uint64_t whole[MAX_DIM + 64];
            slopes_of(job_, sums_.slopes, row, survivors, bytes, whole);
            for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(static_cast<int64_t>(whole[d]));
        }
    }

    const Job<I>& job_;
    const Head<I>& unit_;
    Survivors<I>& survivors_;
    const HeadSums<I>& sums_;
    const typename I::Left* left_;
    int16_t* seen_ = nullptr;
    int32_t *of_keys_, *of_slopes_ = nullptr;
    int64_t stride_ = 0;
};

template <class I>
void emit_tails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Survivors<I>& survivors, Scratch<I>& scratch) {
    PassTails<I> tails(job, unit, codes, count, survivors, scratch);
    for (int64_t r = 0; r < count; ++r) tails.emit_row(rows[r], r);
}

}  // namespace
}  // namespace attnpress
