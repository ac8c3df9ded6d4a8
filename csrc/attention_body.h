// Compressed attention in integers, once for every CPU target: a template over an ISA struct of primitives (isa_*.cpp).
//
// Keys are packed in tiles of W = COLS x LANES, values in rows; both as codes. A few query rows meet one tile of keys at a
// time, with all scores in registers. Then one of two ways, which give the same integers:
//   streaming (rule relative, mode row): scores within `cut` of the largest so far are compressed into a list of survivors
//     while they are still in registers; a larger maximum sifts the list. The list ends up exact: no second look at a score.
//   thorough (any rule and mode, and rows where most pairs survive): scores go to a buffer of a few rows; then maximum,
//     total, keep mask and codes of whole rows.
// P V takes survivors a group at a time, or a dense integer product where they are many.
//
// Everything here has internal linkage, and no std:: template is instantiated: code compiled for one instruction set must
// never be the copy that the linker picks for another.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "attention.h"

#define ATTN_INLINE inline __attribute__((always_inline))

namespace attnpress {
namespace {

constexpr int32_t LOW = -(1 << 30);      // stands for the score of a pair that is not valid
constexpr int32_t VALID = 1 << 28;       // real distances stay below, those of pairs that are not valid lie above
constexpr int32_t T_MAX = 18 * 1024;     // core/exponential.py: exponents saturate here, where the power is 0
constexpr int32_t ONE = 1 << 16;
constexpr int32_t MAX_CUT = 32766;       // largest cut for which distances fit the streaming way's 16 bits
constexpr int64_t CHUNK = 65536;         // keys whose 255 * 127 products fit 32-bit sums, and 16-bit indexes
constexpr int MAX_DIM = 256;
constexpr int64_t AHEAD = 2;             // tokens to ask of memory before they are packed
constexpr int64_t MANY = 3;              // more than one survivor in MANY pairs: the thorough way is faster
constexpr float SMALLEST_SCALE = 0x1p-40f;
constexpr float GRID = 0x1p20f;          // K smoothing sums multiples of 2^-20, clamped to 2^16: exact in any order
constexpr float GRID_MAX = 0x1p36f;

ATTN_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
template <class T> ATTN_INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T> ATTN_INLINE T most(T a, T b) { return a < b ? b : a; }

class Buffer {  // grows, never shrinks, keeps nothing when it grows
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    template <class T> T* get(int64_t count) {
        const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 64, 64);
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(64, bytes);
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// One query row on its way.
struct Row {
    const float* scale;  // of V
    const char* query;
    float* output;
    const uint8_t* bytes;
    uint16_t *keys, *slack;  // survivors: index, and cut minus distance
    float rate;
    int32_t begin, end, cut, max, count, query_sum;
    int32_t base;             // slack counts from here
    int32_t floor;            // slack below it cannot survive
    int64_t place;            // (batch, head, row) as one index, for the trace
    alignas(64) int16_t top[32];  // largest slack so far, by lane
};

// One batch element as codes, all heads.
template <class I> struct Batch {
    Buffer query_buffer, scale_buffer, key_buffer, value_buffer, mean_buffer;
    typename I::Query* queries;  // [Hq][Sq][query_width]
    float* q_scales;             // [Hq][Sq]
    typename I::Key* keys;       // [Hkv][tiles][D / GROUP][W][GROUP]
    typename I::Value* values;   // [Hkv][padded][width], each W columns in the order that I::interleave undoes
    float* means;                // [Hkv][query_width], of K
    const Keys* mask;
    int64_t index, count, padded;
};

// What one query head works with.
template <class I> struct Head {
    const typename I::Query* queries;  // [Sq][query_width]
    const float* q_scales;             // [Sq]
    const typename I::Key* keys;
    const typename I::Value* values;
    const Keys& mask;
    int64_t batch, head, kv_head, count, padded;
};

template <class I> struct Scratch {
    Buffer floats, codes, keys, slack, scores, probs, listed, list_keys, panel, weighted, wide;
    int64_t panel_of = -1;  // which head the panel holds
    bool many = false;      // what the last rows were like
    int64_t cut_of = -1;    // which head, and which step alpha, the cut belongs to
    float cut_alpha = 0;
    int32_t cut = 0;
};

ATTN_INLINE float scale_of(const Scale& scale, int64_t head, int64_t channel = 0) {
    return scale.data[head * scale.head + channel * scale.channel];
}

// Shapes and factors that all steps share.
template <class I> struct Job {
    static constexpr int W = I::COLS * I::LANES;
    static constexpr int PASS = I::ROWS * 4;  // query rows that share one sweep over the keys
    const Attention& a;
    int64_t steps, width, query_width, group;
    int32_t last_exponent;  // beyond it all codes are 0
    Buffer room;
    float *v_scale, *v_inverse;  // [Hkv][query_width]
    explicit Job(const Attention& args);
};

ATTN_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    uint32_t bits;
    float value;
    if (magnitude >= 0x7c00u) {
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + 0x38000000u);
    } else {
        value = static_cast<float>(magnitude) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    std::memcpy(&value, &bits, 4);
    return value;
}

ATTN_INLINE float bfloat_to_float(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Asks memory for the rows of a token some tokens ahead.
ATTN_INLINE void fetch(const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

ATTN_INLINE int64_t row_bytes(DType dtype, int64_t dim) { return dim * (dtype == DType::f32 ? 4 : 2); }

// A row as float32, padded with zeros to whole vectors; the row itself where it is that already.
template <class I> const float* as_float(const char* row, DType dtype, int64_t dim, float* room) {
    if (dtype == DType::f32) {
        if (dim % I::LANES == 0) return reinterpret_cast<const float*>(row);
        std::memcpy(room, row, dim * sizeof(float));
    } else {
        const auto* halves = reinterpret_cast<const uint16_t*>(row);
        int64_t d = 0;
        if (dtype == DType::bf16) {
            for (; d + I::LANES <= dim; d += I::LANES) I::storef(room + d, I::load_bfloats(halves + d));
            for (; d < dim; ++d) room[d] = bfloat_to_float(halves[d]);
        } else {
            for (; d + I::LANES <= dim; d += I::LANES) I::storef(room + d, I::load_halves(halves + d));
            for (; d < dim; ++d) room[d] = half_to_float(halves[d]);
        }
    }
    for (int64_t d = dim; d % I::LANES != 0; ++d) room[d] = 0.0f;
    return room;
}

// codes = clamp(round_half_to_even((x - mean) * inverse), -qmax, qmax); NaN gives 0. Inverse has one value or one a column.
template <class I, class Inverse>
ATTN_INLINE void quantize(const float* x, const float* mean, Inverse inverse, float qmax, int64_t dim, typename I::Query* codes) {
    const typename I::F32 high = I::set1f(qmax), low = I::set1f(-qmax);
    for (int64_t d = 0; d < dim; d += I::LANES) {
        typename I::F32 value = I::loadf(x + d);
        if (mean != nullptr) value = I::subf(value, I::loadf(mean + d));
        I::store_code(codes + d, I::round(I::clamp(I::mulf(value, inverse(d)), low, high)));
    }
}

template <class I> void quantize_row(const float* x, const float* mean, float scale, int32_t qmax, int64_t dim, typename I::Query* codes) {
    const typename I::F32 inverse = I::set1f(1.0f / scale);
    quantize<I>(x, mean, [&](int64_t) { return inverse; }, static_cast<float>(qmax), dim, codes);
}

template <class I> void quantize_columns(const float* x, const float* inverse, int32_t qmax, int64_t dim, typename I::Query* codes) {
    quantize<I>(x, nullptr, [&](int64_t d) { return I::loadf(inverse + d); }, static_cast<float>(qmax), dim, codes);
}

// core/quantizer.py, token_scale: from the largest finite magnitude of a row.
template <class I> float token_scale(const float* x, int64_t dim, int32_t qmax, bool power_of_two) {
    typename I::F32 largest = I::set1f(0.0f);
    for (int64_t d = 0; d < dim; d += I::LANES) largest = I::maxf(largest, I::finite_magnitude(I::loadf(x + d)));
    float scale = I::highest(largest) / static_cast<float>(qmax);
    scale = scale > 0.0f ? most(scale, SMALLEST_SCALE) : 1.0f;
    if (!power_of_two) return scale;
    int exponent;
    const float mantissa = std::frexp(scale, &exponent);
    return std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
}

template <class I> void record_codes(int8_t* where, const typename I::Query* codes, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) where[d] = static_cast<int8_t>(codes[d]);
}

// core/quantizer.py, smooth_key: mean over the keys that some query may attend to.
template <class I> void find_mean(const Job<I>& job, Batch<I>& batch, int64_t head, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const Keys& mask = *batch.mask;
    const char* base = a.key.data + batch.index * a.key.batch + head * a.key.head;
    double sums[MAX_DIM + 64];
    for (int64_t d = 0; d < job.query_width; ++d) sums[d] = 0.0;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    float* snapped = room + MAX_DIM + 64;
    const typename I::F32 high = I::set1f(GRID_MAX), low = I::set1f(-GRID_MAX), grid = I::set1f(GRID);
    for (int32_t place = 0; place < mask.seen_count; ++place) {
        const float* x = as_float<I>(base + mask.seen[place] * a.key.row, a.key.dtype, a.dim, room);
        for (int64_t d = 0; d < job.query_width; d += I::LANES) {
            I::storef(snapped + d, I::clamp(I::nearest(I::mulf(I::loadf(x + d), grid)), low, high));
        }
        for (int64_t d = 0; d < job.query_width; ++d) sums[d] += static_cast<double>(snapped[d]);
    }
    const double count = most(mask.seen_count, 1);
    float* mean = batch.means + head * job.query_width;
    for (int64_t d = 0; d < job.query_width; ++d) mean[d] = static_cast<float>(sums[d] / count * 0x1p-20);
}

template <class I> void prepare(const Job<I>& job, int64_t index, Batch<I>& batch) {
    const Attention& a = job.a;
    batch.index = index;
    batch.mask = &a.keys[index];
    batch.count = batch.mask->packed_count;
    batch.padded = round_up(batch.count, job.W);
    batch.queries = batch.query_buffer.template get<typename I::Query>(a.q_heads * a.q_rows * job.query_width);
    batch.q_scales = batch.scale_buffer.template get<float>(a.q_heads * a.q_rows);
    batch.keys = batch.key_buffer.template get<typename I::Key>(a.kv_heads * batch.padded * a.dim);
    batch.values = batch.value_buffer.template get<typename I::Value>(a.kv_heads * batch.padded * job.width);
    batch.means = batch.mean_buffer.template get<float>(a.kv_heads * job.query_width);
}

// Packing goes through a token's heads before the next token, since that is how models lay them out in memory.
template <class I> void pack_keys(const Job<I>& job, Batch<I>& batch, int64_t tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    const int64_t head_size = job.W * job.query_width;
    auto* codes = scratch.codes.template get<typename I::Query>(a.kv_heads * head_size);
    for (int64_t i = 0; i < job.W; ++i) {
        const int64_t place = tile * job.W + i;
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            auto* row = codes + head * head_size + i * job.query_width;
            if (place >= batch.count) {
                std::memset(row, 0, job.query_width * sizeof(*row));
                continue;
            }
            const int64_t key = batch.mask->packed[place];
            const char* from = a.key.data + batch.index * a.key.batch + head * a.key.head + key * a.key.row;
            const float* mean = a.smooth_key ? batch.means + head * job.query_width : nullptr;
            fetch(from + AHEAD * a.key.row, row_bytes(a.key.dtype, a.dim));
            const float* x = as_float<I>(from, a.key.dtype, a.dim, room);
            quantize_row<I>(x, mean, scale_of(a.k_scale, head), a.k_max, job.query_width, row);
            if (a.trace == nullptr) continue;
            record_codes<I>(a.trace->k_codes + ((batch.index * a.kv_heads + head) * a.key_rows + key) * a.dim, row, a.dim);
        }
    }
    for (int64_t head = 0; head < a.kv_heads; ++head) {
        I::pack_tile(codes + head * head_size, job.query_width, job.steps, batch.keys + (head * batch.padded + tile * job.W) * a.dim);
    }
}

template <class I> void pack_values(const Job<I>& job, Batch<I>& batch, int64_t tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    auto* codes = scratch.codes.template get<typename I::Query>(job.width);
    std::memset(codes, 0, job.width * sizeof(*codes));
    for (int64_t place = tile * job.W; place < (tile + 1) * job.W; ++place) {
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            auto* row = batch.values + (head * batch.padded + place) * job.width;
            if (place >= batch.count) {
                std::memset(row, 0, job.width * sizeof(*row));
                continue;
            }
            const int64_t key = batch.mask->packed[place];
            const char* from = a.value.data + batch.index * a.value.batch + head * a.value.head + key * a.value.row;
            fetch(from + AHEAD * a.value.row, row_bytes(a.value.dtype, a.dim));
            const float* x = as_float<I>(from, a.value.dtype, a.dim, room);
            quantize_columns<I>(x, job.v_inverse + head * job.query_width, a.v_max, job.query_width, codes);
            for (int64_t d = 0; d < job.width; d += job.W) I::arrange(codes + d, row + d);
            if (a.trace == nullptr) continue;
            record_codes<I>(a.trace->v_codes + ((batch.index * a.kv_heads + head) * a.key_rows + key) * a.dim, codes, a.dim);
        }
    }
}

template <class I> void pack_query(const Job<I>& job, Batch<I>& batch, int64_t row, Scratch<I>& scratch) {
    const Attention& a = job.a;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    for (int64_t head = 0; head < a.q_heads; ++head) {
        const char* from = a.query.data + batch.index * a.query.batch + head * a.query.head + row * a.query.row;
        fetch(from + AHEAD * a.query.row, row_bytes(a.query.dtype, a.dim));
            const float* x = as_float<I>(from, a.query.dtype, a.dim, room);
        auto* codes = batch.queries + (head * a.q_rows + row) * job.query_width;
        const float scale = a.q_scale.data != nullptr ? scale_of(a.q_scale, head)
                                                      : token_scale<I>(x, job.query_width, a.q_max, a.q_power_of_two);
        batch.q_scales[head * a.q_rows + row] = scale;
        quantize_row<I>(x, nullptr, scale, a.q_max, job.query_width, codes);
        if (a.trace == nullptr) continue;
        record_codes<I>(a.trace->q_codes + ((batch.index * a.q_heads + head) * a.q_rows + row) * a.dim, codes, a.dim);
    }
}

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
    product<I, ScoreDot, R>(codes, job.query_width, unit.keys + base * job.a.dim, job.steps, acc);
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

// Values of all packed keys as dense tiles [width / W][padded / GROUP][W][GROUP].
template <class I> const typename I::Value* panel(const Job<I>& job, const Head<I>& unit, Scratch<I>& scratch) {
    auto* to = scratch.panel.template get<typename I::Value>(unit.padded * job.width);
    const int64_t which = unit.batch * job.a.kv_heads + unit.kv_head;
    if (scratch.panel_of == which) return to;
    scratch.panel_of = which;
    for (int64_t d = 0; d < job.width; d += job.W) {
        for (int64_t key = 0; key < unit.padded; key += I::GROUP) {
            const typename I::Value* from[I::GROUP];
            for (int g = 0; g < I::GROUP; ++g) from[g] = unit.values + (key + g) * job.width;
            typename I::I32 columns[I::COLS];
            I::interleave(from, d, columns);
            for (int c = 0; c < I::COLS; ++c) {
                I::store_codes(to + d * unit.padded + key * job.W + c * I::LANES * I::GROUP, columns[c]);
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
            typename I::I32 acc[R][I::COLS];
            product<I, ValueDot, R>(probs + begin, unit.padded, tiles + d * unit.padded + begin * job.W, (end - begin) / I::GROUP, acc);
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
        for (int g = 0; g < I::GROUP; ++g) codes[count + g] = 0;
        weigh_list(job, unit.values + begin * job.width, keys, codes, count, weighted + r * job.width);
    }
}

// The thorough way, for R rows.
template <class I, int R>
void consider(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const Range range = range_of<R>(rows);
    const int64_t begin = range.begin / job.W * job.W, end = round_up(range.end, job.W);
    auto* scores = scratch.scores.template get<int32_t>(R * unit.padded);
    auto* probs = scratch.probs.template get<typename I::Prob>(R * unit.padded);
    auto* weighted = scratch.weighted.template get<int32_t>(I::ROWS * job.width);
    for (int64_t base = begin; base < end; base += job.W) {
        typename I::I32 acc[R][I::COLS];
        product<I, ScoreDot, R>(codes, job.query_width, unit.keys + base * a.dim, job.steps, acc);
        const bool whole = base >= range.all_begin && base + job.W <= range.all_end;
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
    scratch.many = survivors * MANY > R * (end - begin);
    const bool dense = survivors * MANY > R * (end - begin);
    const bool several = end - begin > CHUNK;
    int64_t* wide = nullptr;
    if (several) {
        wide = scratch.wide.template get<int64_t>(R * job.width);
        std::memset(wide, 0, R * job.width * sizeof(*wide));
    }
    for (int64_t from = begin; from < end || from == begin; from += CHUNK) {
        weigh<I, R>(job, unit, probs, from, least(end, from + CHUNK), dense, scratch, weighted);
        for (int64_t i = 0; several && i < R * job.width; ++i) wide[i] += weighted[i];
    }
    for (int r = 0; r < R; ++r) emit(job, rows[r], weighted + r * job.width, several ? wide + r * job.width : nullptr, sums[r]);
}

// Calls f with R = rows as a compile-time number.
template <int R, class F> ATTN_INLINE void with_rows(int64_t rows, F f) {
    if constexpr (R > 0) {
        if (rows == R) return f(std::integral_constant<int, R>{});
        with_rows<R - 1>(rows, f);
    }
}

template <class I> void start_row(const Job<I>& job, const Head<I>& unit, int64_t index, Row& row, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const Keys& mask = unit.mask;
    row.scale = job.v_scale + unit.kv_head * job.query_width;
    row.output = a.output + ((unit.batch * a.q_rows + index) * a.q_heads + unit.head) * a.dim;
    row.place = (unit.batch * a.q_heads + unit.head) * a.q_rows + index;
    row.begin = mask.spans[index].begin;
    row.end = most(row.begin, mask.spans[index].end);
    row.bytes = mask.bytes == nullptr ? nullptr : mask.bytes + unit.head * mask.byte_head + index * mask.byte_row;
    const float alpha = (unit.q_scales[index] * scale_of(a.k_scale, unit.kv_head)) * a.scaling;
    row.rate = (alpha * 1.4426950408889634f) * 1024.0f;
    if (scratch.cut_of != unit.head || scratch.cut_alpha != alpha) {
        const float cutoff = a.rule == Rule::relative && a.cutoff != nullptr ? a.cutoff[unit.head] : INFINITY;
        scratch.cut = find_cut(cutoff, alpha, row.rate, job.last_exponent);
        scratch.cut_of = unit.head;
        scratch.cut_alpha = alpha;
    }
    row.cut = scratch.cut;
    row.max = LOW;
    row.count = row.floor = 0;
    I::store_short(row.top, I::set1_short(0));
    for (int64_t d = 0; d < a.dim; d += 16) __builtin_prefetch(row.output + d, 1);
    if (a.trace == nullptr) return;
    row.query_sum = 0;
    for (int64_t d = 0; d < a.dim; ++d) row.query_sum += unit.queries[index * job.query_width + d];
}

template <class I>
void attend_streaming(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Scratch<I>& scratch) {
    const int64_t room = unit.padded + 64;
    auto* lists = scratch.keys.template get<uint16_t>(job.PASS * room);
    auto* slack = scratch.slack.template get<uint16_t>(job.PASS * room);
    Range ranges[4];
    for (int64_t r = 0; r < count; ++r) {
        rows[r].keys = lists + r * room;
        rows[r].slack = slack + r * room;
    }
    for (int64_t r = 0; r < count; r += I::ROWS) {
        with_rows<I::ROWS>(least<int64_t>(I::ROWS, count - r), [&](auto R) { ranges[r / I::ROWS] = range_of<R.value>(rows + r); });
    }
    for (int64_t tile = 0; tile < unit.padded / job.W; ++tile) {
        for (int64_t r = 0; r < count; r += I::ROWS) {
            with_rows<I::ROWS>(least<int64_t>(I::ROWS, count - r), [&](auto R) {
                stream<I, R.value>(job, unit, codes + r * job.query_width, rows + r, ranges[r / I::ROWS], tile);
            });
        }
    }
    finish(job, unit, rows, count, scratch);
    int64_t survivors = 0, pairs = 0;
    for (int64_t r = 0; r < count; ++r) {
        survivors += rows[r].count;
        pairs += rows[r].end - rows[r].begin;
    }
    scratch.many = survivors * MANY > pairs;
}

// At most PASS query rows of one head, from `first`.
template <class I> void attend(const Job<I>& job, const Head<I>& unit, int64_t first, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const int64_t count = least<int64_t>(job.PASS, a.q_rows - first);
    const auto* codes = unit.queries + first * job.query_width;
    Row rows[Job<I>::PASS];
    int32_t widest = 0;
    for (int64_t r = 0; r < count; ++r) {
        start_row(job, unit, first + r, rows[r], scratch);
        widest = most(widest, rows[r].cut);
    }
    const bool streamable = a.rule == Rule::relative && a.mode == ProbMode::row && unit.count <= CHUNK;
    if (streamable && widest <= MAX_CUT && !scratch.many) return attend_streaming(job, unit, codes, rows, count, scratch);
    for (int64_t r = 0; r < count; r += I::ROWS) {
        with_rows<I::ROWS>(least<int64_t>(I::ROWS, count - r), [&](auto R) {
            consider<I, R.value>(job, unit, codes + r * job.query_width, rows + r, scratch);
        });
    }
}

template <class I> Head<I> head_of(const Job<I>& job, const Batch<I>& batch, int64_t head) {
    const int64_t kv = head / job.group;
    return {batch.queries + head * job.a.q_rows * job.query_width, batch.q_scales + head * job.a.q_rows,
            batch.keys + kv * batch.padded * job.a.dim, batch.values + kv * batch.padded * job.width,
            *batch.mask, batch.index, head, kv, batch.count, batch.padded};
}

// The three steps of one batch element; `share(count, f)` runs f(begin, end, scratch) over [0, count).
template <class I, class Share> void attend_batch(const Job<I>& job, int64_t index, Batch<I>& batch, Share share) {
    const Attention& a = job.a;
    prepare(job, index, batch);
    if (a.smooth_key) {
        share(a.kv_heads, [&](int64_t begin, int64_t end, Scratch<I>& scratch) {
            for (int64_t head = begin; head < end; ++head) find_mean(job, batch, head, scratch);
        });
    }
    const int64_t tiles = batch.padded / job.W, passes = (a.q_rows + job.PASS - 1) / job.PASS;
    share(tiles + passes, [&](int64_t begin, int64_t end, Scratch<I>& scratch) {
        for (int64_t work = begin; work < end; ++work) {
            if (work < tiles) {
                pack_keys(job, batch, work, scratch);
                pack_values(job, batch, work, scratch);
                continue;
            }
            const int64_t first = (work - tiles) * job.PASS;
            for (int64_t row = first; row < least(first + job.PASS, a.q_rows); ++row) pack_query(job, batch, row, scratch);
        }
    });
    share(a.q_heads * passes, [&](int64_t begin, int64_t end, Scratch<I>& scratch) {
        scratch.cut_of = scratch.panel_of = -1;
        for (int64_t work = begin; work < end; ++work) {
            attend(job, head_of(job, batch, work / passes), work % passes * job.PASS, scratch);
        }
    });
}

template <class I> Job<I>::Job(const Attention& args)
    : a(args), steps(args.dim / I::GROUP), width(round_up(args.dim, W)), query_width(round_up(args.dim, I::LANES)),
      group(args.q_heads / args.kv_heads), last_exponent(args.mode == ProbMode::row ? last_coded_exponent(args.p_max) : T_MAX - 1) {
    v_scale = room.template get<float>(2 * a.kv_heads * query_width);
    v_inverse = v_scale + a.kv_heads * query_width;
    for (int64_t i = 0; i < a.kv_heads * query_width; ++i) {
        v_scale[i] = scale_of(a.v_scale, i / query_width, least(i % query_width, a.dim - 1));
        v_inverse[i] = 1.0f / v_scale[i];
    }
}

template <class F> void parallel(const Attention& a, int64_t count, F f) {
    a.parallel(count, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &f);
}

// Each thread takes whole batch elements where they come out even; else all threads share each one.
template <class I> void run(const Attention& a) {
    const Job<I> job(a);
    if (a.batch % a.threads == 0 || a.batch >= 4 * a.threads) {
        parallel(a, a.batch, [&](int64_t begin, int64_t end) {
            Batch<I> batch;
            Scratch<I> scratch;
            for (int64_t index = begin; index < end; ++index) {
                attend_batch(job, index, batch, [&](int64_t count, auto f) { f(0, count, scratch); });
            }
        });
        return;
    }
    Batch<I> batch;
    for (int64_t index = 0; index < a.batch; ++index) {
        attend_batch(job, index, batch, [&](int64_t count, auto f) {
            parallel(a, count, [&](int64_t begin, int64_t end) {
                Scratch<I> scratch;
                f(begin, end, scratch);
            });
        });
    }
}

}  // namespace
}  // namespace attnpress
