// Part of attention_body.h: the thorough way, for any rule and mode, and rows where most pairs survive.
#pragma once

#include "attention_stream.h"
#include "attention_tail.h"

namespace attnpress {
namespace {

// Values of all packed keys as dense tiles [width / W][padded / VALUE_GROUP][W][VALUE_GROUP].
template <class I> const typename I::Value* panel(const Job<I>& job, const Head<I>& unit, Scratch<I>& scratch) {
    auto* to = scratch.panel.template get<typename I::Value>(unit.padded * job.width);
    const int64_t which = unit.batch * job.a.kv_heads + unit.kv_head;
    if (scratch.panel_of == which) return to;
    scratch.panel_of = which;
    for (int64_t d = 0; d < job.width; d += job.W) {
        for (int64_t key = 0; key < unit.padded; key += I::VALUE_GROUP) {
            const typename I::Value* from[I::VALUE_GROUP];
            for (int g = 0; g < I::VALUE_GROUP; ++g) from[g] = unit.values + (key + g) * job.width;
            typename I::I32 columns[I::COLS];
            I::interleave(from, d, columns);
            for (int c = 0; c < I::COLS; ++c) {
                I::store_codes(to + d * unit.padded + key * job.W + c * I::LANES * I::VALUE_GROUP, columns[c]);
            }
        }
    }
    return to;
}

// Distances of one row that rule topk keeps: all below `near`, and those equal to it up to key `last`.
struct TopK {
    int32_t near, last;
};

// (1 - sparsity) * count, rounded half to even, at least 1: the k-th smallest distance by bisection on its value.
template <class I> TopK find_topk(const int32_t* scores, int32_t max, int64_t begin, int64_t end, double sparsity) {
    const auto top = I::set1(max), one = I::set1(1);
    const auto within = [&](int32_t limit) {
        const auto bound = I::set1(limit);
        auto count = I::set1(0);
        for (int64_t k = begin; k < end; k += I::LANES) {
            count = I::add(count, I::select_le(I::sub(top, I::load(scores + k)), bound, one));
        }
        return I::total(count);
    };
    const int64_t k = most<int64_t>(1, static_cast<int64_t>(std::nearbyint((1.0 - sparsity) * static_cast<double>(within(VALID)))));
    int32_t low = 0, high = VALID;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (within(middle) >= k) high = middle; else low = middle + 1;
    }
    int64_t room = k - (low == 0 ? 0 : within(low - 1));
    int64_t last = begin - 1;
    for (int64_t key = begin; key < end && room > 0; ++key) {
        if (max - scores[key] == low) {
            last = key;
            --room;
        }
    }
    return {low, static_cast<int32_t>(last)};
}

// Sum of p~ over all valid pairs of a row: rule threshold and mode unit ask for it.
template <class I> int64_t total_probability(const int32_t* scores, int32_t max, int64_t begin, int64_t end, typename I::F32 rate) {
    const auto top = I::set1(max), reach = I::set1(VALID);
    int64_t total = 0;
    for (int64_t from = begin; from < end; from += 1024 * I::LANES) {  // 1024 * 2^16 fits 32 bits
        auto sum = I::set1(0);
        for (int64_t k = from; k < least<int64_t>(end, from + 1024 * I::LANES); k += I::LANES) {
            const auto distance = I::sub(top, I::load(scores + k));
            sum = I::add(sum, I::select_le(distance, reach, probability<I>(distance, rate)));
        }
        total += I::total(sum);
    }
    return total;
}

struct Coded {
    int64_t sum, survivors;
};

// P codes of whole rows: rule `keep(distance, p, index, code)` gives the code or 0; `code_of(p)` is the mode.
template <class I, class Keep, class Code>
ATTN_INLINE Coded code_row(const int32_t* scores, int32_t max, int64_t begin, int64_t end, typename I::F32 rate, Keep keep, Code code_of, typename I::Prob* probs) {
    const auto top = I::set1(max), reach = I::set1(VALID), one = I::set1(1), zero = I::set1(0);
    auto sum = zero, survivors = zero;
    for (int64_t k = begin; k < end; k += I::LANES) {
        const auto distance = I::sub(top, I::load(scores + k));
        const auto p = probability<I>(distance, rate);
        const auto code = I::select_le(distance, reach, keep(distance, p, I::add(I::iota(), I::set1(static_cast<int32_t>(k))), code_of(p)));
        I::store_code(probs + k, code);
        sum = I::add(sum, code);
        survivors = I::add(survivors, I::select_le(one, code, one));
    }
    return {I::total(sum), I::total(survivors)};
}

template <class I, class Code>
Coded keep_and_code(const Job<I>& job, const Row& row, int64_t head, const int32_t* scores, int64_t begin, int64_t end, int64_t total, Code code_of, typename I::Prob* probs) {
    using V = typename I::I32;
    const Attention& a = job.a;
    const auto rate = I::set1f(row.rate);
    if (a.rule == Rule::topk && a.sparsity > 0) {
        const TopK top = find_topk<I>(scores, row.max, begin, end, a.sparsity);
        const V near = I::set1(top.near), nearer = I::set1(top.near - 1), last = I::set1(top.last);
        return code_row<I>(scores, row.max, begin, end, rate, [&](V d, V, V index, V code) {
            return I::max(I::select_le(d, nearer, code), I::select_le(d, near, I::select_le(index, last, code)));
        }, code_of, probs);
    }
    if (a.rule == Rule::threshold && a.cutoff != nullptr) {
        const float least_p = std::ceil(a.cutoff[head] * static_cast<float>(total));
        const V floor = I::set1(least_p > static_cast<float>(2 * ONE) ? 2 * ONE : static_cast<int32_t>(least_p)), zero = I::set1(0);
        return code_row<I>(scores, row.max, begin, end, rate, [&](V d, V p, V, V code) {
            return I::max(I::select_le(floor, p, code), I::select_le(d, zero, code));
        }, code_of, probs);
    }
    const V cut = I::set1(row.cut);
    return code_row<I>(scores, row.max, begin, end, rate, [&](V d, V, V, V code) { return I::select_le(d, cut, code); }, code_of, probs);
}

template <class I> Coded code_scores(const Job<I>& job, Row& row, int64_t head, const int32_t* scores, int64_t begin, int64_t end, typename I::Prob* probs) {
    using V = typename I::I32;
    const Attention& a = job.a;
    auto highest = I::set1(LOW);
    for (int64_t k = begin; k < end; k += I::LANES) highest = I::max(highest, I::load(scores + k));
    row.max = I::highest(highest);
    if (row.max == LOW) {
        std::memset(probs + begin, 0, (end - begin) * sizeof(*probs));
        return {0, 0};
    }
    const bool needs_total = a.mode != ProbMode::row || (a.rule == Rule::threshold && a.cutoff != nullptr);
    const int64_t total = needs_total ? total_probability<I>(scores, row.max, begin, end, I::set1f(row.rate)) : 0;
    if (a.mode == ProbMode::row) {
        const V bits = I::set1(bits_of(a.p_max));
        return keep_and_code(job, row, head, scores, begin, end, total, [&](V p) { return row_code<I>(p, bits); }, probs);
    }
    // torch divides a number by a tensor as reciprocal times number, and this must be the same float32.
    const auto factor = I::set1f((1.0f / static_cast<float>(total)) * static_cast<float>(a.p_max));
    return keep_and_code(job, row, head, scores, begin, end, total, [&](V p) { return I::round(I::mulf(I::to_float(p), factor)); }, probs);
}

// P V of a few rows of dense codes over keys [begin, end), at most a chunk: a dense product, or lists where zeros abound.
template <class I, int R>
void weigh(const Job<I>& job, const Head<I>& unit, const typename I::Prob* probs, int64_t begin, int64_t end, bool dense, Scratch<I>& scratch, int32_t* weighted) {
    if (dense) {
        const auto* tiles = panel(job, unit, scratch);
        for (int64_t d = 0; d < job.width; d += job.W) {
            const auto* panel_at = tiles + d * unit.padded + begin * job.W;
            if constexpr (I::BLOCK > 1) {
                I::value_block(probs + begin, unit.padded, panel_at, (end - begin) / I::VALUE_GROUP, weighted + d, job.width * sizeof(int32_t));
                continue;
            }
            typename I::I32 acc[R][I::COLS];
            product<I, ValueDot, R>(probs + begin, unit.padded, panel_at, (end - begin) / I::VALUE_GROUP, from_zero, acc);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int c = 0; c < I::COLS; ++c) I::store(weighted + r * job.width + d + c * I::LANES, acc[r][c]);
            }
        }
        return;
    }
    auto* codes = scratch.listed.template get<typename I::Prob>(unit.padded + 2 * I::LANES);
    auto* keys = scratch.list_keys.template get<uint16_t>(CHUNK + 64);
    for (int r = 0; r < R; ++r) {
        int64_t count = 0;
        for (int64_t key = begin; key < end; ++key) {
            codes[count] = probs[r * unit.padded + key];
            keys[count] = static_cast<uint16_t>(key - begin);
            count += codes[count] != 0;
        }
        for (int g = 0; g < I::VALUE_GROUP; ++g) codes[count + g] = keys[count + g] = 0;
        weigh_list(job, unit.values + begin * job.width, keys, codes, count, weighted + r * job.width);
    }
}

