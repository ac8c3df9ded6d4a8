// The operator of gradients.h: heads in parallel, each on its own rows of the results.
#include "gradients.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"

namespace {

using attnpress::Gradients;
using attnpress::HeadGradients;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Gradients gradients() {
    const std::string target = attnpress::active_target().name;
#if defined(__x86_64__)
    if (target == "avx2") return attnpress::gradients_avx2;
    if (target != "scalar") return attnpress::gradients_avx512;
#endif
    return attnpress::gradients_scalar;
}

const void* data(const Tensor& x, ScalarType type, const std::vector<int64_t>& shape, const char* name) {
    bool fits = x.is_cpu() && x.scalar_type() == type && x.is_contiguous() && x.dim() == static_cast<int64_t>(shape.size());
    for (size_t d = 0; fits && d < shape.size(); ++d) fits = x.size(static_cast<int64_t>(d)) == shape[d];
    STD_TORCH_CHECK(fits, "attnpress: ", name, " has another shape, dtype or device than this call, or is not contiguous");
    return x.const_data_ptr();
}

Tensor zeros(const std::vector<int64_t>& shape) {
    Tensor made = torch::stable::empty(shape, ScalarType::Float);
    torch::stable::zero_(made);
    return made;
}

std::tuple<Tensor, Tensor, Tensor> attention_gradients(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor codes,
                                                       std::optional<Tensor> kept, double factor, Tensor terms) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && terms.dim() == 4, "attnpress: query and key must be [B, H, S, D], terms [B, H, Sq, 3, 5 or 6]");
    const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3), keys = key.size(2);
    const int64_t count = terms.size(3);
    STD_TORCH_CHECK(dim >= 4 && dim % 4 == 0, "attnpress: head size must be a multiple of 4, found ", dim);
    STD_TORCH_CHECK(count == 3 || count == 5 || count == 6, "attnpress: a row has 3, 5 or 6 terms, found ", count);
    const std::vector<int64_t> of_rows{batch, heads, rows, dim}, of_keys{batch, heads, keys, dim}, of_pairs{batch, heads, rows, keys};
    const auto floats = [&](const Tensor& x, const std::vector<int64_t>& shape, const char* name) {
        return static_cast<const float*>(data(x, ScalarType::Float, shape, name));
    };
    const auto bytes = [&](const Tensor& x, const char* name) { return static_cast<const uint8_t*>(data(x, ScalarType::Byte, of_pairs, name)); };
    Tensor grad_query = zeros(of_rows), grad_key = zeros(of_keys), grad_value = zeros(of_keys);
    const HeadGradients all{
        floats(query, of_rows, "query"), floats(key, of_keys, "key"), floats(value, of_keys, "value"), floats(grad, of_rows, "grad"),
        bytes(codes, "codes"), kept.has_value() ? bytes(*kept, "kept") : nullptr,
        floats(terms, {batch, heads, rows, count}, "terms"),
        static_cast<float*>(grad_query.mutable_data_ptr()), static_cast<float*>(grad_key.mutable_data_ptr()),
        static_cast<float*>(grad_value.mutable_data_ptr()), nullptr, rows, keys, dim, count, static_cast<float>(factor)};
    const Gradients run = gradients();
    torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> survivors(static_cast<size_t>(keys) + 1);
        for (int64_t head = begin; head < end; ++head) {
            HeadGradients h = all;
            for (const float** x : {&h.query, &h.grad}) *x += head * rows * dim;
            for (const float** x : {&h.key, &h.value}) *x += head * keys * dim;
            for (float** x : {&h.grad_key, &h.grad_value}) *x += head * keys * dim;
            h.grad_query += head * rows * dim;
            h.terms += head * rows * count;
            h.codes += head * rows * keys;
            if (h.kept != nullptr) h.kept += head * rows * keys;
            h.survivors = survivors.data();
            run(h);
        }
    });
    return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnpress, m) {
    m.def("attention_gradients(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor codes, Tensor? kept, float factor, "
          "Tensor terms) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(attnpress, CPU, m) { m.impl("attention_gradients", TORCH_BOX(&attention_gradients)); }
