// Part of attention_body.h: from the survivors of a pass to its output.
#pragma once

#include "attention_scores.h"

namespace attnpress {
namespace {

// acc = sum over the list of code * value, T tiles of W columns at a time; returns the sum of codes.
template <class I, int T>
ATTN_INLINE int32_t gather(const typename I::Value* values, int64_t width, const uint16_t* keys, const typename I::Prob* codes, int64_t count, typename I::I32 (&acc)[T * I::COLS]) {
#pragma GCC unroll 16
    for (int c = 0; c < T * I::COLS; ++c) acc[c] = I::set1(0);
    typename I::I32 sum = I::set1(0);
    const auto ones = I::ones();
    for (int64_t i = 0; i < count; i += I::VALUE_GROUP) {
        const typename I::Value* from[I::VALUE_GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < I::VALUE_GROUP; ++g) from[g] = values + keys[i + g] * width;
        const typename I::I32 group = I::broadcast(codes + i);
        sum = I::dot_values(sum, group, ones);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            typename I::I32 columns[I::COLS];
            I::interleave(from, t * I::COLS * I::LANES, columns);
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) acc[t * I::COLS + c] = I::dot_values(acc[t * I::COLS + c], group, columns[c]);
        }
    }
    return I::first(sum);
}

template <class I, int T>
ATTN_INLINE int32_t gather_to(const typename I::Value* values, int64_t width, const uint16_t* keys, const typename I::Prob* codes, int64_t count, int32_t* weighted) {
    typename I::I32 acc[T * I::COLS];
    const int32_t sum = gather<I, T>(values, width, keys, codes, count, acc);
#pragma GCC unroll 16
    for (int c = 0; c < T * I::COLS; ++c) I::store(weighted + c * I::LANES, acc[c]);
    return sum;
}

// The same for P lists of codes at once, `plane` apart, and in acc[P] for a 1 wherever the first has a code; returns the sum
// of the first.
template <class I, int P, int T>
ATTN_INLINE int32_t gather_planes(const typename I::Value* values, int64_t width, const uint16_t* keys, const typename I::Prob* codes, int64_t plane, int64_t count, typename I::I32 (&acc)[P + 1][T * I::COLS]) {
#pragma GCC unroll 8
    for (int p = 0; p <= P; ++p) {
#pragma GCC unroll 16
        for (int c = 0; c < T * I::COLS; ++c) acc[p][c] = I::set1(0);
    }
    typename I::I32 sum = I::set1(0);
    const auto ones = I::ones();
    for (int64_t i = 0; i < count; i += I::VALUE_GROUP) {
        const typename I::Value* from[I::VALUE_GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < I::VALUE_GROUP; ++g) from[g] = values + keys[i + g] * width;
        typename I::I32 group[P + 1];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) group[p] = I::broadcast(codes + p * plane + i);
        group[P] = I::at_most_one(group[0]);
        sum = I::dot_values(sum, group[0], ones);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            typename I::I32 columns[I::COLS];
            I::interleave(from, t * I::COLS * I::LANES, columns);
#pragma GCC unroll 8
            for (int p = 0; p <= P; ++p) {
#pragma GCC unroll 4
                for (int c = 0; c < I::COLS; ++c) acc[p][t * I::COLS + c] = I::dot_values(acc[p][t * I::COLS + c], group[p], columns[c]);
            }
        }
    }
    return I::first(sum);
}

template <class I, int P, int T>
ATTN_INLINE int32_t gather_planes_to(const typename I::Value* values, int64_t width, const uint16_t* keys, const typename I::Prob* codes, int64_t plane, int64_t count, int32_t* to) {
    typename I::I32 acc[P + 1][T * I::COLS];
    const int32_t sum = gather_planes<I, P, T>(values, width, keys, codes, plane, count, acc);
#pragma GCC unroll 8
    for (int p = 0; p <= P; ++p) {
#pragma GCC unroll 16
        for (int c = 0; c < T * I::COLS; ++c) I::store(to + p * width + c * I::LANES, acc[p][c]);
    }
    return sum;
}

template <class I, int P> int32_t weigh_planes(const Job<I>& job, const typename I::Value* values, const uint16_t* keys, const typename I::Prob* codes, int64_t plane, int64_t count, int32_t* to) {
    constexpr int T = I::SUMS / ((P + 1) * I::COLS) >= 2 ? 2 : 1;
    int32_t sum = 0;
    int64_t d = 0;
    for (; d + T * job.W <= job.width; d += T * job.W) sum = gather_planes_to<I, P, T>(values + d, job.width, keys, codes, plane, count, to + d);
    if constexpr (T > 1) {
        if (d < job.width) sum = gather_planes_to<I, P, 1>(values + d, job.width, keys, codes, plane, count, to + d);
    }
    return sum;
}

