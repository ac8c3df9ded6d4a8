// Part of attention_body.h: the tails of rows that see all packed keys, by sums over all keys less those over survivors.
#pragma once

#include "attention_panels.h"
#include "attention_thorough.h"

namespace attnpress {
namespace {

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
        I::turn(unit.seen, job.seen_width, rank, padded, to, padded);
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
    auto* slopes = sums.slope_buffer.template get<int32_t>((rank + I::BLOCK) * width);
    in_groups<I>(rank, [&](auto R, int64_t first) {
        weigh<I, R.value>(job, unit, codes + first * padded, 0, padded, true, scratch, slopes + first * width);
    });
    int32_t high = 0, low = 0;
    for (int64_t i = 0; i < rank; ++i) {
        for (int64_t d = 0; d < width; ++d) {
            slopes[i * width + d] -= RAISED * sums.values[d];
            high = most(high, slopes[i * width + d]);
            low = least(low, slopes[i * width + d]);
        }
    }
    sums.slopes = slopes;
    sums.largest = most<int64_t>(high, -int64_t{low});
    fill_panels(sums.panels, slopes, rank, width, sums.largest, sums.digit_buffer, sums.raised_buffer);
    if (!job.directed) return;
    const int64_t seen_width = job.seen_width;
    sums.seen = sums.seen_buffer.template get<int32_t>(seen_width + I::LANES);
    std::memset(sums.seen, 0, (seen_width + I::LANES) * sizeof(*sums.seen));
    for (int64_t i = 0; i < rank; ++i) {
        const auto* row = codes + i * padded;
        auto sum = I::set1(0);
        for (int64_t key = 0; key < padded; key += I::LANES * I::VALUE_GROUP) sum = I::dot_values(sum, I::load_codes(row + key), I::ones());
        // Padding is the same everywhere.
        sums.seen[i] = I::total(sum) - static_cast<int32_t>(padded - unit.count) * row[padded - 1] - static_cast<int32_t>(unit.count) * RAISED;
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
    int64_t largest = 0;
    for (int64_t d = 0; d < job.width; ++d) {
        keys[d] += static_cast<int32_t>(unit.count) * I::KEY_OFFSET;
        largest = most<int64_t>(largest, keys[d] < 0 ? -keys[d] : keys[d]);
    }
    sums.key_planes = 1;
    while (largest >> (I::DIGIT_BITS * sums.key_planes - I::SIGNED_DIGITS) != 0) ++sums.key_planes;
    sums.keys = sums.key_buffer.template get<typename I::Digit>(sums.key_planes * job.width);
    for (int p = 0; p < sums.key_planes; ++p) {
        for (int64_t d = 0; d < job.width; ++d) sums.keys[p * job.width + d] = digit_of<I>(keys[d], p);
    }
    if (job.a.tail.kind == TailKind::linear) sum_slopes(job, unit, sums, scratch);
    return sums;
}

// The tails of a pass whose rows have their survivors, and its output. Names in brackets are those of numerics, section 8.
//
// Sums of a row are taken modulo 2^32 where bounds say that they fit; else, and for a trace, in 64 bits.
template <class I> class PassTails {
    using V = typename I::I32;
    using Prob = typename I::Prob;
    static constexpr int64_t ROOM = (Job<I>::PASS + I::LANES - 1) / I::LANES * I::LANES;

  public:
    PassTails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Survivors<I>& survivors, Scratch<I>& scratch)
        : job_(job), unit_(unit), rows_(rows), count_(count), survivors_(survivors), scratch_(scratch), sums_(head_sums(job, unit, scratch)),
          linear_(job.a.tail.kind == TailKind::linear), exact_(job.a.trace != nullptr), queries_(as_left<I>(codes, count * job.width, scratch)) {
        const int64_t score = int64_t{job.a.q_max} * job.a.k_max * job.a.dim;
        short_distances_ = !exact_ && 2 * score * unit.count < INT32_MAX;
        for (int64_t r = 0; r < ROOM; ++r) {
            const bool inside = r < count;
            tops_[r] = inside ? rows[r].max : 0;
            cuts_[r] = inside ? rows[r].cut : 0;
            survivor_counts_[r] = inside ? rows[r].count : 0;
            rates_[r] = inside ? rows[r].rate : 0.0f;
        }
    }

