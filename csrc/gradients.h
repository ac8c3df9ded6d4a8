// Gradients of the training forward from the pairs that have a code; core/fake_quantize.py has the rest of the backward pass.
#pragma once

#include <cstdint>

namespace attnpress {

// Of each query row: what a survivor's gradients are made of, and what it would have as a pair of the tail.
enum Term : int64_t { SCALE, OWN, WEIGHT, SCORE_LEVEL, VALUE_LEVEL, SLOPE };

// One head. With code c, dropout factor f, x = grad . value and s = query . key, a survivor adds
//   (SCALE c (f x - OWN) - SCORE_LEVEL - SLOPE x) times key to grad_query, and times query to grad_key,
//   (WEIGHT c f - VALUE_LEVEL - SLOPE s) times grad to grad_value.
struct HeadGradients {
    const float *query, *key, *value, *grad;  // [query_rows or keys, dim]
    const uint8_t *codes, *kept;              // [query_rows, keys]; kept is null without dropout
    const float* terms;                       // [query_rows, count]
    float *grad_query, *grad_key, *grad_value;  // zeroed by the caller
    int32_t* survivors;                         // room for a row of keys
    int64_t query_rows, keys, dim, count;       // count: the first 3 terms without a tail, 5 with levels, 6 with slopes
    float factor;                               // of what dropout keeps
};

using Gradients = void (*)(const HeadGradients&);

void gradients_scalar(const HeadGradients&);
#if defined(__x86_64__)
void gradients_avx2(const HeadGradients&);
void gradients_avx512(const HeadGradients&);
#endif

}  // namespace attnpress