// The same over any number of keys.
template <class I, int R>
void weigh_wide(const Job<I>& job, const Head<I>& unit, const typename I::Prob* probs, int64_t begin, int64_t end, bool dense, Scratch<I>& scratch, int32_t* weighted, int64_t* wide) {
    std::memset(wide, 0, R * job.width * sizeof(*wide));
    for (int64_t from = begin; from < end; from += CHUNK) {
        weigh<I, R>(job, unit, probs, from, least(end, from + CHUNK), dense, scratch, weighted);
        for (int64_t i = 0; i < R * job.width; ++i) wide[i] += weighted[i];
    }
}

// Codes of the pairs of one row's tail, planes `plane` apart: 1, and with `linear` the bytes of their raised scores.
template <class I>
RowTail rest_of_row(const Job<I>& job, const Row& row, const int32_t* scores, const int32_t* seen, int32_t seen_offset, int64_t begin, int64_t end, const typename I::Prob* probs, typename I::Prob* rest, int64_t plane) {
    using Prob = typename I::Prob;
    RowTail tail;
    for (int64_t key = begin; key < end; ++key) {
        const int32_t distance = row.max - scores[key];
        const bool in = row.max != LOW && distance <= VALID && probs[key] == 0;
        rest[key] = static_cast<Prob>(in);
        tail.count += in;
        tail.distance += in ? distance : 0;
    }
    if (job.a.tail.kind == TailKind::mean) return tail;
    for (int64_t key = begin; key < end; ++key) {
        const bool in = rest[key] != 0;
        const int32_t score = in ? seen[key] - seen_offset : 0, raised = in ? score + SCORE_OFFSET : 0;
        tail.score += score;
        for (int byte = 0; byte < SCORE_BYTES; ++byte) rest[(1 + byte) * plane + key] = static_cast<Prob>(raised >> (8 * byte) & 255);
    }
    return tail;
}

