// Part of attention_body.h: packing, from a batch element's numbers to codes in the kernel's order.
#pragma once

#include <type_traits>

#include "attention_matrix.h"

namespace attnpress {
namespace {

constexpr int64_t AHEAD = 2;  // tokens to ask of memory before they are packed
constexpr float GRID = 0x1p20f;  // K smoothing sums multiples of 2^-20, clamped to 2^16: exact in any order
constexpr float GRID_MAX = 0x1p36f;

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

// A row as float32, padded with zeros to whole tiles of W; the row itself where it is that already.
template <class I> __attribute__((noinline)) const float* as_float(const char* row, DType dtype, int64_t dim, float* room) {
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

// Rows of one tensor and batch element as float32. It fits registers, which keeps addresses out of the loops that read.
template <class I> class Reader {
  public:
    Reader(const Rows& rows, int64_t batch, int64_t dim, Scratch<I>& scratch)
        : base_(rows.data + batch * rows.batch), head_(rows.head), row_(rows.row), dim_(dim),
          bytes_(dim * (rows.dtype == DType::f32 ? 4 : 2)), dtype_(rows.dtype),
          room_(scratch.floats.template get<float>(2 * (MAX_DIM + 64))),
          ready_(rows.dtype == DType::f32 && dim % Job<I>::W == 0) {}

    // The row where it lies if it can be used so. Asks memory for the one AHEAD tokens further.
    ATTN_INLINE const float* operator()(int64_t token, int64_t head) const {
        const char* from = base_ + head * head_ + token * row_;
        for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(from + AHEAD * row_ + at);
        return ready_ ? reinterpret_cast<const float*>(from) : as_float<I>(from, dtype_, dim_, room_);
    }

  private:
    const char* base_;
    int64_t head_, row_, dim_, bytes_;
    DType dtype_;
    float* room_;
    bool ready_;
};

// Whether values met NaN, which codes hide: they are summed as they pass, since NaN and what leaves float32 stay in a sum.
template <class I> class NanWatch {
  public:
    explicit NanWatch(bool* met) : met_(met) {
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) sums_[c] = I::set1f(0.0f);
    }
    NanWatch(const NanWatch&) = delete;
    ~NanWatch() {
        alignas(64) float lanes[I::LANES];
        bool met = false;
        for (int c = 0; c < I::COLS; ++c) {
            I::storef(lanes, sums_[c]);
            for (int i = 0; i < I::LANES; ++i) met |= !(lanes[i] - lanes[i] == 0.0f);
        }
        if (met) __atomic_store_n(met_, true, __ATOMIC_RELAXED);
    }
    ATTN_INLINE void see(int column, typename I::F32 value) { sums_[column] = I::subf(sums_[column], value); }

  private:
    typename I::F32 sums_[I::COLS];
    bool* met_;
};

// Codes of scaled values: `value(d)` gives LANES of them. A tile of W at a time goes to `store`, in registers: narrow
// stores that a wide load follows would wait for each other.
template <class I, class Value, class Store>
ATTN_INLINE void quantize(int64_t width, typename I::F32 limit, NanWatch<I>& watch, Value value, Store store) {
    int64_t d = 0;
    do {
        typename I::I32 codes[I::COLS];
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) {
            const typename I::F32 x = value(d + c * I::LANES);
            watch.see(c, x);
            codes[c] = I::round_within(x, limit);
        }
        store(d, codes);
        d += I::COLS * I::LANES;
    } while (d < width);
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
    batch.queries = batch.query_buffer.template get<typename I::Query>((a.q_heads * a.q_rows + I::BLOCK - 1) * job.width);
    batch.q_scales = batch.scale_buffer.template get<float>(a.q_heads * a.q_rows);
    batch.keys = batch.key_buffer.template get<typename I::Key>(a.kv_heads * batch.padded * a.dim);
    batch.values = batch.value_buffer.template get<typename I::Value>(a.kv_heads * batch.padded * job.width);
    batch.means = batch.mean_buffer.template get<float>(a.kv_heads * job.width);
    const int64_t sums = a.kv_heads * batch.padded / job.W * job.width;
    batch.key_sums = job.tailed ? batch.sum_buffer.template get<int32_t>(2 * sums) : nullptr;
    batch.value_sums = job.tailed ? batch.key_sums + sums : nullptr;
    batch.seen = job.directed ? batch.seen_buffer.template get<typename I::Seen>(a.kv_heads * batch.padded * job.seen_width + 64) : nullptr;
}

// Sums of the codes of a tile, by head; null where nobody asks for them. Padding has codes of 0.
template <class I> class TileSums {
  public:
    TileSums(const Job<I>& job, const Batch<I>& batch, int32_t* sums, int64_t first)
        : sums_(sums == nullptr ? nullptr : sums + first / job.W * job.width), head_(batch.padded / job.W * job.width) {
        for (int64_t head = 0; sums_ != nullptr && head < job.a.kv_heads; ++head) std::memset(sums_ + head * head_, 0, job.width * sizeof(int32_t));
    }
    ATTN_INLINE void add(int64_t head, int64_t d, const typename I::I32 (&codes)[I::COLS]) const {
        if (sums_ == nullptr) return;
        int32_t* to = sums_ + head * head_ + d;
#pragma GCC unroll 4
        for (int c = 0; c < I::COLS; ++c) I::store(to + c * I::LANES, I::add(I::load(to + c * I::LANES), codes[c]));
    }

  private:
    int32_t* sums_;
    int64_t head_;
};

template <class I> void record(int8_t* where, const typename I::Query* codes, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) where[d] = static_cast<int8_t>(codes[d]);
}

