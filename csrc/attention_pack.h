// Part of attention_body.h: what all steps share, and packing, from a batch element's numbers to codes in the kernel's order.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

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
constexpr float SMALLEST_SCALE = 0x1p-40f, LARGEST_SCALE = 0x1p40f;
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
    typename I::Query* queries;  // [Hq][Sq][width]
    float* q_scales;             // [Hq][Sq]
    typename I::Key* keys;       // [Hkv][tiles][D / GROUP][W][GROUP]
    typename I::Value* values;   // [Hkv][padded][width], each W columns in the order that I::interleave undoes
    float* means;                // [Hkv][width], of K
    const Keys* mask;
    int64_t index, count, padded;
};

// What one query head works with.
template <class I> struct Head {
    const typename I::Query* queries;  // [Sq][width]
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
    int64_t steps, width, group;
    int32_t last_exponent;  // beyond it all codes are 0
    Buffer room;
    float *v_scale, *v_inverse;  // [Hkv][width]
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

// A row as float32, padded with zeros to whole tiles of W; the row itself where it is that already.
template <class I> const float* as_float(const char* row, DType dtype, int64_t dim, float* room) {
    constexpr int64_t W = I::COLS * I::LANES;
    if (dtype == DType::f32) {
        if (dim % W == 0) return reinterpret_cast<const float*>(row);
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
    for (int64_t d = dim; d % W != 0; ++d) room[d] = 0.0f;
    return room;
}

// codes = clamp(round_half_to_even((x - mean) * inverse), -qmax, qmax); NaN gives 0. A tile of W at a time goes to `store`,
// in registers: narrow stores that a wide load follows would wait for each other.
template <class I, class Inverse, class Store>
ATTN_INLINE void quantize(const float* x, const float* mean, Inverse inverse, float qmax, int64_t width, Store store) {
    const typename I::F32 high = I::set1f(qmax), low = I::set1f(-qmax);
    for (int64_t d = 0; d < width; d += I::COLS * I::LANES) {
        typename I::I32 codes[I::COLS];
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) {
            const int64_t at = d + c * I::LANES;
            typename I::F32 value = I::loadf(x + at);
            if (mean != nullptr) value = I::subf(value, I::loadf(mean + at));
            codes[c] = I::round(I::clamp(I::mulf(value, inverse(at)), low, high));
        }
        store(d, codes);
    }
}

template <class I> ATTN_INLINE void quantize_row(const float* x, const float* mean, float scale, int32_t qmax, int64_t width, typename I::Query* to) {
    const typename I::F32 inverse = I::set1f(1.0f / scale);
    quantize<I>(x, mean, [&](int64_t) { return inverse; }, static_cast<float>(qmax), width,
                [&](int64_t d, const typename I::I32(&codes)[I::COLS]) { I::store_ordered(to + d, codes); });
}

// core/quantizer.py, token_scale: from the largest finite magnitude of a row.
template <class I> float token_scale(const float* x, int64_t dim, int32_t qmax, bool power_of_two) {
    typename I::F32 largest = I::set1f(0.0f);
    for (int64_t d = 0; d < dim; d += I::LANES) largest = I::maxf(largest, I::finite_magnitude(I::loadf(x + d)));
    float scale = I::highest(largest) / static_cast<float>(qmax);
    scale = scale > 0.0f ? least(most(scale, SMALLEST_SCALE), LARGEST_SCALE) : 1.0f;
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
    for (int64_t d = 0; d < job.width; ++d) sums[d] = 0.0;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    float* snapped = room + MAX_DIM + 64;
    const typename I::F32 high = I::set1f(GRID_MAX), low = I::set1f(-GRID_MAX), grid = I::set1f(GRID);
    for (int32_t place = 0; place < mask.seen_count; ++place) {
        const float* x = as_float<I>(base + mask.seen[place] * a.key.row, a.key.dtype, a.dim, room);
        for (int64_t d = 0; d < job.width; d += I::LANES) {
            const typename I::F32 value = I::loadf(x + d);
            // x - (x - x) is x, or NaN where x is not finite, which the clamp makes 0.
            const typename I::F32 finite = I::subf(value, I::subf(value, value));
            I::storef(snapped + d, I::clamp(I::nearest(I::mulf(finite, grid)), low, high));
        }
        for (int64_t d = 0; d < job.width; ++d) sums[d] += static_cast<double>(snapped[d]);
    }
    const double count = most(mask.seen_count, 1);
    float* mean = batch.means + head * job.width;
    for (int64_t d = 0; d < job.width; ++d) mean[d] = static_cast<float>(sums[d] / count * 0x1p-20);
}

template <class I> void prepare(const Job<I>& job, int64_t index, Batch<I>& batch) {
    const Attention& a = job.a;
    batch.index = index;
    batch.mask = &a.keys[index];
    batch.count = batch.mask->packed_count;
    batch.padded = round_up(batch.count, job.W);
    batch.queries = batch.query_buffer.template get<typename I::Query>(a.q_heads * a.q_rows * job.width);
    batch.q_scales = batch.scale_buffer.template get<float>(a.q_heads * a.q_rows);
    batch.keys = batch.key_buffer.template get<typename I::Key>(a.kv_heads * batch.padded * a.dim);
    batch.values = batch.value_buffer.template get<typename I::Value>(a.kv_heads * batch.padded * job.width);
    batch.means = batch.mean_buffer.template get<float>(a.kv_heads * job.width);
}

// Packing goes through a token's heads before the next token, since that is how models lay them out in memory.
template <class I> void pack_keys(const Job<I>& job, Batch<I>& batch, int64_t tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    const int64_t head_size = job.W * job.width;
    auto* codes = scratch.codes.template get<typename I::Query>(a.kv_heads * head_size);
    for (int64_t i = 0; i < job.W; ++i) {
        const int64_t place = tile * job.W + i;
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            auto* row = codes + head * head_size + i * job.width;
            if (place >= batch.count) {
                std::memset(row, 0, job.width * sizeof(*row));
                continue;
            }
            const int64_t key = batch.mask->packed[place];
            const char* from = a.key.data + batch.index * a.key.batch + head * a.key.head + key * a.key.row;
            const float* mean = a.smooth_key ? batch.means + head * job.width : nullptr;
            fetch(from + AHEAD * a.key.row, row_bytes(a.key.dtype, a.dim));
            const float* x = as_float<I>(from, a.key.dtype, a.dim, room);
            quantize_row<I>(x, mean, scale_of(a.k_scale, head), a.k_max, job.width, row);
            if (a.trace == nullptr) continue;
            record_codes<I>(a.trace->k_codes + ((batch.index * a.kv_heads + head) * a.key_rows + key) * a.dim, row, a.dim);
        }
    }
    for (int64_t head = 0; head < a.kv_heads; ++head) {
        I::pack_tile(codes + head * head_size, job.width, job.steps, batch.keys + (head * batch.padded + tile * job.W) * a.dim);
    }
}

