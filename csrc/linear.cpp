// torch.ops.attnpress.token_codes, finish_product, finish_normed and finish_codes: what core/linear.py defines around the product of
// codes, each in one pass over memory. The product itself is oneDNN's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for fractions, and rounds half to even
constexpr float SMALLEST_SCALE = 0x1p-40f, LARGEST_SCALE = 0x1p40f;  // those of core/quantizer.py
constexpr int64_t LANES = 64;
constexpr int64_t GRAIN = 1 << 15;

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

// Lanes made one in few steps: one after the other, they would wait for each other.
template <typename Join>
inline __attribute__((always_inline)) float folded(float* lanes, Join join) {
    for (int64_t j = 0; j < 32; ++j) lanes[j] = join(lanes[j], lanes[j + 32]);
    for (int64_t j = 0; j < 16; ++j) lanes[j] = join(lanes[j], lanes[j + 16]);
    for (int64_t j = 0; j < 8; ++j) lanes[j] = join(lanes[j], lanes[j + 8]);
    for (int64_t j = 0; j < 4; ++j) lanes[j] = join(lanes[j], lanes[j + 4]);
    return join(join(lanes[0], lanes[1]), join(lanes[2], lanes[3]));
}

// Smallest and largest value of a row, and zero. Arrays of lanes, since a compiler may not reorder a reduction by itself.
FOR_EACH_PROCESSOR
void range_of(const float* x, int64_t count, float* lowest, float* highest) {
    float low[LANES] = {}, high[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int64_t j = 0; j < LANES; ++j) low[j] = x[i + j] < low[j] ? x[i + j] : low[j];
        for (int64_t j = 0; j < LANES; ++j) high[j] = x[i + j] > high[j] ? x[i + j] : high[j];
    }
    for (; i < count; ++i) {
        low[0] = x[i] < low[0] ? x[i] : low[0];
        high[0] = x[i] > high[0] ? x[i] : high[0];
    }
    *lowest = folded(low, [](float a, float b) { return b < a ? b : a; });
    *highest = folded(high, [](float a, float b) { return b > a ? b : a; });
}

FOR_EACH_PROCESSOR
void code(const float* x, float inverse, float zero, int64_t count, uint8_t* codes) {
    const float low = -zero, high = 255.0f - zero;
    const int32_t shift = static_cast<int32_t>(zero);
    for (int64_t i = 0; i < count; ++i) {
        float value = x[i] * inverse;
        value = value == value ? value : 0.0f;
        value = value < low ? low : value;
        value = value > high ? high : value;
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>((value + ROUND) - ROUND) + shift);
    }
}

void code_row(const float* x, int64_t count, uint8_t* codes, float* scale, float* zero) {
    float low, high;
    range_of(x, count, &low, &high);
    float step = (high - low) / 255.0f;
    if (step > 0) {
        step = step < SMALLEST_SCALE ? SMALLEST_SCALE : step > LARGEST_SCALE ? LARGEST_SCALE : step;
    } else {
        step = 1.0f;
    }
    const float inverse = 1.0f / step, least = low * inverse;
    const float rounded = ((least < -255.0f ? -255.0f : least) + ROUND) - ROUND;
    *scale = step;
    *zero = 0.0f - rounded;
    code(x, inverse, *zero, count, codes);
}

FOR_EACH_PROCESSOR
void finish(const float* product, float scale, float zero, const float* column, const float* bias, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = (product[i] - zero * column[i]) * scale + bias[i];
}

// x/2 (1 + erf(x / sqrt 2)), with the rational approximation of erf that Eigen and XLA have: a few units in the last place.
FOR_EACH_PROCESSOR
void gelu(float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        float u = x[i] * 0.70710678f;
        u = u < -4.0f ? -4.0f : u;
        u = u > 4.0f ? 4.0f : u;
        const float s = u * u;
        float p = -2.72614225801306e-10f;
        p = p * s + 2.77068142495902e-08f;
        p = p * s - 2.10102402082508e-06f;
        p = p * s - 5.69250639462346e-05f;
        p = p * s - 7.34990630326855e-04f;
        p = p * s - 2.95459980854025e-03f;
        p = p * s - 1.60960333262415e-02f;
        float q = -1.45660718464996e-05f;
        q = q * s - 2.13374055278905e-04f;
        q = q * s - 1.68282697438203e-03f;
        q = q * s - 7.37332916720468e-03f;
        q = q * s - 1.42647390514189e-02f;
        const float half = 0.5f * x[i];
        x[i] = half + half * (u * p / q);
    }
}

// Sum in lanes, as a compiler may not reorder it by itself.
FOR_EACH_PROCESSOR
float sum_of(const float* x, int64_t count) {
    float sums[LANES] = {}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int64_t j = 0; j < LANES; ++j) sums[j] += x[i + j];
    }
    for (; i < count; ++i) total += x[i];
    return total + folded(sums, [](float a, float b) { return a + b; });
}

// What a layer norm divides by, once its input is centred: the variance is not the difference of two large numbers.
FOR_EACH_PROCESSOR
float centre(float* x, int64_t count) {
    const float mean = sum_of(x, count) / static_cast<float>(count);
    float squares[LANES] = {}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int64_t j = 0; j < LANES; ++j) x[i + j] -= mean;
        for (int64_t j = 0; j < LANES; ++j) squares[j] += x[i + j] * x[i + j];
    }
    for (; i < count; ++i) {
        x[i] -= mean;
        total += x[i] * x[i];
    }
    total += folded(squares, [](float a, float b) { return a + b; });
    return total / static_cast<float>(count);
}