// Which packed keys a tile holds, and where each came from.
template <class I> struct Tile {
    int64_t first, count;
    const int32_t* tokens;
    Tile(const Batch<I>& batch, int64_t tile)
        : first(tile * Job<I>::W), count(least<int64_t>(Job<I>::W, batch.count - first)), tokens(batch.mask->packed + first) {}
};

// Packing goes through a token's heads before the next token, since that is how models lay them out in memory.
template <class I> void pack_keys(const Job<I>& job, Batch<I>& batch, const Tile<I>& tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const int64_t heads = a.kv_heads, width = job.width, head_size = job.W * width;
    auto* codes = scratch.codes.template get<typename I::Query>(heads * head_size);
    const Reader<I> keys(a.key, batch.index, a.dim, scratch);
    const auto limit = I::set1f(static_cast<float>(a.k_max));
    const float *inverses = job.k_inverse, *means = batch.means;
    const TileSums<I> sums(job, batch, batch.key_sums, tile.first);
    NanWatch<I> watch(a.met_nan);
    const auto pack = [&](auto smooth) {
        for (int64_t i = 0; i < tile.count; ++i) {
            for (int64_t head = 0; head < heads; ++head) {
                const float* x = keys(tile.tokens[i], head);
                const auto inverse = I::set1f(inverses[head]);
                auto* row = codes + head * head_size + i * width;
                quantize<I>(width, limit, watch, [&](int64_t d) {
                    if constexpr (smooth.value) return I::mulf(I::subf(I::loadf(x + d), I::loadf(means + head * width + d)), inverse);
                    else return I::mulf(I::loadf(x + d), inverse);
                }, [&](int64_t d, const typename I::I32(&some)[I::COLS]) {
                    I::store_ordered(row + d, some);
                    sums.add(head, d, some);
                });
            }
        }
    };
    if (a.smooth_key) pack(std::true_type{}); else pack(std::false_type{});
    for (int64_t head = 0; head < heads; ++head) {
        auto* of_head = codes + head * head_size;
        std::memset(of_head + tile.count * width, 0, (job.W - tile.count) * width * sizeof(*of_head));
        I::pack_tile(of_head, width, job.steps, batch.keys + (head * batch.padded + tile.first) * a.dim);
        if (job.directed) see_keys(job, of_head, head, batch.seen + (head * batch.padded + tile.first) * job.seen_width, scratch);
        if (a.trace == nullptr) continue;
        int8_t* traced = a.trace->k_codes + (batch.index * heads + head) * a.key_rows * a.dim;
        for (int64_t i = 0; i < tile.count; ++i) record<I>(traced + tile.tokens[i] * a.dim, of_head + i * width, a.dim);
    }
}