// What R rows with tails give, by direct sums over the pairs of the tails: masks of any kind.
template <class I, int R>
void emit_thorough_tails(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, const int32_t* scores, const typename I::Prob* probs, const int64_t (&code_sums)[R], bool dense, int64_t begin, int64_t end, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const bool linear = a.tail.kind == TailKind::linear;
    const int64_t padded = unit.padded, plane = I::ROWS * padded, width = job.width;
    const int planes = linear ? 1 + SCORE_BYTES : 1;
    auto* rest = scratch.planes.template get<typename I::Prob>(planes * plane);
    auto* weighted = scratch.weighted.template get<int32_t>(I::ROWS * width);
    auto* wide = scratch.wide.template get<int64_t>((1 + planes) * R * width);
    auto* queries = scratch.slopes.template get<typename I::SeenQuery>(R * job.seen_width + I::LANES);
    auto* seen = scratch.mapped.template get<int32_t>(padded);
    if (job.directed) project<I, 0>(job, of_head(job.query_map, unit.kv_head), codes, R, nullptr, queries, scratch);
    RowTail tails[R];
    for (int r = 0; r < R; ++r) {
        const int32_t* own = scores + r * padded;
        int32_t offset = 0;
        if (job.directed) {
            see_all_keys(job, unit, queries + r * job.seen_width, begin, end, seen);
            own = seen;
        } else {
            for (int64_t d = 0; linear && d < a.dim; ++d) offset += I::KEY_OFFSET * codes[r * width + d];
        }
        tails[r] = rest_of_row(job, rows[r], scores + r * padded, own, offset, begin, end, probs + r * padded, rest + r * padded, plane);
    }
    find_levels(job, unit, rows, tails, R);
    weigh_wide<I, R>(job, unit, probs, begin, end, dense, scratch, weighted, wide);
    for (int p = 0; p < planes; ++p) {
        weigh_wide<I, R>(job, unit, rest + p * plane, begin, end, true, scratch, weighted, wide + (1 + p) * R * width);
    }
    for (int r = 0; r < R; ++r) {
        const int64_t *weights = wide + r * width, *values = weights + R * width;
        int64_t slopes[MAX_DIM + 64];
        for (int64_t d = 0; linear && d < width; ++d) {
            slopes[d] = -int64_t{SCORE_OFFSET} * values[d];
            for (int p = 1; p < planes; ++p) slopes[d] += values[p * R * width + d] * (int64_t{1} << (8 * (p - 1)));
        }
        alignas(64) float summed[3][MAX_DIM + 64];
        for (int64_t d = 0; d < width; ++d) {
            summed[0][d] = static_cast<float>(weights[d]);
            summed[1][d] = static_cast<float>(values[d]);
            summed[2][d] = linear ? static_cast<float>(slopes[d]) : 0.0f;
        }
        const auto at = [&](int which) { return [&summed, which](int64_t d) { return I::loadf(summed[which] + d); }; };
        emit_tailed(job, rows[r], tails[r], code_sums[r], at(0), at(1), at(2));
        if (a.trace == nullptr) continue;
        record_row(job, rows[r], nullptr, weights, code_sums[r]);
        record_tail(job, rows[r], tails[r], [&](int64_t d) { return values[d]; }, [&](int64_t d) { return slopes[d]; });
    }
}