    void emit(const typename I::Query* codes) {
        for (int64_t from = 0; from < count_; from += I::LANES) find_levels(from);
        if (!linear_) return emit_rows<1>();
        if (job_.directed) see_queries(codes); else raise_queries(codes);
        for (int64_t from = 0; from < count_; from += I::LANES) job_.directed ? score_seen(from) : score_whole(from);
        applied_ = scratch_.raw.template get<int32_t>((count_ + I::BLOCK) * job_.width);
        apply_panels(job_, sums_.panels, left_, stride_, count_, applied_, scratch_);
        emit_rows<1 + I::SCORE_PLANES>();
    }

  private:
    // LANES rows: g, T, and the level.
    void find_levels(int64_t from) {
        const V all = I::set1(static_cast<int32_t>(unit_.count)), survivors = I::load(survivor_counts_ + from);
        const V counts = I::sub(all, survivors);
        I::store(counts_ + from, counts);
        const auto divisor = I::to_float(I::max(counts, I::set1(1)));
        if (short_distances_) {
            V near[I::LANES];
            sum_keys(from, near);
            for (int r = 0; r < I::LANES && from + r < count_; ++r) near[r] = I::sub(near[r], survivors_.slack_sum(rows_[from + r]));
            const V reach = I::sub(I::mullo(all, I::load(tops_ + from)), I::mullo(survivors, I::load(cuts_ + from)));
            const V distance = I::sub(reach, I::totals(near));
            I::store(short_distance_ + from, distance);
            I::storef(far_ + from, I::to_float(distance));
        } else {
            for (int64_t r = from; r < from + I::LANES; ++r) {
                distance_[r] = r < count_ ? long_distance(r) : 0;
                far_[r] = static_cast<float>(distance_[r]);
            }
        }
        const Levels<I> found = levels_of<I>(job_, job_.a.tail.lift[unit_.head], counts, I::quotient(I::loadf(far_ + from), divisor), I::loadf(rates_ + from));
        I::store(exponents_ + from, found.exponent);
        I::storef(levels_ + from, found.level);
    }

    // q . sum_A k of K as it is packed, a digit's products in lanes.
    ATTN_INLINE V digit_products(int64_t r, int plane) const {
        constexpr int64_t STEP = I::LANES * I::DIGIT_GROUP;
        const auto *query = queries_ + r * job_.width;
        const auto *keys = sums_.keys + plane * job_.width;
        V sum = I::set1(0);
        for (int64_t d = 0; d < job_.width; d += STEP) sum = I::dot_digits(sum, I::load_codes(keys + d), I::load_codes(query + d));
        return sum;
    }
    // q . sum_A k of LANES rows, modulo 2^32, in lanes.
    ATTN_INLINE void sum_keys(int64_t from, V (&sums)[I::LANES]) const {
        constexpr int64_t STEP = I::LANES * I::DIGIT_GROUP;
        const int64_t width = job_.width, rows = least<int64_t>(I::LANES, count_ - from);
        for (int r = 0; r < I::LANES; ++r) sums[r] = I::set1(0);
        for (int64_t d = 0; d < width; d += STEP) {
            for (int p = 0; p < sums_.key_planes; ++p) {
                const V keys = I::load_codes(sums_.keys + p * width + d), shift = I::set1(I::DIGIT_BITS * p);
                const auto* query = queries_ + from * width + d;
                for (int64_t r = 0; r < rows; ++r) sums[r] = I::add(sums[r], I::sllv(I::dot_digits(I::set1(0), keys, I::load_codes(query + r * width)), shift));
            }
        }
    }
    int64_t long_distance(int64_t r) const {
        const Row& row = rows_[r];
        int64_t near = static_cast<int64_t>(row.count) * row.cut - I::total(survivors_.slack_sum(row));
        for (int p = 0; p < sums_.key_planes; ++p) near += I::total(digit_products(r, p)) * (int64_t{1} << (I::DIGIT_BITS * p));
        return unit_.count * int64_t{row.max} - near;
    }

