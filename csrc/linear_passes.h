// The passes of linear.h, compiled once for each instruction set, with the same bits from all of them: a multiplication and an
// addition are rounded once where they are written as one (`fma`; the compiler joins none by itself), and what is summed is
// summed in LANES lanes in one order. Loops marked ivdep may work in place: no element needs another.
#pragma once

#include "linear.h"

namespace attnpress {
namespace {

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for fractions, and rounds half to even
constexpr float SMALLEST_SCALE = 0x1p-40f, LARGEST_SCALE = 0x1p40f;  // those of core/quantizer.py
constexpr int64_t LANES = 64;

inline __attribute__((always_inline)) float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

float lesser(float a, float b) { return b < a ? b : a; }
float greater(float a, float b) { return b > a ? b : a; }
float sum(float a, float b) { return a + b; }

// Lanes made one in few steps: one after the other, they would wait for each other.
template <typename Join>
inline __attribute__((always_inline)) float folded(float* lanes, Join join) {
    for (int64_t j = 0; j < 32; ++j) lanes[j] = join(lanes[j], lanes[j + 32]);
    for (int64_t j = 0; j < 16; ++j) lanes[j] = join(lanes[j], lanes[j + 16]);
    for (int64_t j = 0; j < 8; ++j) lanes[j] = join(lanes[j], lanes[j + 8]);
    for (int64_t j = 0; j < 4; ++j) lanes[j] = join(lanes[j], lanes[j + 4]);
    return join(join(lanes[0], lanes[1]), join(lanes[2], lanes[3]));
}

// For blocks of LANES numbers, and the rest, which fills the first lanes: `step(first, lanes)`.
template <typename Step>
inline __attribute__((always_inline)) void in_lanes(int64_t count, Step step) {
    int64_t first = 0;
    for (; first + LANES <= count; first += LANES) step(first, LANES);
    if (first < count) step(first, count - first);
}

// Range of a row and of zero.
struct Range {
    float low[LANES] = {}, high[LANES] = {};

    inline __attribute__((always_inline)) void add(const float* x, int64_t lanes) {
        for (int64_t j = 0; j < lanes; ++j) low[j] = x[j] < low[j] ? x[j] : low[j];
        for (int64_t j = 0; j < lanes; ++j) high[j] = x[j] > high[j] ? x[j] : high[j];
    }
};

void code_in(Range& range, const float* x, int64_t count, float levels, uint8_t* codes, float* scale, float* zero) {
    const float low = folded(range.low, lesser), high = folded(range.high, greater);
    float step = (high - low) / levels;
    if (step > 0) {
        step = step < SMALLEST_SCALE ? SMALLEST_SCALE : step > LARGEST_SCALE ? LARGEST_SCALE : step;
    } else {
        step = 1.0f;
    }
    const float inverse = 1.0f / step, least = low * inverse;
    const float rounded = ((least < -levels ? -levels : least) + ROUND) - ROUND;
    *scale = step;
    *zero = 0.0f - rounded;
    const float lowest = rounded, highest = levels - *zero;
    const int32_t shift = static_cast<int32_t>(*zero);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        float value = x[i] * inverse;
        value = value == value ? value : 0.0f;
        value = value < lowest ? lowest : value;
        value = value > highest ? highest : value;
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>((value + ROUND) - ROUND) + shift);
    }
}

void code(const float* x, int64_t count, float levels, uint8_t* codes, float* scale, float* zero) {
    Range range;
    in_lanes(count, [&](int64_t first, int64_t lanes) { range.add(x + first, lanes); });
    code_in(range, x, count, levels, codes, scale, zero);
}

inline __attribute__((always_inline)) float finished(const ProductRow& row, int64_t i) {
    return fma(fma(-row.zero, row.column[i], row.sums[i]) * row.weight_scale[i], row.scale, row.bias[i]);
}

void finish(const ProductRow& row, float* out) {
#pragma GCC ivdep
    for (int64_t i = 0; i < row.width; ++i) out[i] = finished(row, i);
}

