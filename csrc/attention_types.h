// Part of attention_body.h: what all steps share.
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
constexpr int32_t MAX_CUT = 32766;       // largest cut for which distances fit the streaming way's 16 bits
constexpr int64_t CHUNK = 65536;         // keys whose 255 * 127 products fit 32-bit sums, and 16-bit indexes
constexpr int MAX_DIM = LARGEST_HEAD;
constexpr int64_t KEPT = 1 << 23;        // bytes of a buffer that a thread may hold on to when it needs far less
constexpr int64_t SHORT = 512;           // keys up to which slack of a few rows stays in the first cache
constexpr int64_t MANY = 3;              // more than one survivor in MANY pairs: the thorough way is faster

constexpr int SCORE_BYTES = 3;           // of any score that a tail sees, raised to lie above zero
constexpr int32_t SCORE_OFFSET = 1 << 22;  // above 127 * 127 * LARGEST_RANK

ATTN_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
template <class T> ATTN_INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T> ATTN_INLINE T most(T a, T b) { return a < b ? b : a; }

// Grows; what is larger than KEPT also shrinks, when far less will do. Keeps nothing when its size changes.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    template <class T> T* get(int64_t count) {
        const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 64, 64);
        if (bytes > size_ || (size_ > KEPT && bytes < size_ / 4)) {
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

// What a target has whose products are those of its vector instructions, their sums in registers. Others take BLOCK rows at
// once and leave the sums in memory (attention_blocks.h).
struct VectorProducts {
    static constexpr int BLOCK = 1;
    static constexpr bool SHORT_SUMS = false;  // dot_scores adds in halves of lanes, which I::widen makes one
    // Lives while a thread multiplies.
    struct Session {
        explicit Session(int64_t) {}
    };
};

// One query row on its way.
struct Row {
    const float* scale;  // of V
    float* output;
    const uint8_t* bytes;
    uint16_t *keys, *slack;  // survivors: index, and cut minus distance
    float rate, alpha;
    int32_t begin, end, cut, max, count, query_sum;
    int32_t start;            // a score and this make slack
    int32_t floor;            // slack below it cannot survive
    int64_t first;            // where its survivors begin
    int64_t place;            // (batch, head, row) as one index, for the trace
    alignas(64) int16_t top[32];  // largest slack so far, by lane
};

// One batch element as codes, all heads.
template <class I> struct Batch {
    Buffer query_buffer, scale_buffer, key_buffer, value_buffer, mean_buffer, sum_buffer, seen_buffer;
    typename I::Query* queries;  // [Hq][Sq][width]
    float* q_scales;             // [Hq][Sq]
    typename I::Key* keys;       // [Hkv][tiles][D / GROUP][W][GROUP]
    typename I::Value* values;   // [Hkv][padded][width], each W columns in the order that I::interleave undoes
    float* means;                // [Hkv][width], of K
    int32_t *key_sums, *value_sums;  // [Hkv][tiles][width], of codes; null without a tail
    typename I::Seen* seen;      // [Hkv][padded][seen_width]: K as the tail's directions see it, raised by SEEN_OFFSET; null where there are none
    const Keys* mask;
    int64_t index, count, padded;
};

// What one query head works with.
template <class I> struct Head {
    const typename I::Query* queries;  // [Sq][width]
    const float* q_scales;             // [Sq]
    const typename I::Key* keys;
    const typename I::Value* values;
    const int32_t *key_sums, *value_sums;  // [tiles][width]
    const typename I::Seen* seen;          // [padded][seen_width]
    const Keys& mask;
    int64_t batch, head, kv_head, count, padded;
};

// An integer matrix as digits, for products with codes (attention_matrix.h).
template <class I> struct Matrix {
    typename I::Digit* tiles;  // [vectors][steps][LANES][DIGIT_GROUP]; column p * columns + c is digit p of column c
    int64_t steps, columns, vectors;
    int planes;
    ATTN_INLINE int64_t size() const { return vectors * steps * I::LANES * I::DIGIT_GROUP; }
    ATTN_INLINE int64_t line() const { return vectors * I::LANES; }
    // Added to each entry, so that digits without a sign can stand for it.
    ATTN_INLINE int64_t bias() const { return I::SIGNED_DIGITS ? 0 : int64_t{1} << (I::DIGIT_BITS * planes - 1); }
};

// A matrix [rows][width] of wider integers as signed digits, side by side as a panel of values is (attention_panels.h).
template <class I> struct Panels {
    typename I::Value* digits = nullptr;  // [planes][width / W][steps][W][VALUE_GROUP]
    int32_t* raised = nullptr;            // [width]: what codes raised by RAISED add, modulo 2^32
    int64_t steps = 0;
    int planes = 0;
};

// Sums over all packed keys of a head, which its tails are made of (attention_tail_sums.h).
template <class I> struct HeadSums {
    Buffer value_buffer, key_buffer, slope_buffer, raised_buffer, seen_buffer, digit_buffer;
    int32_t* values;                // [width]
    typename I::Digit* keys;        // [key_planes][width]: digits of the sums of K as it is packed
    int key_planes;
    const int32_t* slopes;          // [rank][width], with `linear`: of codes of K, as its directions see them, times those of V
    Panels<I> panels;               // the same
    int32_t* seen;                  // [seen_width]: of K as its directions see it
    int64_t largest;                // magnitude in slopes
    int64_t of = -1;                // which head
};

template <class I> struct Scratch {
    Buffer floats, codes, keys, slack, blocks, scores, probs, listed, list_keys, list_slack, panel, weighted, wide;
    Buffer left, mapped, planes, projected, slopes, key_codes, raw, raised;  // of the tail
    HeadSums<I> sums;
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
    static constexpr int PASS = I::BLOCK == 1 ? I::ROWS * 4 : I::ROWS * 2;  // query rows that share one sweep over the keys
    const Attention& a;
    int64_t steps, width, group;
    int32_t last_exponent;  // beyond it all codes are 0
    Buffer room;
    float *v_scale, *v_inverse;      // [Hkv][width]
    float *k_inverse, *q_inverse;    // [Hkv], [Hq]; q_inverse is null where Q is scaled row by row
    const bool tailed, directed;     // whether rows have a tail, and whether it sees the score in directions
    const int64_t seen_width;        // rank in whole steps; 0 where there are no directions
    Buffer map_room;
    Matrix<I> query_map, key_map;    // [D][seen_width] of the first key head; others follow
    explicit Job(const Attention& args);
};

// Calls f(R, first) for each group of rows, R a compile-time number: I::ROWS, and for what is left of them less.
template <class I, int R = I::ROWS, class F> ATTN_INLINE void in_groups(int64_t count, F f, int64_t first = 0) {
    for (; first + R <= count; first += R) f(std::integral_constant<int, R>{}, first);
    if constexpr (R > 1) in_groups<I, I::BLOCK == 1 ? R - 1 : R / 2>(count, f, first);
}

}  // namespace
}  // namespace attnpress
