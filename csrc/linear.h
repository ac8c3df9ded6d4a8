// The passes around a linear layer's integer product, a row at a time; docs/numerics.md, section 8, defines each to the bit.
#pragma once

#include <cstdint>

namespace attnpress {

// One row of a product as the multiplication left it, and what makes it the layer's output.
struct ProductRow {
    const float* sums;    // of products of codes, each rounded once from its integer
    float scale, zero;    // of the row's codes
    const float *column;  // sums of the codes of the weight
    const float *weight_scale, *bias;
    int64_t width;
};

struct NormOf {
    const float *weight, *bias;
    float epsilon;
};

struct Passes {
    void (*code)(const float* x, int64_t count, float levels, uint8_t* codes, float* scale, float* zero);
    void (*finish)(const ProductRow& row, float* out);
    void (*finish_normed)(const ProductRow& row, const float* residual, const NormOf& norm, float* out);
    // `scratch` has room for the row.
    void (*finish_codes)(const ProductRow& row, float levels, float* scratch, uint8_t* codes, float* scale, float* zero);
    void (*layer_norm)(const float* x, const NormOf& norm, int64_t count, float* out);
    void (*gelu)(const float* x, int64_t count, float* out);
    void (*tanh)(const float* x, int64_t count, float* out);
    float (*dot)(const float* x, const float* weight, int64_t count);
};

const Passes& passes_scalar();
#if defined(__x86_64__)
const Passes& passes_avx2();
const Passes& passes_avx512();
#endif

}  // namespace attnpress
