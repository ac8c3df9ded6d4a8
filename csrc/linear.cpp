// Operators of linear layers: what core/linear.py and core/ordered.py define around the product of codes, each in one pass over
// memory, and the small float products of poolers and heads. The product of codes itself is a library's, and exact.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using attnpress::NormOf;
using attnpress::Passes;
using attnpress::ProductRow;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 1 << 15;

// Of the widest instruction set of this processor, or the one that ATTNPRESS_CPU_TARGET holds the process to.
const Passes& passes() {
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2");
    static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* variable = std::getenv("ATTNPRESS_CPU_TARGET");
    const std::string wanted = variable == nullptr ? "" : variable;
    if (avx2 && wanted != "scalar") return avx512 && wanted != "avx2" ? attnpress::passes_avx512() : attnpress::passes_avx2();
#endif
    return attnpress::passes_scalar();
}

const float* floats(const Tensor& x, int64_t count) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                    "attnpress: float32, contiguous and of ", count, " numbers was expected");
    return static_cast<const float*>(x.const_data_ptr());
}

float* writable(const Tensor& x, int64_t count) { return const_cast<float*>(floats(x, count)); }

uint8_t* writable_codes(const Tensor& x, int64_t count) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Byte && x.is_contiguous() && x.numel() == count,
                    "attnpress: codes must be uint8, contiguous and ", count);
    return static_cast<uint8_t*>(x.mutable_data_ptr());
}

float levels_of(int64_t bits) {
    STD_TORCH_CHECK(bits >= 1 && bits <= 8, "attnpress: codes have 1 to 8 bits, found ", bits);
    return static_cast<float>((1 << bits) - 1);
}

int64_t rows_at_once(int64_t width) { return GRAIN / (width > GRAIN ? GRAIN : width < 1 ? 1 : width); }

template <typename Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
    torch::stable::parallel_for(0, rows, rows_at_once(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) row(i);
    });
}

// A product's rows as the multiplication left them, and what makes them the layer's output.
struct Product {
    const float *sums, *scale, *zero, *column, *weight_scale, *bias;
    int64_t rows, width;
    std::vector<float> none;  // in place of a bias

    Product(const Tensor& product, const Tensor& scales, const Tensor& zeros, const Tensor& columns, const Tensor& weight_scales,
            const std::optional<Tensor>& biases)
        : sums(floats(product, product.numel())), scale(floats(scales, scales.numel())), zero(floats(zeros, scales.numel())),
          rows(scales.numel()), width(columns.numel()) {
        STD_TORCH_CHECK(product.numel() == rows * width, "attnpress: a product of ", rows, " rows and ", width, " columns was expected");
        column = floats(columns, width);
        weight_scale = floats(weight_scales, width);
        none.resize(biases.has_value() ? 0 : width);
        bias = biases.has_value() ? floats(*biases, width) : none.data();
    }

    ProductRow row(int64_t i) const { return {sums + i * width, scale[i], zero[i], column, weight_scale, bias, width}; }
};

std::tuple<Tensor, Tensor, Tensor> token_codes(Tensor x, int64_t bits) {
    STD_TORCH_CHECK(x.dim() >= 1, "attnpress: the input of a linear layer must have a dimension");
    const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), outer(shape.begin(), shape.end() - 1);
    Tensor codes = torch::stable::empty(shape, ScalarType::Byte);
    Tensor scale = torch::stable::empty(outer, ScalarType::Float), zero = torch::stable::empty(outer, ScalarType::Float);
    const int64_t width = shape.back();
    const float* from = floats(x, x.numel());
    const float levels = levels_of(bits);
    uint8_t* to = writable_codes(codes, x.numel());
    float *scales = writable(scale, scale.numel()), *zeros = writable(zero, scale.numel());
    const Passes& run = passes();
    for_rows(scale.numel(), width, [&](int64_t i) { run.code(from + i * width, width, levels, to + i * width, scales + i, zeros + i); });
    return {codes, scale, zero};
}

void finish_product(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor weight_scale, std::optional<Tensor> bias,
                    Tensor out) {
    const Product p(product, scale, zero, column, weight_scale, bias);
    float* to = writable(out, p.rows * p.width);
    const Passes& run = passes();
    for_rows(p.rows, p.width, [&](int64_t i) { run.finish(p.row(i), to + i * p.width); });
}