    // What the directions see of queries, as they meet K and, raised to codes of P, slopes.
    void see_queries(const typename I::Query* codes) {
        stride_ = job_.seen_width;
        auto* seen = scratch_.slopes.template get<typename I::SeenQuery>(count_ * stride_ + I::LANES);
        project<I, 0>(job_, of_head(job_.query_map, unit_.kv_head), codes, count_, nullptr, seen, scratch_);
        seen_ = seen;
        auto* left = scratch_.raised.template get<Prob>((count_ + I::BLOCK) * stride_);
        for (int64_t i = 0; i < count_ * stride_; ++i) left[i] = static_cast<Prob>(seen_[i] + RAISED);
        left_ = left;
    }
    void raise_queries(const typename I::Query* codes) {
        stride_ = job_.width;
        auto* left = scratch_.raised.template get<Prob>((count_ + I::BLOCK) * stride_);
        for (int64_t i = 0; i < count_ * stride_; ++i) left[i] = static_cast<Prob>(codes[i] + RAISED);
        left_ = left;
    }

    // LANES rows: Y, and lists of the survivors' scores.
    __attribute__((noinline)) void score_seen(int64_t from) {
        const int64_t reach = MOST_SEEN * MOST_SEEN * job_.a.tail.rank;
        const bool fits = !exact_ && reach * unit_.count < INT32_MAX;
        V scores[I::LANES], raised[I::LANES];
        for (int r = 0; r < I::LANES; ++r) {
            scores[r] = raised[r] = I::set1(0);
            if (from + r >= count_) continue;
            for (int64_t i = 0; i < stride_; i += I::LANES) {
                const V query = I::load_seen(seen_ + (from + r) * stride_ + i);  // and what follows it, which counts for nothing
                scores[r] = I::add(scores[r], I::mullo(query, I::load(sums_.seen + i)));
                raised[r] = I::add(raised[r], I::select_le(I::iota(), I::set1(static_cast<int32_t>(stride_ - 1 - i)), query));
            }
        }
        I::store(raised_ + from, I::mullo(I::totals(raised), I::set1(I::SEEN_OFFSET)));
        for (int r = 0; r < I::LANES && from + r < count_; ++r) {
            const Row& row = rows_[from + r];
            V survivors = I::set1(0);
            const bool coded = survivors_.code_scores(job_, unit_, row, seen_ + (from + r) * stride_, I::set1(raised_[from + r]), survivors);
            scores[r] = I::sub(scores[r], survivors);
            offsets_[from + r] = -I::SCORE_OFFSET;
            shorts_[from + r] = fits && coded && is_short(from + r, int64_t{1 << 15} * row.count);
            if (!fits) score_[from + r] = long_score(from + r);
        }
        if (fits) I::storef(scored_ + from, I::to_float(I::totals(scores)));
        mean_scores(from, fits);
    }
    // The same where the whole score is seen: distances know the scores, and slack is what survivors have.
    void score_whole(int64_t from) {
        V queries[I::LANES];
        for (int r = 0; r < I::LANES; ++r) queries[r] = from + r < count_ ? query_sum(from + r) : I::set1(0);
        const V top = I::sub(I::load(tops_ + from), I::mullo(I::totals(queries), I::set1(I::KEY_OFFSET)));
        I::store(offsets_ + from, I::sub(top, I::load(cuts_ + from)));
        if (short_distances_) I::storef(scored_ + from, I::to_float(I::sub(I::mullo(I::load(counts_ + from), top), I::load(short_distance_ + from))));
        for (int64_t r = from; r < least(from + I::LANES, count_); ++r) {
            const int64_t count = rows_[r].count, offset = offsets_[r];
            if (!short_distances_) score_[r] = counts_[r] * (offset + cuts_[r]) - distance_[r];
            shorts_[r] = !exact_ && is_short(r, count * ((offset < 0 ? -offset : offset) + (1 << 15)));
        }
        mean_scores(from, short_distances_);
    }
    void mean_scores(int64_t from, bool scored) {
        for (int64_t r = from; !scored && r < from + I::LANES; ++r) scored_[r] = r < count_ ? static_cast<float>(score_[r]) : 0.0f;
        I::storef(means_ + from, I::quotient(I::loadf(scored_ + from), I::to_float(I::max(I::load(counts_ + from), I::set1(1)))));
    }
    ATTN_INLINE V query_sum(int64_t r) const {
        V sum = I::set1(0);
        if constexpr (I::KEY_OFFSET != 0) {
            for (int64_t d = 0; d < job_.width; d += I::LANES * I::VALUE_GROUP) sum = I::add(sum, I::sub(I::dot_values(I::set1(0), I::load_codes(left_ + r * stride_ + d), I::ones()), I::set1(RAISED * I::VALUE_GROUP)));
        }
        return sum;
    }
    int64_t long_score(int64_t r) {
        int64_t score = 0;
        for (int64_t i = 0; i < stride_; ++i) score += int64_t{seen_[r * stride_ + i]} * sums_.seen[i];
        for (int i = 0; i < rows_[r].count; i += I::LANES) score -= I::total(score_at(r, i));
        return score;
    }
    ATTN_INLINE V score_at(int64_t r, int i) const {
        if (job_.directed) return survivors_.scores_at(job_, unit_, rows_[r], seen_ + r * stride_, I::set1(raised_[r]), i);
        return I::add(survivors_.slack_at(rows_[r], i), I::set1(offsets_[r]));
    }