// Past the list, up to a whole group, codes must be 0 and keys must exist.
template <class I> int32_t weigh_list(const Job<I>& job, const typename I::Value* values, const uint16_t* keys, const typename I::Prob* codes, int64_t count, int32_t* weighted) {
    int32_t sum = 0;
    for (int64_t d = 0; d < job.width;) {
        const int64_t tiles = (job.width - d) / job.W;
        if (tiles >= 4) {
            sum = gather_to<I, 4>(values + d, job.width, keys, codes, count, weighted + d);
            d += 4 * job.W;
        } else if (tiles >= 2) {
            sum = gather_to<I, 2>(values + d, job.width, keys, codes, count, weighted + d);
            d += 2 * job.W;
        } else {
            sum = gather_to<I, 1>(values + d, job.width, keys, codes, count, weighted + d);
            d += job.W;
        }
    }
    return sum;
}

// Asks memory for the lines of a row's output, well before they are written.
ATTN_INLINE void ask_output(const Row& row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(row.output + d, 1);
}

// out = (weighted * v_scale) / divisor. Weighted sums are 32-bit, or 64-bit where keys fill several chunks.
template <class I> struct Rescale {
    const float* scale;
    typename I::F32 by, inverse;
    Rescale(const Row& row, float divisor) : scale(row.scale), by(I::set1f(divisor)), inverse(I::set1f(1.0f / divisor)) {}
    ATTN_INLINE typename I::F32 operator()(typename I::F32 sum, int64_t d) const {
        return I::divide(I::mulf(sum, I::loadf(scale + d)), by, inverse);
    }
};

template <class I> void record_row(const Job<I>& job, const Row& row, const int32_t* weighted, const int64_t* wide, int64_t code_sum) {
    const Trace& trace = *job.a.trace;
    trace.code_sum[row.place] = code_sum;
    const bool empty = row.max == LOW;
    trace.row_max[row.place] = empty ? 0 : row.max - I::KEY_OFFSET * row.query_sum;
    for (int64_t d = 0; d < job.a.dim; ++d) trace.weighted[row.place * job.a.dim + d] = wide == nullptr ? weighted[d] : wide[d];
}

template <class I> void emit(const Job<I>& job, const Row& row, const int32_t* weighted, const int64_t* wide, int64_t code_sum) {
    const Attention& a = job.a;
    const Rescale<I> scaled(row, a.mode == ProbMode::unit ? static_cast<float>(a.p_max) : static_cast<float>(most<int64_t>(code_sum, 1)));
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
    if (a.trace != nullptr) record_row(job, row, weighted, wide, code_sum);
}

