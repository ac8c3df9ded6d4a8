// Short products of 16-bit codes, for targets with AVX2. Internal linkage, as all that the targets share (attention_body.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention_types.h"

namespace attnpress {
namespace {

// to[g] = sum of query[i] * keys[g][i]; count is a multiple of 8.
ATTN_INLINE void dot_four(const int16_t* query, const int16_t* const (&keys)[4], int64_t count, int32_t (&to)[4]) {
    const auto at = [](const int16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    __m128i sums[4];
    for (int g = 0; g < 4; ++g) sums[g] = _mm_madd_epi16(at(query), at(keys[g]));
    for (int64_t i = 8; i < count; i += 8) {
        const __m128i left = at(query + i);
        for (int g = 0; g < 4; ++g) sums[g] = _mm_add_epi32(sums[g], _mm_madd_epi16(left, at(keys[g] + i)));
    }
    const __m128i low = _mm_hadd_epi32(sums[0], sums[1]), high = _mm_hadd_epi32(sums[2], sums[3]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_hadd_epi32(low, high));
}

}  // namespace
}  // namespace attnpress
