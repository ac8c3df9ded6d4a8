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

// What `linear` needs of one row beyond its tail: its query times the slopes of the head, and the offset of its survivors' scores.
struct RowSlope {
    const int32_t* applied = nullptr;  // digits, from `apply`
    int64_t query_sum = 0;             // of the codes that were applied
    int32_t offset = 0;                // what the bytes of scores lack
    bool is_short = true;              // X fits 32 bits
};

// X of a row, exact.
template <class I>
void slopes_of(const Job<I>& job, const Matrix<I>& matrix, const RowSlope& row, const int32_t* survivors, int bytes, int64_t* to) {
    const int64_t width = job.width;
    for (int64_t d = 0; d < width; ++d) {
        to[d] = entry_of(matrix, row.applied, d, row.query_sum) - static_cast<int64_t>(row.offset) * survivors[(1 + bytes) * width + d];
        for (int byte = 0; byte < bytes; ++byte) to[d] -= survivors[(1 + byte) * width + d] * (int64_t{1} << (8 * byte));
    }
}

// LANES of X modulo 2^32, from sums over survivors: of `bytes` bytes of their scores, and of 1.
template <class I> class ShortSlopes {
  public:
    ShortSlopes() = default;  // of no slopes
    ShortSlopes(const Matrix<I>& matrix, const RowSlope& row)
        : applied_(row.applied), columns_(matrix.columns), planes_(matrix.planes),
          common_(I::set1(static_cast<int32_t>(static_cast<uint64_t>(-matrix.bias() * row.query_sum)))),
          offset_(I::set1(row.offset)) {}
    template <int BYTES, class Bytes> ATTN_INLINE typename I::I32 at(int64_t d, typename I::I32 present, Bytes bytes) const {
        typename I::I32 x = I::sub(common_, I::mullo(offset_, present));
        for (int p = 0; p < planes_; ++p) x = I::add(x, I::sllv(I::load(applied_ + p * columns_ + d), I::set1(I::DIGIT_BITS * p)));
#pragma GCC unroll 4
        for (int byte = 0; byte < BYTES; ++byte) x = I::sub(x, I::sllv(bytes(byte), I::set1(8 * byte)));
        return x;
    }

  private:
    const int32_t* applied_ = nullptr;
    int64_t columns_ = 0;
    int planes_ = 0;
    typename I::I32 common_ = I::set1(0), offset_ = I::set1(0);
};