void finish_normed(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor weight_scale, std::optional<Tensor> bias,
                   Tensor residual, Tensor norm_weight, Tensor norm_bias, double epsilon, Tensor out) {
    const Product p(product, scale, zero, column, weight_scale, bias);
    const float* added = floats(residual, p.rows * p.width);
    const NormOf norm = {floats(norm_weight, p.width), floats(norm_bias, p.width), static_cast<float>(epsilon)};
    float* to = writable(out, p.rows * p.width);
    const Passes& run = passes();
    for_rows(p.rows, p.width, [&](int64_t i) { run.finish_normed(p.row(i), added + i * p.width, norm, to + i * p.width); });
}

void finish_codes(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor weight_scale, std::optional<Tensor> bias,
                  int64_t bits, Tensor codes, Tensor code_scale, Tensor code_zero) {
    const Product p(product, scale, zero, column, weight_scale, bias);
    uint8_t* to = writable_codes(codes, p.rows * p.width);
    float *scales = writable(code_scale, p.rows), *zeros = writable(code_zero, p.rows);
    const float levels = levels_of(bits);
    const Passes& run = passes();
    torch::stable::parallel_for(0, p.rows, rows_at_once(p.width), [&](int64_t begin, int64_t end) {
        std::vector<float> line(p.width);
        for (int64_t i = begin; i < end; ++i) {
            run.finish_codes(p.row(i), levels, line.data(), to + i * p.width, scales + i, zeros + i);
        }
    });
}

Tensor layer_norm(Tensor x, Tensor weight, Tensor bias, double epsilon) {
    const int64_t width = weight.numel(), rows = width == 0 ? 0 : x.numel() / width;
    const NormOf norm = {floats(weight, width), floats(bias, width), static_cast<float>(epsilon)};
    Tensor out = torch::stable::empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), ScalarType::Float);
    const float* from = floats(x, rows * width);
    float* to = writable(out, rows * width);
    const Passes& run = passes();
    for_rows(rows, width, [&](int64_t i) { run.layer_norm(from + i * width, norm, width, to + i * width); });
    return out;
}

Tensor each(const Tensor& x, void (*pass)(const float*, int64_t, float*)) {
    Tensor out = torch::stable::empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), ScalarType::Float);
    const float* from = floats(x, x.numel());
    float* to = writable(out, x.numel());
    torch::stable::parallel_for(0, x.numel(), GRAIN, [&](int64_t begin, int64_t end) { pass(from + begin, end - begin, to + begin); });
    return out;
}

Tensor each_gelu(Tensor x) { return each(x, passes().gelu); }

Tensor each_tanh(Tensor x) { return each(x, passes().tanh); }

Tensor ordered_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1),
                    "attnpress: a weight [N, K] and an input [..., K] were expected");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    const int64_t inputs = weight.size(1), outputs = weight.size(0);
    shape.back() = outputs;
    Tensor out = torch::stable::empty(shape, ScalarType::Float);
    const float *from = floats(x, x.numel()), *codes = floats(weight, inputs * outputs);
    const float* shift = bias.has_value() ? floats(*bias, outputs) : nullptr;
    float* to = writable(out, out.numel());
    const Passes& run = passes();
    for_rows(out.numel(), inputs, [&](int64_t i) {
        const float found = run.dot(from + i / outputs * inputs, codes + i % outputs * inputs, inputs);
        to[i] = shift == nullptr ? found : found + shift[i % outputs];
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnpress, m) {
    m.def("token_codes(Tensor x, int bits) -> (Tensor, Tensor, Tensor)");
    m.def("finish_product(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor weight_scale, Tensor? bias, "
          "Tensor(a!) out) -> ()");
    m.def(
        "finish_normed(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor weight_scale, Tensor? bias, "
        "Tensor residual, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor(a!) out) -> ()");
    m.def(
        "finish_codes(Tensor product, Tensor scale, Tensor zero, Tensor column, Tensor weight_scale, Tensor? bias, int bits, "
        "Tensor(a!) codes, Tensor(b!) code_scale, Tensor(c!) code_zero) -> ()");
    m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> Tensor");
    m.def("gelu(Tensor x) -> Tensor");
    m.def("tanh(Tensor x) -> Tensor");
    m.def("ordered_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(attnpress, CPU, m) {
    m.impl("token_codes", TORCH_BOX(&token_codes));
    m.impl("finish_product", TORCH_BOX(&finish_product));
    m.impl("finish_normed", TORCH_BOX(&finish_normed));
    m.impl("finish_codes", TORCH_BOX(&finish_codes));
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("gelu", TORCH_BOX(&each_gelu));
    m.impl("tanh", TORCH_BOX(&each_tanh));
    m.impl("ordered_linear", TORCH_BOX(&ordered_linear));
}
