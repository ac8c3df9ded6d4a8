// Part of attention_body.h: codes times a matrix of wider integers. Its entries are split into digits that the products of a
// target take: an exact sum for each digit, put together where it is used.
#pragma once

#include <type_traits>

#include "attention_types.h"

namespace attnpress {
namespace {

constexpr int SHIFT = 12;            // core/tail.py: projections are in units of 2^-12
constexpr int32_t MOST_SEEN = 127;   // and clamped
constexpr int64_t SEEN_STEP = 8;     // I::see takes so many products at once

// The shape of a matrix whose entries are at most `largest` in magnitude, below 2^31.
template <class I> Matrix<I> shape_matrix(int64_t rows, int64_t columns, int64_t largest) {
    int planes = 1;
    while (largest >> (I::DIGIT_BITS * planes - 1) != 0) ++planes;
    return {nullptr, round_up(rows, I::DIGIT_GROUP) / I::DIGIT_GROUP, columns, round_up(columns * planes, I::LANES) / I::LANES, planes};
}

// Digit p of an entry with its bias.
template <class I> ATTN_INLINE typename I::Digit digit_of(int64_t biased, int p) {
    if constexpr (I::SIGNED_DIGITS) return static_cast<int16_t>(p == 0 ? biased : (biased - static_cast<int16_t>(biased)) >> 16);
    else return static_cast<typename I::Digit>(biased >> (8 * p));
}

template <class I, class Entry> void fill_matrix(const Matrix<I>& matrix, int64_t rows, Entry entry) {
    constexpr int64_t GROUP = I::DIGIT_GROUP;
    std::memset(matrix.tiles, 0, matrix.size() * sizeof(typename I::Digit));
    const int64_t bias = matrix.bias();
    for (int p = 0; p < matrix.planes; ++p) {
        for (int64_t row = 0; row < rows; ++row) {
            auto* to = matrix.tiles + row / GROUP * I::LANES * GROUP + row % GROUP;
            for (int64_t c = 0; c < matrix.columns; ++c) {
                const int64_t place = p * matrix.columns + c;
                to[place / I::LANES * matrix.steps * I::LANES * GROUP + place % I::LANES * GROUP] = digit_of<I>(entry(row, c) + bias, p);
            }
        }
    }
}

// to[r][line]: sums of digits, for R rows of codes at a time.
template <class I, int R> void apply(const Matrix<I>& matrix, const typename I::Left* rows, int64_t stride, int64_t count, int32_t* to, int64_t first = 0) {
    constexpr int64_t GROUP = I::DIGIT_GROUP;
    for (; first + R <= count; first += R) {
        for (int64_t v = 0; v < matrix.vectors; ++v) {
            const auto* tile = matrix.tiles + v * matrix.steps * I::LANES * GROUP;
            const auto* left = rows + first * stride;
            typename I::I32 acc[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r] = I::set1(0);
            for (int64_t step = 0; step < matrix.steps; ++step) {
                const typename I::I32 column = I::load_codes(tile + step * I::LANES * GROUP);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r] = I::dot_digits(acc[r], column, I::broadcast(left + r * stride + step * GROUP));
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) I::store(to + (first + r) * matrix.line() + v * I::LANES, acc[r]);
        }
    }
    if constexpr (R > 1) apply<I, R / 2>(matrix, rows, stride, count, to, first);
}

// Rows of codes as these products take them.
template <class I> const typename I::Left* as_left(const typename I::Query* codes, int64_t size, Scratch<I>& scratch) {
    if constexpr (std::is_same_v<typename I::Query, typename I::Left>) {
        return codes;
    } else {
        auto* left = scratch.left.template get<typename I::Left>(size);
        for (int64_t i = 0; i < size; ++i) left[i] = codes[i];
        return left;
    }
}

// core/tail.py, projected: rows of codes in the directions of a head, raised by RAISE; columns past the rank stand for 0.
// `to` has room for LANES past the last.
template <class I, int RAISE, class To>
void project(const Job<I>& job, const Matrix<I>& map, const typename I::Query* codes, int64_t count, const float* offset, To* to, Scratch<I>& scratch) {
    using V = typename I::I32;
    const int64_t width = job.width, rank = job.a.tail.rank;
    const auto* left = as_left<I>(codes, count * width, scratch);
    auto* applied = scratch.projected.template get<int32_t>(count * map.line() + 2 * I::LANES);
    apply<I, 8>(map, left, width, count, applied);
    alignas(64) int32_t offsets[LARGEST_RANK + SEEN_STEP + I::LANES] = {};
    for (int64_t i = 0; offset != nullptr && i < rank; ++i) offsets[i] = static_cast<int32_t>(offset[i]);
    for (int64_t r = 0; r < count; ++r) {
        const int32_t* sums = applied + r * map.line();
        int32_t common = 1 << (SHIFT - 1);  // sums stay below 2^31, whatever their parts do
        if constexpr (!I::SIGNED_DIGITS) {
            int32_t sum = 0;
            for (int64_t d = 0; d < width; ++d) sum += left[r * width + d];
            common -= static_cast<int32_t>(map.bias()) * sum;
        }
        for (int64_t i = 0; i < job.seen_width; i += I::LANES) {  // a vector reaches into the next row
            V whole = I::add(I::load(sums + i), I::set1(common));
            if (map.planes == 2) whole = I::add(whole, I::template shl<I::DIGIT_BITS>(I::load(sums + map.columns + i)));
            const V moved = I::sub(I::template sra<SHIFT>(whole), I::load(offsets + i));
            const V most_of = I::max(I::set1(RAISE - MOST_SEEN), I::min(I::add(moved, I::set1(RAISE)), I::set1(RAISE + MOST_SEEN)));
            I::store_code(to + r * job.seen_width + i, most_of);
        }
    }
}

template <class I> Matrix<I> of_head(Matrix<I> map, int64_t head) {
    map.tiles += head * map.size();
    return map;
}

// The keys of a tile as the directions of their head see them; padding too, for nobody.
template <class I> void see_keys(const Job<I>& job, const typename I::Query* codes, int64_t head, typename I::Seen* to, Scratch<I>& scratch) {
    auto* seen = scratch.mapped.template get<typename I::Seen>(job.W * job.seen_width + I::LANES);
    project<I, I::SEEN_OFFSET>(job, of_head(job.key_map, head), codes, job.W, job.a.tail.offset + head * job.a.tail.rank, seen, scratch);
    std::memcpy(to, seen, job.W * job.seen_width * sizeof(*to));
}

// Whole matrices of directions, once a call.
template <class I> void make_maps(const Job<I>& job, Buffer& room, Matrix<I>& query, Matrix<I>& key) {
    const Tail& tail = job.a.tail;
    query = key = shape_matrix<I>(job.a.dim, job.seen_width, static_cast<int64_t>(LARGEST_DIRECTION));
    query.tiles = room.template get<typename I::Digit>(2 * job.a.kv_heads * query.size());
    key.tiles = query.tiles + job.a.kv_heads * query.size();
    for (int64_t head = 0; head < job.a.kv_heads; ++head) {
        const auto fill = [&](const Matrix<I>& map, const float* directions) {
            fill_matrix<I>(of_head(map, head), job.a.dim, [&](int64_t d, int64_t i) -> int64_t {
                return i < tail.rank ? static_cast<int64_t>(directions[(head * job.a.dim + d) * tail.rank + i]) : 0;
            });
        };
        fill(query, tail.query);
        fill(key, tail.key);
    }
}

}  // namespace
}  // namespace attnpress