// The tails of a pass whose rows have their survivors, and its output.
template <class I> class PassTails {
  public:
    PassTails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Survivors<I>& survivors, Scratch<I>& scratch)
        : job_(job), unit_(unit), rows_(rows), count_(count), survivors_(survivors), scratch_(scratch), sums_(head_sums(job, unit, scratch)) {
        left_ = as_left<I>(codes, count * job.width, scratch);
        stride_ = job.width;
        sum_rows();
        if (job.a.tail.kind == TailKind::mean) return;
        if (job.directed) see_queries(codes);
        auto* applied = scratch.raw.template get<int32_t>(count * sums_.slopes.line());
        apply<I, 8>(sums_.slopes, left_, stride_, count, applied);
        for (int64_t r = 0; r < count; ++r) slopes_[r].applied = applied + r * sums_.slopes.line();
    }

    void emit() {
        if (job_.a.tail.kind == TailKind::linear) {
            for (int64_t r = 0; r < count_; ++r) job_.directed ? score_seen(r) : score_whole(r);
        }
        find_levels(job_, unit_, rows_, tails_, count_);
        for (int64_t r = 0; r < count_; ++r) {
            if (job_.a.tail.kind == TailKind::mean) emit_row<1>(r); else if (job_.directed) emit_row<1 + SCORE_BYTES>(r); else emit_row<3>(r);
        }
    }

  private:
    // What follows from the sums of keys: g and T, and the parts of Y and X for which queries are taken as they are.
    void sum_rows() {
        auto* of_keys = scratch_.mapped.template get<int32_t>(count_ * sums_.keys.line());
        apply<I, 8>(sums_.keys, left_, stride_, count_, of_keys);
        for (int64_t r = 0; r < count_; ++r) {
            const Row& row = rows_[r];
            const int32_t* applied = of_keys + r * sums_.keys.line();
            const int64_t query_sum = applied[1], seen = entry_of(sums_.keys, applied, 0, query_sum);
            const int64_t top = row.max - I::KEY_OFFSET * query_sum;
            slack_[r] = survivors_.slack_sum(row);
            tails_[r].count = unit_.count - row.count;
            tails_[r].distance = unit_.count * top - seen - (static_cast<int64_t>(row.count) * row.cut - slack_[r]);
            tails_[r].score = seen;
            slopes_[r].query_sum = query_sum;
            slopes_[r].offset = static_cast<int32_t>(top) - row.cut;
        }
    }

    // From here on queries are what the directions see of them.
    void see_queries(const typename I::Query* codes) {
        stride_ = job_.seen_width;
        seen_ = scratch_.slopes.template get<int16_t>(count_ * stride_ + 64);
        project(job_, of_head(job_.query_map, unit_.kv_head), codes, count_, nullptr, seen_, scratch_);
        if constexpr (std::is_same_v<typename I::Left, int16_t>) {
            left_ = seen_;
        } else {
            auto* narrow = scratch_.planes.template get<typename I::Left>(count_ * stride_ + 64);
            for (int64_t i = 0; i < count_ * stride_; ++i) narrow[i] = static_cast<typename I::Left>(seen_[i]);
            left_ = narrow;
        }
    }

    // Y, and the offset of scores that are those of the row, whose slack is their bytes.
    void score_whole(int64_t r) {
        const int64_t count = rows_[r].count, offset = slopes_[r].offset;
        tails_[r].score -= count * offset + slack_[r];
        note_reach(r, count * (offset < 0 ? -offset : offset) + slack_[r]);
    }

    // The same where scores are what the directions see.
    void score_seen(int64_t r) {
        const Row& row = rows_[r];
        auto* scores = scratch_.projected.template get<int32_t>(unit_.padded + 64);
        RowTail& tail = tails_[r];
        RowSlope& slope = slopes_[r];
        survivors_.score(job_, unit_, row, seen_ + r * stride_, scores);
        tail.score = -survivors_.code_scores(row, scores);
        slope.query_sum = 0;
        slope.offset = -SCORE_OFFSET;
        for (int64_t i = 0; i < stride_; ++i) {
            slope.query_sum += left_[r * stride_ + i];
            tail.score += static_cast<int64_t>(left_[r * stride_ + i]) * sums_.seen[i];
        }
        note_reach(r, row.count * (MOST_SEEN * MOST_SEEN * job_.a.tail.rank));
    }

    // Whether X fits 32 bits: it is at most the largest slope times the magnitudes of the query's codes, and 127 times those of the
    // survivors' scores.
    ATTN_INLINE void note_reach(int64_t r, int64_t survivors) {
        const int64_t room = INT32_MAX - 127 * survivors;
        if (sums_.largest * MOST_SEEN * job_.a.tail.rank < room) return;
        int64_t magnitude = 0;
        for (int64_t i = 0; i < stride_; ++i) magnitude += left_[r * stride_ + i] < 0 ? -left_[r * stride_ + i] : left_[r * stride_ + i];
        slopes_[r].is_short = sums_.largest * magnitude < room;
    }

    // P lists of codes: those of P, and bytes of scores.
    template <int P> void emit_row(int64_t r) {
        const Row& row = rows_[r];
        const ShortSlopes<I> slopes = P > 1 ? ShortSlopes<I>(sums_.slopes, slopes_[r]) : ShortSlopes<I>();
        if (job_.width != job_.W || job_.a.dim != job_.W || job_.a.trace != nullptr || !slopes_[r].is_short) return emit_stored<P>(r, slopes);
        typename I::I32 acc[P + 1][I::COLS];  // usual: all in registers
        const int32_t code_sum = survivors_.template weigh_in_registers<P>(job_, unit_, row, acc);
        const TailedOutput<I> output(job_, row, tails_[r], code_sum);
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) {
            const int64_t d = c * I::LANES;
            const auto values = I::to_float(I::sub(I::load(sums_.values + d), acc[P][c]));
            I::storef(row.output + d, output(d, I::to_float(acc[0][c]), values, [&] {
                return I::to_float(slopes.template at<P - 1>(d, acc[P][c], [&](int byte) { return acc[1 + byte][c]; }));
            }));
        }
    }

    template <int P> __attribute__((noinline)) void emit_stored(int64_t r, const ShortSlopes<I>& slopes) {
        const int64_t width = job_.width;
        const Row& row = rows_[r];
        alignas(64) int32_t survivors[(P + 1) * (MAX_DIM + 64)];
        int64_t exact[MAX_DIM + 64] = {};
        alignas(64) float wide[MAX_DIM + 64];
        const int32_t code_sum = survivors_.template weigh<P>(job_, unit_, row, survivors);
        const int32_t *present = survivors + P * width, *values = sums_.values;
        const bool is_short = slopes_[r].is_short;
        if (P > 1 && (!is_short || job_.a.trace != nullptr)) {
            slopes_of(job_, sums_.slopes, slopes_[r], survivors, P - 1, exact);
            for (int64_t d = 0; d < width; ++d) wide[d] = static_cast<float>(exact[d]);
        }
        emit_tailed(job_, row, tails_[r], code_sum, [&](int64_t d) { return I::to_float(I::load(survivors + d)); },
                    [&](int64_t d) { return I::to_float(I::sub(I::load(values + d), I::load(present + d))); },
                    [&](int64_t d) {
                        if constexpr (P == 1) return I::set1f(0.0f);
                        if (!is_short) return I::loadf(wide + d);
                        return I::to_float(slopes.template at<P - 1>(d, I::load(present + d), [&](int byte) { return I::load(survivors + (1 + byte) * width + d); }));
                    });
        if (job_.a.trace == nullptr) return;
        record_row(job_, row, survivors, nullptr, code_sum);
        survivors_.record_codes(job_, unit_, row);
        record_tail(job_, row, tails_[r], [&](int64_t d) { return values[d] - present[d]; }, [&](int64_t d) { return exact[d]; });
    }

    const Job<I>& job_;
    const Head<I>& unit_;
    Row* rows_;
    int64_t count_;
    Survivors<I>& survivors_;
    Scratch<I>& scratch_;
    const HeadSums<I>& sums_;
    const typename I::Left* left_;
    int16_t* seen_ = nullptr;
    int64_t stride_;
    RowTail tails_[Job<I>::PASS];
    RowSlope slopes_[Job<I>::PASS];
    int64_t slack_[Job<I>::PASS];
};

// Out of line, so that calls without a tail keep their registers.
template <class I>
__attribute__((noinline)) void emit_tails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Survivors<I>& survivors, Scratch<I>& scratch) {
    PassTails<I>(job, unit, codes, rows, count, survivors, scratch).emit();
}

}  // namespace
}  // namespace attnpress