template <class I, class Store> ATTN_INLINE void quantize_value(const Job<I>& job, const float* x, int64_t head, typename I::F32 limit, NanWatch<I>& watch, Store store) {
    const float* inverse = job.v_inverse + head * job.width;
    quantize<I>(job.width, limit, watch, [&](int64_t d) { return I::mulf(I::loadf(x + d), I::loadf(inverse + d)); }, store);
}

template <class I> __attribute__((noinline)) void record_values(const Job<I>& job, const Batch<I>& batch, const Tile<I>& tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const Reader<I> values(a.value, batch.index, a.dim, scratch);
    const auto limit = I::set1f(static_cast<float>(a.v_max));
    typename I::Query codes[MAX_DIM + 64];
    NanWatch<I> watch(a.met_nan);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
        int8_t* traced = a.trace->v_codes + (batch.index * a.kv_heads + head) * a.key_rows * a.dim;
        for (int64_t i = 0; i < tile.count; ++i) {
            quantize_value(job, values(tile.tokens[i], head), head, limit, watch,
                           [&](int64_t d, const typename I::I32(&some)[I::COLS]) { I::store_ordered(codes + d, some); });
            record<I>(traced + tile.tokens[i] * a.dim, codes, a.dim);
        }
    }
}

template <class I> void pack_values(const Job<I>& job, Batch<I>& batch, const Tile<I>& tile, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const int64_t heads = a.kv_heads, width = job.width, head_size = batch.padded * width;
    auto* codes = batch.values + tile.first * width;
    const Reader<I> values(a.value, batch.index, a.dim, scratch);
    const auto limit = I::set1f(static_cast<float>(a.v_max));
    const TileSums<I> sums(job, batch, batch.value_sums, tile.first);
    NanWatch<I> watch(a.met_nan);
    for (int64_t i = 0; i < tile.count; ++i) {
        for (int64_t head = 0; head < heads; ++head) {
            auto* row = codes + head * head_size + i * width;
            quantize_value(job, values(tile.tokens[i], head), head, limit, watch, [&](int64_t d, const typename I::I32(&some)[I::COLS]) {
                I::store_arranged(row + d, some);
                sums.add(head, d, some);
            });
        }
    }
    for (int64_t head = 0; head < heads; ++head) {
        std::memset(codes + head * head_size + tile.count * width, 0, (job.W - tile.count) * width * sizeof(*codes));
    }
    if (a.trace != nullptr) record_values(job, batch, tile, scratch);
}

template <class I> void pack_queries(const Job<I>& job, Batch<I>& batch, int64_t begin, int64_t end, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const int64_t heads = a.q_heads, rows = a.q_rows, width = job.width;
    const Reader<I> queries(a.query, batch.index, a.dim, scratch);
    const auto limit = I::set1f(static_cast<float>(a.q_max));
    const float* inverses = job.q_inverse;
    NanWatch<I> watch(a.met_nan);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t head = 0; head < heads; ++head) {
            const float* x = queries(row, head);
            float& scale = batch.q_scales[head * rows + row];
            scale = inverses != nullptr ? scale_of(a.q_scale, head) : token_scale<I>(x, width, a.q_max, a.q_power_of_two);
            const auto inverse = I::set1f(inverses != nullptr ? inverses[head] : 1.0f / scale);
            auto* codes = batch.queries + (head * rows + row) * width;
            quantize<I>(width, limit, watch, [&](int64_t d) { return I::mulf(I::loadf(x + d), inverse); },
                        [&](int64_t d, const typename I::I32(&some)[I::COLS]) { I::store_ordered(codes + d, some); });
            if (a.trace != nullptr) record<I>(a.trace->q_codes + ((batch.index * heads + head) * rows + row) * a.dim, codes, a.dim);
        }
    }
}

}  // namespace
}  // namespace attnpress
