// The loops of gradients.h, compiled once for each instruction set. Lanes are added in one order and nothing is fused, so all of
// them give the same bits, at any number of threads.
#pragma once

#include <cstring>

#include "gradients.h"

namespace attnpress {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <int64_t W>
ALWAYS_INLINE float dot(const float* __restrict a, const float* __restrict b, int64_t dim) {
    float lanes[W] = {};
    for (int64_t d = 0; d < dim; d += W) {
        for (int64_t j = 0; j < W; ++j) lanes[j] += a[d + j] * b[d + j];
    }
    for (int64_t half = W / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    return lanes[0];
}

template <int64_t W>
ALWAYS_INLINE void add_scaled(float* __restrict to, const float* __restrict from, float factor, int64_t dim) {
    for (int64_t d = 0; d < dim; d += W) {
        for (int64_t j = 0; j < W; ++j) to[d + j] += factor * from[d + j];
    }
}

// Keys of the row that have a code; most have none.
ALWAYS_INLINE int64_t find_survivors(const uint8_t* codes, int64_t keys, int32_t* found) {
    int64_t count = 0, key = 0;
    for (; key + 8 <= keys; key += 8) {
        uint64_t eight;
        std::memcpy(&eight, codes + key, 8);
        if (eight == 0) continue;
        for (int64_t j = key; j < key + 8; ++j) {
            found[count] = static_cast<int32_t>(j);
            count += codes[j] != 0;
        }
    }
    for (; key < keys; ++key) {
        if (codes[key] != 0) found[count++] = static_cast<int32_t>(key);
    }
    return count;
}

template <int64_t W>
ALWAYS_INLINE void add_gradients(const HeadGradients& h) {
    for (int64_t i = 0; i < h.query_rows; ++i) {
        const float *term = h.terms + i * h.count, *query = h.query + i * h.dim, *grad = h.grad + i * h.dim;
        const uint8_t *codes = h.codes + i * h.keys, *kept = h.kept == nullptr ? nullptr : h.kept + i * h.keys;
        const int64_t count = find_survivors(codes, h.keys, h.survivors);
        for (int64_t n = 0; n < count; ++n) {
            const int64_t j = h.survivors[n], at = j * h.dim;
            const auto code = static_cast<float>(codes[j]);
            const float f = kept == nullptr ? 1.0f : static_cast<float>(kept[j]) * h.factor;
            const float inner = dot<W>(grad, h.value + at, h.dim);
            float change = term[SCALE] * code * (f * inner - term[OWN]), weight = term[WEIGHT] * code * f;
            if (h.count > VALUE_LEVEL) {
                change -= term[SCORE_LEVEL];
                weight -= term[VALUE_LEVEL];
            }
            if (h.count > SLOPE) {
                change -= term[SLOPE] * inner;
                weight -= term[SLOPE] * dot<W>(query, h.key + at, h.dim);
            }
            add_scaled<W>(h.grad_query + i * h.dim, h.key + at, change, h.dim);
            add_scaled<W>(h.grad_key + at, query, change, h.dim);
            add_scaled<W>(h.grad_value + at, grad, weight, h.dim);
        }
    }
}

ALWAYS_INLINE void add_all_gradients(const HeadGradients& h) { h.dim % 16 == 0 ? add_gradients<16>(h) : add_gradients<4>(h); }

#undef ALWAYS_INLINE

}  // namespace
}  // namespace attnpress