FOR_EACH_PROCESSOR
void add(float* x, const float* other, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] += other[i];
}

FOR_EACH_PROCESSOR
void stretch(float* x, float factor, const float* weight, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = x[i] * factor * weight[i] + bias[i];
}

// A product's rows as oneDNN left them, and what makes them the layer's output.
struct Product {
    const float *sums, *scale, *zero, *column, *bias;
    int64_t rows, width;
    std::vector<float> none;  // in place of a bias

    Product(const Tensor& product, const Tensor& scales, const Tensor& zeros, const Tensor& columns, const std::optional<Tensor>& biases)
        : sums(floats(product, product.numel())), scale(floats(scales, scales.numel())), zero(floats(zeros, scales.numel())),
          rows(scales.numel()), width(columns.numel()) {
        STD_TORCH_CHECK(product.numel() == rows * width, "attnpress: a product of ", rows, " rows and ", width, " columns was expected");
        column = floats(columns, width);
        none.resize(biases.has_value() ? 0 : width);
        bias = biases.has_value() ? floats(*biases, width) : none.data();
    }

    static const float* floats(const Tensor& x, int64_t count) {
        STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                        "attnpress: float32, contiguous and of ", count, " numbers was expected");
        return static_cast<const float*>(x.const_data_ptr());
    }

    void finish_row(int64_t row, float* out) const { finish(sums + row * width, scale[row], zero[row], column, bias, width, out); }

    int64_t grain() const { return rows_at_once(width); }

    static int64_t rows_at_once(int64_t width) { return GRAIN / (width > GRAIN ? GRAIN : width < 1 ? 1 : width); }
};

float* writable(const Tensor& x, int64_t count) { return const_cast<float*>(Product::floats(x, count)); }

uint8_t* writable_codes(const Tensor& x, int64_t count) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Byte && x.is_contiguous() && x.numel() == count,
                    "attnpress: codes must be uint8, contiguous and ", count);
    return static_cast<uint8_t*>(x.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> token_codes(Tensor x) {
    STD_TORCH_CHECK(x.dim() >= 1, "attnpress: the input of a linear layer must have a dimension");
    const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), outer(shape.begin(), shape.end() - 1);
    Tensor codes = torch::stable::empty(shape, ScalarType::Byte);
    Tensor scale = torch::stable::empty(outer, ScalarType::Float), zero = torch::stable::empty(outer, ScalarType::Float);
    const int64_t width = shape.back();
    const float* from = Product::floats(x, x.numel());
    uint8_t* to = writable_codes(codes, x.numel());
    float *scales = writable(scale, scale.numel()), *zeros = writable(zero, scale.numel());
    torch::stable::parallel_for(0, scale.numel(), Product::rows_at_once(width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) code_row(from + row * width, width, to + row * width, scales + row, zeros + row);
    });
    return {codes, scale, zero};
}

void finish_product(Tensor product, Tensor scale, Tensor zero, Tensor column, std::optional<Tensor> bias, Tensor out) {
    const Product p(product, scale, zero, column, bias);
    float* to = writable(out, p.rows * p.width);
    torch::stable::parallel_for(0, p.rows, p.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) p.finish_row(row, to + row * p.width);
    });
}

void finish_normed(Tensor product, Tensor scale, Tensor zero, Tensor column, std::optional<Tensor> bias, Tensor residual,
                   Tensor norm_weight, Tensor norm_bias, double epsilon, Tensor out) {
    const Product p(product, scale, zero, column, bias);
    const float *added = Product::floats(residual, p.rows * p.width), *weight = Product::floats(norm_weight, p.width),
                *shift = Product::floats(norm_bias, p.width);
    float* to = writable(out, p.rows * p.width);
    torch::stable::parallel_for(0, p.rows, p.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* line = to + row * p.width;
            p.finish_row(row, line);
            add(line, added + row * p.width, p.width);
            const float factor = 1.0f / std::sqrt(centre(line, p.width) + static_cast<float>(epsilon));
            stretch(line, factor, weight, shift, p.width);
        }
    });
}

void finish_codes(Tensor product, Tensor scale, Tensor zero, Tensor column, std::optional<Tensor> bias, Tensor codes, Tensor code_scale,
                  Tensor code_zero) {
    const Product p(product, scale, zero, column, bias);
    uint8_t* to = writable_codes(codes, p.rows * p.width);
    float *scales = writable(code_scale, p.rows), *zeros = writable(code_zero, p.rows);
    torch::stable::parallel_for(0, p.rows, p.grain(), [&](int64_t begin, int64_t end) {
        std::vector<float> line(p.width);
        for (int64_t row = begin; row < end; ++row) {
            p.finish_row(row, line.data());
            gelu(line.data(), p.width);
            code_row(line.data(), p.width, to + row * p.width, scales + row, zeros + row);
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnpress, m) {
    m.def("token_codes(Tensor x) -> (Tensor, Tensor, Tensor)");
    m.def("finish_product(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor? bias, Tensor(a!) out) -> ()");
    m.def(
        "finish_normed(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor? bias, Tensor residual, "
        "Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor(a!) out) -> ()");
    m.def(
        "finish_codes(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor? bias, Tensor(a!) codes, "
        "Tensor(b!) code_scale, Tensor(c!) code_zero) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnpress, CPU, m) {
    m.impl("token_codes", TORCH_BOX(&token_codes));
    m.impl("finish_product", TORCH_BOX(&finish_product));
    m.impl("finish_normed", TORCH_BOX(&finish_normed));
    m.impl("finish_codes", TORCH_BOX(&finish_codes));
}
