// torch.ops.attnpress.input_codes: what core/linear.py defines, in one pass over memory. torch's own operator of this kind
// is deprecated, and needs a second pass to hand out its bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for fractions, and rounds half to even
constexpr int64_t GRAIN = 1 << 15;

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void code(const float* x, float inverse, int32_t zero_point, int64_t count, uint8_t* codes) {
    const float low = static_cast<float>(-zero_point), high = static_cast<float>(255 - zero_point);
    for (int64_t i = 0; i < count; ++i) {
        float value = x[i] * inverse;
        value = value == value ? value : 0.0f;
        value = value < low ? low : value;
        value = value > high ? high : value;
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>((value + ROUND) - ROUND) + zero_point);
    }
}

Tensor input_codes(Tensor x, double scale, int64_t zero_point) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                    "attnpress: the input of a linear layer must be float32 and contiguous");
    STD_TORCH_CHECK(scale > 0 && zero_point >= 0 && zero_point <= 255, "attnpress: a step has a positive scale, and a code of zero up to 255");
    Tensor codes = torch::stable::empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), ScalarType::Byte);
    const auto* from = static_cast<const float*>(x.const_data_ptr());
    auto* to = static_cast<uint8_t*>(codes.mutable_data_ptr());
    const float inverse = 1.0f / static_cast<float>(scale);
    torch::stable::parallel_for(0, x.numel(), GRAIN, [&](int64_t begin, int64_t end) {
        code(from + begin, inverse, static_cast<int32_t>(zero_point), end - begin, to + begin);
    });
    return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnpress, m) { m.def("input_codes(Tensor x, float scale, int zero_point) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(attnpress, CPU, m) { m.impl("input_codes", TORCH_BOX(&input_codes)); }