    // Whether X fits 32 bits: it is at most the largest slope times the magnitudes of the query's codes, and 127 times those of the
    // survivors' scores.
    ATTN_INLINE bool is_short(int64_t r, int64_t survivors) const {
        const int64_t room = INT32_MAX - 127 * survivors;
        if (sums_.panels.planes == 0) return false;
        if (sums_.largest * MOST_SEEN * job_.a.tail.rank < room) return true;
        int64_t magnitude = 0;
        for (int64_t i = 0; i < stride_; ++i) magnitude += left_[r * stride_ + i] < RAISED ? RAISED - left_[r * stride_ + i] : left_[r * stride_ + i] - RAISED;
        return sums_.largest * magnitude < room;
    }

    RowTail tail_of(int64_t r) const {
        return {counts_[r], distance_[r], linear_ ? score_[r] : 0, exponents_[r], levels_[r], step_of(job_.a.tail, rows_[r], unit_.kv_head), linear_ ? means_[r] : 0.0f};
    }

    // The last row first, since lists of any scores reach into those of the next row.
    template <int P> __attribute__((noinline)) void emit_rows() {
        for (int64_t r = count_ - 1; r >= 0; --r) {
            if (exact_ || (P > 1 && !shorts_[r])) emit_exact(r); else emit_row<P>(r);
        }
    }

    // P lists of codes: those of P, and of scores. Sums stay in registers.
    template <int P> ATTN_INLINE void emit_row(int64_t r) {
        if (job_.width == job_.W && job_.a.dim == job_.W) return emit_tiles<P, 1, true>(r, 0, job_.W);  // usual
        constexpr int T = I::SUMS / ((P + 1) * I::COLS) >= 2 ? 2 : 1;
        int64_t d = 0;
        for (; d + T * job_.W <= job_.width; d += T * job_.W) emit_tiles<P, T, false>(r, d, job_.width);
        if constexpr (T > 1) {
            if (d < job_.width) emit_tiles<P, 1, false>(r, d, job_.width);
        }
    }

    template <int P, int T, bool WHOLE> ATTN_INLINE void emit_tiles(int64_t r, int64_t first, int64_t width) {
        V acc[P + 1][T * I::COLS];
        const Row& row = rows_[r];
        const int32_t code_sum = survivors_.template weigh_tiles<P, T>(unit_, width, row, first, acc);
        const TailedOutput<I> output(P > 1, row, counts_[r], levels_[r], P > 1 ? step_of(job_.a.tail, row, unit_.kv_head) : 0.0f, P > 1 ? means_[r] : 0.0f, code_sum);
        const V offset = I::set1(P > 1 ? offsets_[r] : 0);
        const int32_t *applied = P > 1 ? applied_ + r * width : nullptr, *all_values = sums_.values;
        const int64_t dim = WHOLE ? width : job_.a.dim;
#pragma GCC unroll 8
        for (int c = 0; c < T * I::COLS; ++c) {
            const int64_t d = first + c * I::LANES;
            if (!WHOLE && d >= dim) break;
            const auto values = I::to_float(I::sub(I::load(all_values + d), acc[P][c]));
            const auto out = output(d, I::to_float(acc[0][c]), values, [&] {
                if constexpr (P == 1) return I::set1f(0.0f);
                V x = I::sub(I::load(applied + d), I::mullo(offset, acc[P][c]));
#pragma GCC unroll 4
                for (int p = 1; p < P; ++p) x = I::sub(x, p == 1 ? acc[p][c] : I::template shl<8>(acc[p][c]));
                return I::to_float(x);
            });
            if (WHOLE || d + I::LANES <= dim) {
                I::storef(row.output + d, out);
            } else {
                alignas(64) float room[I::LANES];
                I::storef(room, out);
                std::memcpy(row.output + d, room, (dim - d) * sizeof(float));
            }
        }
    }