template <class I> void pack_values(const Job<I>& job, Batch<I>& batch, int64_t tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    float* room = scratch.floats.template get<float>(2 * (MAX_DIM + 64));
    typename I::Query traced[MAX_DIM + 64];
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
            const float* inverse = job.v_inverse + head * job.width;
            const auto code = [&](auto put) {
                quantize<I>(x, nullptr, [&](int64_t d) { return I::loadf(inverse + d); }, static_cast<float>(a.v_max), job.width, put);
            };
            code([&](int64_t d, const typename I::I32(&codes)[I::COLS]) { I::store_arranged(row + d, codes); });
            if (a.trace == nullptr) continue;
            code([&](int64_t d, const typename I::I32(&codes)[I::COLS]) { I::store_ordered(traced + d, codes); });
            record_codes<I>(a.trace->v_codes + ((batch.index * a.kv_heads + head) * a.key_rows + key) * a.dim, traced, a.dim);
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
        auto* codes = batch.queries + (head * a.q_rows + row) * job.width;
        const float scale = a.q_scale.data != nullptr ? scale_of(a.q_scale, head)
                                                      : token_scale<I>(x, job.width, a.q_max, a.q_power_of_two);
        batch.q_scales[head * a.q_rows + row] = scale;
        quantize_row<I>(x, nullptr, scale, a.q_max, job.width, codes);
        if (a.trace == nullptr) continue;
        record_codes<I>(a.trace->q_codes + ((batch.index * a.q_heads + head) * a.q_rows + row) * a.dim, codes, a.dim);
    }
}

}  // namespace
}  // namespace attnpress