// x/2 (1 + erf(x / sqrt 2)), with the rational approximation of erf that Eigen and XLA have: a few units in the last place.
inline __attribute__((always_inline)) float gelu_of(float x) {
    float u = x * 0.70710678f;
    u = u < -4.0f ? -4.0f : u;
    u = u > 4.0f ? 4.0f : u;
    const float s = u * u;
    float p = -2.72614225801306e-10f;
    p = fma(p, s, 2.77068142495902e-08f);
    p = fma(p, s, -2.10102402082508e-06f);
    p = fma(p, s, -5.69250639462346e-05f);
    p = fma(p, s, -7.34990630326855e-04f);
    p = fma(p, s, -2.95459980854025e-03f);
    p = fma(p, s, -1.60960333262415e-02f);
    float q = -1.45660718464996e-05f;
    q = fma(q, s, -2.13374055278905e-04f);
    q = fma(q, s, -1.68282697438203e-03f);
    q = fma(q, s, -7.37332916720468e-03f);
    q = fma(q, s, -1.42647390514189e-02f);
    const float half = 0.5f * x;
    return fma(half, u * p / q, half);
}

void gelu(const float* x, int64_t count, float* out) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = gelu_of(x[i]);
}

// Their rational approximation of tanh, as good.
void tanh(const float* x, int64_t count, float* out) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        float u = x[i];
        u = u < -7.90531110763549805f ? -7.90531110763549805f : u;
        u = u > 7.90531110763549805f ? 7.90531110763549805f : u;
        const float s = u * u;
        float p = -2.76076847742355e-16f;
        p = fma(p, s, 2.00018790482477e-13f);
        p = fma(p, s, -8.60467152213735e-11f);
        p = fma(p, s, 5.12229709037114e-08f);
        p = fma(p, s, 1.48572235717979e-05f);
        p = fma(p, s, 6.37261928875436e-04f);
        p = fma(p, s, 4.89352455891786e-03f);
        float q = 1.19825839466702e-06f;
        q = fma(q, s, 1.18534705686654e-04f);
        q = fma(q, s, 2.26843463243900e-03f);
        q = fma(q, s, 4.89352518554385e-03f);
        out[i] = u * p / q;
    }
}

void finish_codes(const ProductRow& row, float levels, float* scratch, uint8_t* codes, float* scale, float* zero) {
#pragma GCC ivdep
    for (int64_t i = 0; i < row.width; ++i) scratch[i] = gelu_of(finished(row, i));
    code(scratch, row.width, levels, codes, scale, zero);
}

float total_of(const float* x, int64_t count) {
    float sums[LANES] = {};
    in_lanes(count, [&](int64_t first, int64_t lanes) {
        for (int64_t j = 0; j < lanes; ++j) sums[j] += x[first + j];
    });
    return folded(sums, sum);
}

// From numbers in `out` and their sum: the input is centred first, since the variance is not the difference of two large numbers.
inline __attribute__((always_inline)) void norm_of(float total, const NormOf& norm, int64_t count, float* out) {
    const float size = static_cast<float>(count), mean = total / size;
    float squares[LANES] = {};
    in_lanes(count, [&](int64_t first, int64_t lanes) {
        float* x = out + first;
        for (int64_t j = 0; j < lanes; ++j) x[j] -= mean;
        for (int64_t j = 0; j < lanes; ++j) squares[j] = fma(x[j], x[j], squares[j]);
    });
    const float factor = 1.0f / __builtin_sqrtf(folded(squares, sum) / size + norm.epsilon);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = fma(out[i] * factor, norm.weight[i], norm.bias[i]);
}

void finish_normed(const ProductRow& row, const float* residual, const NormOf& norm, float* out) {
#pragma GCC ivdep
    for (int64_t i = 0; i < row.width; ++i) out[i] = finished(row, i) + residual[i];
    norm_of(total_of(out, row.width), norm, row.width, out);
}

void layer_norm(const float* x, const NormOf& norm, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[i];
    norm_of(total_of(x, count), norm, count, out);
}

float dot(const float* x, const float* weight, int64_t count) {
    float sums[LANES] = {};
    in_lanes(count, [&](int64_t first, int64_t lanes) {
        for (int64_t j = 0; j < lanes; ++j) sums[j] = fma(x[first + j], weight[first + j], sums[j]);
    });
    return folded(sums, sum);
}

constexpr Passes PASSES = {code, finish, finish_normed, finish_codes, layer_norm, gelu, tanh, dot};

}  // namespace
}  // namespace attnpress