    // Any row, in 64 bits.
    __attribute__((noinline)) void emit_exact(int64_t r) {
        constexpr int P = 1 + SCORE_BYTES;
        const int64_t width = job_.width;
        const Row& row = rows_[r];
        alignas(64) int32_t survivors[(P + 1) * (MAX_DIM + 64)];
        int64_t exact[MAX_DIM + 64] = {};
        alignas(64) float slopes[MAX_DIM + 64];
        if (linear_) survivors_.code_any_scores(row, [&](int i) { return score_at(r, i); });
        const int32_t code_sum = linear_ ? survivors_.template weigh<P>(job_, unit_, row, survivors) : survivors_.template weigh<1>(job_, unit_, row, survivors);
        const int32_t *present = survivors + (linear_ ? P : 1) * width, *values = sums_.values;
        if (linear_) {
            for (int64_t i = 0; i < job_.a.tail.rank; ++i) {
                const int64_t code = left_[r * stride_ + i] - RAISED;
                for (int64_t d = 0; d < width; ++d) exact[d] += code * sums_.slopes[i * width + d];
            }
            for (int64_t d = 0; d < width; ++d) {
                exact[d] += int64_t{SCORE_OFFSET} * present[d];
                for (int byte = 0; byte < SCORE_BYTES; ++byte) exact[d] -= survivors[(1 + byte) * width + d] * (int64_t{1} << (8 * byte));
                slopes[d] = static_cast<float>(exact[d]);
            }
        }
        const RowTail tail = tail_of(r);
        emit_tailed(job_, row, tail, code_sum, [&](int64_t d) { return I::to_float(I::load(survivors + d)); },
                    [&](int64_t d) { return I::to_float(I::sub(I::load(values + d), I::load(present + d))); }, [&](int64_t d) { return I::loadf(slopes + d); });
        if (job_.a.trace == nullptr) return;
        record_row(job_, row, survivors, nullptr, code_sum);
        survivors_.record_codes(job_, unit_, row);
        record_tail(job_, row, tail, [&](int64_t d) { return values[d] - present[d]; }, [&](int64_t d) { return exact[d]; });
    }

    const Job<I>& job_;
    const Head<I>& unit_;
    Row* rows_;
    int64_t count_;
    Survivors<I>& survivors_;
    Scratch<I>& scratch_;
    const HeadSums<I>& sums_;
    const bool linear_, exact_;
    bool short_distances_;
    const typename I::Left* queries_;          // codes, as digits meet them
    const typename I::SeenQuery* seen_ = nullptr;  // q'
    const Prob* left_ = nullptr;               // q', or codes of Q where the whole score is seen, raised
    int64_t stride_ = 0;
    int32_t* applied_ = nullptr;               // [count][width]: q' . sum_A k' v^T modulo 2^32
    alignas(64) int32_t tops_[ROOM], cuts_[ROOM], survivor_counts_[ROOM], counts_[ROOM], exponents_[ROOM], short_distance_[ROOM];
    alignas(64) float rates_[ROOM], far_[ROOM], levels_[ROOM], scored_[ROOM], means_[ROOM];
    alignas(64) int32_t offsets_[ROOM], raised_[ROOM];  // what lists of scores lack; what a score has too much
    int64_t distance_[ROOM], score_[ROOM];              // T and Y where 32 bits do not do
    bool shorts_[ROOM];                                 // X fits 32 bits
};

// Out of line, so that calls without a tail keep their registers.
template <class I>
__attribute__((noinline)) void emit_tails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Survivors<I>& survivors, Scratch<I>& scratch) {
    PassTails<I>(job, unit, codes, rows, count, survivors, scratch).emit(codes);
}

}  // namespace
}  // namespace attnpress