// Survivors of a pass, row after row. Each row ends on a whole group, filled up with what codes to 0.
template <class I> class Survivors {
  public:
    Survivors(const Job<I>& job, const Head<I>& unit, Scratch<I>& scratch)
        : room_(Job<I>::PASS * (unit.padded + I::VALUE_GROUP) + 64),
          keys_(scratch.list_keys.template get<uint16_t>(room_)), slack_(scratch.list_slack.template get<uint16_t>(room_)),
          codes_(scratch.listed.template get<typename I::Prob>(room_ * (job.a.tail.kind == TailKind::linear ? 1 + SCORE_BYTES : 1))),
          slack_bytes_(job.a.tail.kind == TailKind::linear && !job.directed) {}

    // list(keys, slack) writes the survivors of the row there, and returns how many.
    template <class List> ATTN_INLINE void add(Row& row, List list) {
        uint16_t *keys = keys_ + end_, *slack = slack_ + end_;
        const int count = list(keys, slack);
        I::store_short(keys + count, I::set1_short(0));
        I::store_short(slack + count, I::set1_short(-1));
        row.first = end_;
        row.count = count;
        end_ += round_up(count, I::VALUE_GROUP);
    }

    // Codes of rows with the same cut and rate at once: few survivors a row would leave most lanes empty.
    void code(const Job<I>& job, const Row* rows, int64_t count) {
        for (int64_t r = 0, next; r < count; r = next) {
            for (next = r + 1; next < count && rows[next].rate == rows[r].rate && rows[next].cut == rows[r].cut;) ++next;
            code_run(job, rows[r], rows[r].first, next < count ? rows[next].first : end_);
        }
    }

    void emit_row(const Job<I>& job, const Head<I>& unit, const Row& row, int32_t* weighted) const {
        const uint16_t* keys = keys_ + row.first;
        const auto* codes = codes_ + row.first;
        if (job.width == job.W && job.a.dim == job.W && job.a.trace == nullptr) {  // usual: all in registers
            typename I::I32 acc[I::COLS];
            const int32_t sum = gather<I, 1>(unit.values, job.W, keys, codes, row.count, acc);
            const Rescale<I> scaled(row, static_cast<float>(most(sum, 1)));
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) I::storef(row.output + c * I::LANES, scaled(I::to_float(acc[c]), c * I::LANES));
            return;
        }
        const int32_t sum = weigh_list(job, unit.values, keys, codes, row.count, weighted);
        emit(job, row, weighted, nullptr, sum);
        if (job.a.trace != nullptr) record_codes(job, unit, row);
    }

    void record_codes(const Job<I>& job, const Head<I>& unit, const Row& row) const {
        uint8_t* traced = job.a.trace->p_codes + row.place * job.a.key_rows;
        for (int64_t i = row.first; i < row.first + row.count; ++i) traced[unit.mask.packed[keys_[i]]] = static_cast<uint8_t>(codes_[i]);
    }

    // Sums over the survivors of a row, for its tail: [P + 1][width], see `gather_planes`; returns the sum of codes.
    template <int P> int32_t weigh(const Job<I>& job, const Head<I>& unit, const Row& row, int32_t* sums) const {
        return weigh_planes<I, P>(job, unit.values, keys_ + row.first, codes_ + row.first, room_, row.count, sums);
    }

    // The same, with sums in registers, of T tiles from column d.
    template <int P, int T> ATTN_INLINE int32_t weigh_tiles(const Head<I>& unit, int64_t width, const Row& row, int64_t d, typename I::I32 (&sums)[P + 1][T * I::COLS]) const {
        return gather_planes<I, P, T>(unit.values + d, width, keys_ + row.first, codes_ + row.first, room_, row.count, sums);
    }

    // Slack of a row's survivors, summed in lanes; below 2^15 * 2^16.
    ATTN_INLINE typename I::I32 slack_sum(const Row& row) const { return I::sum_shorts(slack_ + row.first, row.count); }

    // Scores of LANES survivors of a row, from the i-th, as the directions see them; 0 past the last. `raised`: what each has too much.
    ATTN_INLINE typename I::I32 scores_at(const Job<I>& job, const Head<I>& unit, const Row& row, const typename I::SeenQuery* query, typename I::I32 raised, int i) const {
        // Past the last, vectors of zeros end the lists, or the next row's keys follow.
        const auto scores = I::see(query, unit.seen, job.seen_width, keys_ + row.first + i);
        return I::select_le(I::iota(), I::set1(row.count - 1 - i), I::sub(scores, raised));
    }

    // Those scores as SCORE_PLANES lists beside the codes, if 16 bits hold them. Adds them to `sum`, in lanes. Rows come in order: a vector
    // reaches into the next.
    ATTN_INLINE bool code_scores(const Job<I>& job, const Head<I>& unit, const Row& row, const typename I::SeenQuery* query, typename I::I32 raised, typename I::I32& sum) {
        const auto half = I::set1(1 << 15);
        bool fits = true;
        for (int i = 0; i < row.count; i += I::LANES) {
            const auto scores = scores_at(job, unit, row, query, raised, i), above = I::add(scores, half);
            sum = I::add(sum, scores);
            fits &= !I::passes_short(above);
            store_score(row.first + i, I::SCORE_OFFSET == 0 ? scores : I::select_le(I::iota(), I::set1(row.count - 1 - i), above));
        }
        return fits;
    }

    // Any scores, raised by SCORE_OFFSET, as SCORE_BYTES lists of bytes; 0 past the last. `score(i)` gives LANES of them.
    template <class Score> void code_any_scores(const Row& row, Score score) {
        const auto low = I::set1(255), offset = I::set1(SCORE_OFFSET);
        for (int i = 0; i < row.count; i += I::LANES) {
            const int64_t at = row.first + i;
            const auto raised = I::select_le(I::iota(), I::set1(row.count - 1 - i), I::add(score(i), offset));
            I::store_code(codes_ + room_ + at, I::band(raised, low));
            I::store_code(codes_ + 2 * room_ + at, I::band(I::template shr<8>(raised), low));
            I::store_code(codes_ + 3 * room_ + at, I::template shr<16>(raised));
        }
    }

    ATTN_INLINE typename I::I32 slack_at(const Row& row, int i) const { return I::load_short(slack_ + row.first + i); }

  private:
    void code_run(const Job<I>& job, const Row& row, int64_t begin, int64_t end) {
        const auto rate = I::set1f(row.rate);
        const auto cut = I::set1(row.cut), bits = I::set1(bits_of(job.a.p_max));
        for (int64_t i = begin; i < end; i += I::LANES) {
            const auto distance = I::sub(cut, I::load_short(slack_ + i));
            I::store_code(codes_ + i, I::select_le(distance, cut, row_code<I>(probability<I>(distance, rate), bits)));
        }
        if (slack_bytes_) code_slack(begin, end);
    }

    // What fills a group up has a slack below 0, and gets 0.
    __attribute__((noinline)) void code_slack(int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += I::LANES) store_score(i, I::max(I::load_short(slack_ + i), I::set1(0)));
    }

    // 16 bits each.
    ATTN_INLINE void store_score(int64_t at, typename I::I32 scores) {
        if constexpr (I::SCORE_PLANES == 1) {
            I::store_code(codes_ + room_ + at, scores);
        } else {
            I::store_code(codes_ + room_ + at, I::band(scores, I::set1(255)));
            I::store_code(codes_ + 2 * room_ + at, I::template shr<8>(scores));
        }
    }

    const int64_t room_;
    uint16_t *keys_, *slack_;  // slack: cut minus distance
    typename I::Prob* codes_;  // and, with `linear`, SCORE_BYTES more lists, room_ apart
    const bool slack_bytes_;
    int64_t end_ = 0;
};

}  // namespace
}  // namespace attnpress