// The thorough way, for R rows.
template <class I, int R>
void consider(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const Range range = range_of(rows, R);
    for (int r = 0; r < R; ++r) ask_output(rows[r], a.dim);
    const int64_t begin = range.begin / job.W * job.W, end = round_up(range.end, job.W);
    auto* scores = scratch.scores.template get<int32_t>(I::ROWS * unit.padded);
    auto* probs = scratch.probs.template get<typename I::Prob>(I::ROWS * unit.padded);
    auto* weighted = scratch.weighted.template get<int32_t>(I::ROWS * job.width);
    for (int64_t base = begin; base < end; base += job.W) {
        const bool whole = range.has_whole(base, job.W);
        if constexpr (I::BLOCK > 1) {
            I::score_block(codes, job.width, unit.keys + base * a.dim, job.steps, scores + base, unit.padded * sizeof(int32_t));
            for (int r = 0; r < R && !whole; ++r) mask<I>(rows[r], base, *reinterpret_cast<typename I::I32(*)[I::COLS]>(scores + r * unit.padded + base));
            continue;
        }
        typename I::I32 acc[R][I::COLS];
        product<I, ScoreDot, R>(codes, job.width, unit.keys + base * a.dim, job.steps, from_zero, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (!whole) mask<I>(rows[r], base, acc[r]);
#pragma GCC unroll 4
            for (int c = 0; c < I::COLS; ++c) I::store(scores + r * unit.padded + base + c * I::LANES, acc[r][c]);
        }
    }
    int64_t sums[R], survivors = 0;
    for (int r = 0; r < R; ++r) {
        const Coded coded = code_scores(job, rows[r], unit.head, scores + r * unit.padded, begin, end, probs + r * unit.padded);
        sums[r] = coded.sum;
        survivors += coded.survivors;
        if (a.trace == nullptr) continue;
        for (int64_t key = begin; key < least(end, unit.count); ++key) {
            a.trace->p_codes[rows[r].place * a.key_rows + unit.mask.packed[key]] = static_cast<uint8_t>(probs[r * unit.padded + key]);
        }
    }
    const bool dense = survivors * MANY > R * (end - begin);
    scratch.many = dense;
    if (job.tailed) return emit_thorough_tails<I, R>(job, unit, codes, rows, scores, probs, sums, dense, begin, end, scratch);
    int64_t* wide = nullptr;
    if (end - begin > CHUNK) {
        wide = scratch.wide.template get<int64_t>(R * job.width);
        weigh_wide<I, R>(job, unit, probs, begin, end, dense, scratch, weighted, wide);
    } else {
        weigh<I, R>(job, unit, probs, begin, end, dense, scratch, weighted);
    }
    for (int r = 0; r < R; ++r) emit(job, rows[r], weighted + r * job.width, wide != nullptr ? wide + r * job.width : nullptr, sums[r]);
}

}  // namespace
}  // namespace attnpress
