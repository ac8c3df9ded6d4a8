// torch.ops.attnpress.*: the operators, on the LibTorch stable ABI. Shapes and values are checked here, once a call, since
// whoever reaches torch.ops directly must get an error, not a crash; messages for people are in core/arguments.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "mask.h"

namespace {

using attnpress::Attention;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of the last call that this thread made: where it met NaN, somebody may want to look.
thread_local bool met_nan = false;

attnpress::DType dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return attnpress::DType::f32;
        case ScalarType::BFloat16: return attnpress::DType::bf16;
        case ScalarType::Half: return attnpress::DType::f16;
        default: STD_TORCH_CHECK(false, "attnpress: query, key and value must be float32, bfloat16 or float16");
    }
}

attnpress::Rows rows_of(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "attnpress: ", name, " must be a CPU tensor [B, H, S, D]");
    STD_TORCH_CHECK(x.numel() == 0 || x.size(3) <= 1 || x.stride(3) == 1, "attnpress: the last dimension of ", name, " must be contiguous");
    const auto size = static_cast<int64_t>(x.element_size());
    return {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size, dtype_of(x)};
}

// False for NaN too.
bool is_within(float x, float low, float high) { return x >= low && x <= high; }

attnpress::Scale scale_of(const Tensor& scale, int64_t heads, int64_t channels, const char* name) {
    const bool fits = scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.dim() == 4 && scale.size(0) == 1 &&
                      (scale.size(1) == 1 || scale.size(1) == heads) && scale.size(2) == 1 &&
                      (scale.size(3) == 1 || scale.size(3) == channels);
    STD_TORCH_CHECK(fits, "attnpress: ", name, "_scale must be float32 [1, 1 or heads, 1, 1", channels > 1 ? " or D" : "", "]");
    const attnpress::Scale found{static_cast<const float*>(scale.const_data_ptr()), scale.size(1) == 1 ? 0 : scale.stride(1),
                                 scale.size(3) == 1 ? 0 : scale.stride(3)};
    for (int64_t i = 0; i < scale.size(1) * scale.size(3); ++i) {
        const float x = found.data[i / scale.size(3) * found.head + i % scale.size(3) * found.channel];
        STD_TORCH_CHECK(is_within(x, attnpress::SMALLEST_SCALE, attnpress::LARGEST_SCALE), "attnpress: ", name,
                        "_scale must be 2^-40 to 2^40, found ", x);
    }
    return found;
}

// -ln tau, or theta for rule threshold: never negative nor NaN, since then not even a row's maximum would be kept.
const float* cutoff_of(const Tensor& cutoff, int64_t heads, attnpress::Rule rule) {
    const bool fits = cutoff.is_cpu() && cutoff.scalar_type() == ScalarType::Float && cutoff.dim() == 1 &&
                      cutoff.size(0) == heads && cutoff.is_contiguous();
    STD_TORCH_CHECK(fits, "attnpress: cutoff must be float32 [Hq], contiguous");
    const auto* values = static_cast<const float*>(cutoff.const_data_ptr());
    const float most = rule == attnpress::Rule::threshold ? 1.0f : INFINITY;
    for (int64_t head = 0; head < heads; ++head) {
        STD_TORCH_CHECK(is_within(values[head], 0.0f, most), "attnpress: cutoff must be 0 to ", most, ", found ", values[head]);
    }
    return values;
}

attnpress::MaskBytes mask_of(const std::optional<Tensor>& valid, const Attention& a) {
    if (!valid.has_value()) return {nullptr, 0, 0, 0};
    const Tensor& mask = *valid;
    const bool fits = mask.is_cpu() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 &&
                      (mask.size(0) == 1 || mask.size(0) == a.batch) && (mask.size(1) == 1 || mask.size(1) == a.q_heads) &&
                      (mask.size(2) == 1 || mask.size(2) == a.q_rows) && mask.size(3) == a.key_rows;
    STD_TORCH_CHECK(fits, "attnpress: valid must be bool [B or 1, Hq or 1, Sq or 1, Sk]");
    STD_TORCH_CHECK(mask.numel() == 0 || mask.size(3) <= 1 || mask.stride(3) == 1, "attnpress: the last dimension of valid must be contiguous");
    const auto stride = [&](int64_t d) { return mask.size(d) == 1 ? 0 : mask.stride(d); };
    return {static_cast<const uint8_t*>(mask.const_data_ptr()), stride(0), stride(1), stride(2)};
}

int32_t code_max(int64_t qmax, int64_t most, const char* name) {
    STD_TORCH_CHECK(qmax >= 1 && qmax <= most && (qmax & (qmax + 1)) == 0, "attnpress: ", name, "_max must be 2^n - 1, 1 to ", most);
    return static_cast<int32_t>(qmax);
}

attnpress::Rule rule_of(const std::string& rule) {
    if (rule == "relative") return attnpress::Rule::relative;
    if (rule == "threshold") return attnpress::Rule::threshold;
    STD_TORCH_CHECK(rule == "topk", "attnpress: no kernel for rule '", rule, "'; use relative, threshold or topk");
    return attnpress::Rule::topk;
}

attnpress::ProbMode mode_of(const std::string& mode) {
    if (mode == "row") return attnpress::ProbMode::row;
    if (mode == "unit") return attnpress::ProbMode::unit;
    STD_TORCH_CHECK(mode == "unit_renormalized", "attnpress: no mode '", mode, "'; use row, unit or unit_renormalized");
    return attnpress::ProbMode::unit_renormalized;
}

void on_torch_threads(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void check_shapes(const Attention& a, const Tensor& query, const Tensor& key, const Tensor& value) {
    STD_TORCH_CHECK(a.dim >= 4 && a.dim <= attnpress::LARGEST_HEAD && a.dim % 4 == 0, "attnpress: head size must be a multiple of 4 up to ", attnpress::LARGEST_HEAD, ", found ", a.dim);
    STD_TORCH_CHECK(a.kv_heads > 0 && a.q_heads % a.kv_heads == 0, "attnpress: query heads must be a multiple of key heads");
    for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(key.size(d) == value.size(d), "attnpress: key and value differ in shape");
    STD_TORCH_CHECK(key.size(0) == a.batch && key.size(3) == query.size(3), "attnpress: query and key differ in batch or head size");
    STD_TORCH_CHECK(a.key_rows < (int64_t{1} << 31) - 256, "attnpress: too many keys");
}

struct Options {
    std::optional<Tensor> valid, q_scale, cutoff;
    bool causal;
    double scaling, sparsity;
    std::string rule, mode;
    int64_t q_max, k_max, v_max, p_max;
    bool smooth_key, q_power_of_two;
    std::string tail;
    std::optional<Tensor> lift, tail_query, tail_key, tail_offset, tail_step;
};

// Whole numbers within a range, float32 and contiguous.
const float* whole_numbers(const std::optional<Tensor>& x, const std::vector<int64_t>& shape, float low, float high, const char* name) {
    bool fits = x.has_value() && x->is_cpu() && x->scalar_type() == ScalarType::Float && x->dim() == static_cast<int64_t>(shape.size()) && x->is_contiguous();
    for (size_t d = 0; fits && d < shape.size(); ++d) fits = x->size(static_cast<int64_t>(d)) == shape[d];
    STD_TORCH_CHECK(fits, "attnpress: ", name, " has another shape, dtype or device than the tail of this call, or is not contiguous");
    const auto* values = static_cast<const float*>(x->const_data_ptr());
    bool inside = true;
    for (int64_t i = 0; i < x->numel(); ++i) inside &= values[i] >= low && values[i] <= high && std::nearbyint(values[i]) == values[i];
    STD_TORCH_CHECK(inside, "attnpress: ", name, " must be whole numbers from ", low, " to ", high);
    return values;
}

attnpress::Tail tail_of(const Attention& a, const Options& o) {
    attnpress::Tail tail{};
    if (o.tail == "none") return tail;
    STD_TORCH_CHECK(o.tail == "mean" || o.tail == "linear", "attnpress: no tail '", o.tail, "'; use none, mean or linear");
    STD_TORCH_CHECK(a.mode == attnpress::ProbMode::row, "attnpress: a tail needs mode row");
    tail.kind = o.tail == "mean" ? attnpress::TailKind::mean : attnpress::TailKind::linear;
    tail.lift = whole_numbers(o.lift, {a.q_heads}, attnpress::TAIL_OFF, attnpress::LARGEST_LIFT, "tail_lift");
    for (int64_t head = 0; head < a.q_heads; ++head) {
        STD_TORCH_CHECK(tail.lift[head] >= 0 || tail.lift[head] == attnpress::TAIL_OFF, "attnpress: tail_lift must be 0 or more, or -2^20");
    }
    tail.rank = a.dim;
    if (tail.kind == attnpress::TailKind::mean || !o.tail_query.has_value()) return tail;
    STD_TORCH_CHECK(o.tail_query->dim() == 3, "attnpress: tail_query must be [Hkv, D, rank]");
    tail.rank = o.tail_query->size(2);
    STD_TORCH_CHECK(tail.rank >= 1 && tail.rank <= attnpress::LARGEST_RANK, "attnpress: the rank of a tail is 1 to ", attnpress::LARGEST_RANK, ", found ", tail.rank);
    const auto directions = [&](const std::optional<Tensor>& x, const char* name) {
        return whole_numbers(x, {a.kv_heads, a.dim, tail.rank}, -attnpress::LARGEST_DIRECTION, attnpress::LARGEST_DIRECTION, name);
    };
    tail.query = directions(o.tail_query, "tail_query");
    tail.key = directions(o.tail_key, "tail_key");
    tail.offset = whole_numbers(o.tail_offset, {a.kv_heads, tail.rank}, -attnpress::LARGEST_OFFSET, attnpress::LARGEST_OFFSET, "tail_offset");
    const bool fits = o.tail_step.has_value() && o.tail_step->is_cpu() && o.tail_step->scalar_type() == ScalarType::Float &&
                      o.tail_step->dim() == 1 && o.tail_step->size(0) == a.kv_heads && o.tail_step->is_contiguous();
    STD_TORCH_CHECK(fits, "attnpress: tail_step must be float32 [Hkv], contiguous");
    tail.step = static_cast<const float*>(o.tail_step->const_data_ptr());
    for (int64_t head = 0; head < a.kv_heads; ++head) {
        STD_TORCH_CHECK(is_within(tail.step[head], 0.0f, attnpress::LARGEST_SCALE), "attnpress: tail_step must be 0 to 2^40, found ", tail.step[head]);
    }
    return tail;
}

// All of a call but its masks and its output.
Attention call_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& k_scale, const Tensor& v_scale, const Options& o) {
    Attention a{};
    a.query = rows_of(query, "query");
    a.key = rows_of(key, "key");
    a.value = rows_of(value, "value");
    a.batch = query.size(0);
    a.q_heads = query.size(1);
    a.q_rows = query.size(2);
    a.dim = query.size(3);
    a.kv_heads = key.size(1);
    a.key_rows = key.size(2);
    check_shapes(a, query, key, value);
    a.k_scale = scale_of(k_scale, a.kv_heads, 1, "k");
    a.v_scale = scale_of(v_scale, a.kv_heads, a.dim, "v");
    if (o.q_scale.has_value()) a.q_scale = scale_of(*o.q_scale, a.q_heads, 1, "q");
    a.rule = rule_of(o.rule);
    if (o.cutoff.has_value()) a.cutoff = cutoff_of(*o.cutoff, a.q_heads, a.rule);
    met_nan = false;
    a.met_nan = &met_nan;
    a.parallel = on_torch_threads;
    a.threads = torch::stable::get_num_threads();
    a.sparsity = o.sparsity;
    a.scaling = static_cast<float>(o.scaling);
    STD_TORCH_CHECK(o.sparsity >= 0 && o.sparsity < 1, "attnpress: sparsity must be in [0, 1), found ", o.sparsity);
    STD_TORCH_CHECK(o.scaling >= attnpress::SMALLEST_SCALING && o.scaling <= attnpress::LARGEST_SCALING,
                    "attnpress: scaling must be 2^-32 to 2^32, found ", o.scaling);
    a.q_max = code_max(o.q_max, 127, "q");
    a.k_max = code_max(o.k_max, 127, "k");
    a.v_max = code_max(o.v_max, 127, "v");
    a.p_max = code_max(o.p_max, 255, "p");
    a.mode = mode_of(o.mode);
    a.smooth_key = o.smooth_key;
    a.q_power_of_two = o.q_power_of_two;
    a.tail = tail_of(a, o);
    return a;
}

Tensor output_of(Attention& a) {
    const std::vector<int64_t> shape{a.batch, a.q_rows, a.q_heads, a.dim};
    Tensor output = torch::stable::empty(shape, ScalarType::Float);
    a.output = static_cast<float*>(output.mutable_data_ptr());
    return output;
}

Tensor run(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& k_scale, const Tensor& v_scale,
           const Options& o, const attnpress::Trace* trace) {
    Attention a = call_of(query, key, value, k_scale, v_scale, o);
    a.trace = trace;
    const attnpress::MaskBytes mask = mask_of(o.valid, a);
    Tensor output = output_of(a);
    if (output.numel() == 0) return torch::stable::transpose(output, 1, 2);
    std::vector<attnpress::KeysOfBatch> owners;
    std::vector<attnpress::Keys> keys;
    const bool shared = mask.batch == 0;
    for (int64_t b = 0; b < (shared ? 1 : a.batch); ++b) owners.emplace_back(mask, b, a.q_heads, a.q_rows, a.key_rows, o.causal);
    for (int64_t b = 0; b < a.batch; ++b) keys.push_back(owners[shared ? 0 : b].view());
    a.keys = keys.data();
    attnpress::active_target().kernel(a);
    return torch::stable::transpose(output, 1, 2);
}

const int64_t* bounds_of(const Tensor& bounds, int64_t rows) {
    STD_TORCH_CHECK(bounds.is_cpu() && bounds.scalar_type() == ScalarType::Long && bounds.dim() == 1 && bounds.size(0) >= 1 && bounds.is_contiguous(),
                    "attnpress: bounds must be int64 [sequences + 1], contiguous");
    const auto* at = static_cast<const int64_t*>(bounds.const_data_ptr());
    bool ordered = at[0] == 0 && at[bounds.size(0) - 1] == rows;
    for (int64_t i = 1; i < bounds.size(0); ++i) ordered = ordered && at[i - 1] <= at[i];
    STD_TORCH_CHECK(ordered, "attnpress: bounds must rise from 0 to the number of tokens, ", rows);
    return at;
}

// The sequence of tokens [begin, end) of a call whose only batch element holds several, as a call of its own.
void attend_sequence(const Attention& whole, const attnpress::Target& target, int64_t begin, int64_t end, bool causal, int64_t threads) {
    if (begin == end) return;
    Attention a = whole;
    a.query.data += begin * a.query.row;
    a.key.data += begin * a.key.row;
    a.value.data += begin * a.value.row;
    a.output += begin * a.q_heads * a.dim;
    a.q_rows = a.key_rows = end - begin;
    a.threads = threads;
    const attnpress::KeysOfBatch owner({nullptr, 0, 0, 0}, 0, a.q_heads, a.q_rows, a.key_rows, causal);
    const attnpress::Keys keys = owner.view();
    a.keys = &keys;
    target.kernel(a);
}

// As in a batch: each thread takes whole sequences where there are enough of them, else all threads share each one.
Tensor attention_packed(Tensor query, Tensor key, Tensor value, Tensor bounds, bool causal, double scaling,
                        std::optional<Tensor> q_scale, Tensor k_scale, Tensor v_scale, std::optional<Tensor> cutoff,
                        std::string rule, double sparsity, std::string mode, int64_t q_max, int64_t k_max, int64_t v_max,
                        int64_t p_max, bool smooth_key, bool q_power_of_two, std::string tail, std::optional<Tensor> tail_lift,
                            std::optional<Tensor> tail_query, std::optional<Tensor> tail_key, std::optional<Tensor> tail_offset,
                            std::optional<Tensor> tail_step) {
    const Options options{std::nullopt, q_scale, cutoff, causal, scaling, sparsity, rule, mode, q_max, k_max, v_max, p_max, smooth_key, q_power_of_two, tail, tail_lift, tail_query, tail_key, tail_offset, tail_step};
    Attention a = call_of(query, key, value, k_scale, v_scale, options);
    STD_TORCH_CHECK(a.batch == 1 && a.q_rows == a.key_rows, "attnpress: packed tensors are [1, H, tokens, D], as many keys as queries");
    const int64_t* at = bounds_of(bounds, a.q_rows);
    const int64_t count = bounds.size(0) - 1;
    Tensor output = output_of(a);
    if (output.numel() == 0) return torch::stable::transpose(output, 1, 2);
    const attnpress::Target& target = attnpress::active_target();
    const auto attend = [&](int64_t i, int64_t threads) { attend_sequence(a, target, at[i], at[i + 1], causal, threads); };
    if (count % a.threads == 0 || count >= 4 * a.threads) {
        torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) attend(i, 1);
        });
    } else {
        for (int64_t i = 0; i < count; ++i) attend(i, a.threads);
    }
    return torch::stable::transpose(output, 1, 2);
}

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> valid, bool causal, double scaling,
                 std::optional<Tensor> q_scale, Tensor k_scale, Tensor v_scale, std::optional<Tensor> cutoff, std::string rule,
                 double sparsity, std::string mode, int64_t q_max, int64_t k_max, int64_t v_max, int64_t p_max,
                 bool smooth_key, bool q_power_of_two, std::string tail, std::optional<Tensor> tail_lift,
                            std::optional<Tensor> tail_query, std::optional<Tensor> tail_key, std::optional<Tensor> tail_offset,
                            std::optional<Tensor> tail_step) {
    const Options options{valid, q_scale, cutoff, causal, scaling, sparsity, rule, mode, q_max, k_max, v_max, p_max, smooth_key, q_power_of_two, tail, tail_lift, tail_query, tail_key, tail_offset, tail_step};
    return run(query, key, value, k_scale, v_scale, options, nullptr);
}

using Integers = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T> T* zeroed(Tensor& tensor) {
    torch::stable::zero_(tensor);
    return static_cast<T*>(tensor.mutable_data_ptr());
}

Integers attention_integers(Tensor query, Tensor key, Tensor value, std::optional<Tensor> valid, bool causal, double scaling,
                            std::optional<Tensor> q_scale, Tensor k_scale, Tensor v_scale, std::optional<Tensor> cutoff,
                            std::string rule, double sparsity, std::string mode, int64_t q_max, int64_t k_max, int64_t v_max,
                            int64_t p_max, bool smooth_key, bool q_power_of_two, std::string tail, std::optional<Tensor> tail_lift,
                            std::optional<Tensor> tail_query, std::optional<Tensor> tail_key, std::optional<Tensor> tail_offset,
                            std::optional<Tensor> tail_step) {
    const Options options{valid, q_scale, cutoff, causal, scaling, sparsity, rule, mode, q_max, k_max, v_max, p_max, smooth_key, q_power_of_two, tail, tail_lift, tail_query, tail_key, tail_offset, tail_step};
    call_of(query, key, value, k_scale, v_scale, options);  // what follows asks tensors for four sizes
    const auto room = [](std::vector<int64_t> shape, ScalarType type) { return torch::stable::empty(shape, type); };
    const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
    const int64_t kv_heads = key.size(1), keys = key.size(2);
    Tensor q = room({batch, heads, rows, dim}, ScalarType::Char), k = room({batch, kv_heads, keys, dim}, ScalarType::Char);
    Tensor v = room({batch, kv_heads, keys, dim}, ScalarType::Char), max = room({batch, heads, rows, 1}, ScalarType::Int);
    Tensor p = room({batch, heads, rows, keys}, ScalarType::Byte), sum = room({batch, heads, rows, 1}, ScalarType::Long);
    Tensor weighted = room({batch, heads, rows, dim}, ScalarType::Long);
    const int64_t tailed = tail == "none" ? 0 : batch;  // without a tail there is nothing to record
    Tensor count = room({tailed, heads, rows, 1}, ScalarType::Int), exponent = room({tailed, heads, rows, 1}, ScalarType::Int);
    Tensor distance = room({tailed, heads, rows, 1}, ScalarType::Long), score = room({tailed, heads, rows, 1}, ScalarType::Long);
    Tensor level = room({tailed, heads, rows, 1}, ScalarType::Float), total = room({tailed, heads, rows, dim}, ScalarType::Long);
    Tensor slope = room({tailed, heads, rows, dim}, ScalarType::Long);
    const attnpress::Trace trace{zeroed<int8_t>(q), zeroed<int8_t>(k), zeroed<int8_t>(v), zeroed<int32_t>(max),
                                 zeroed<uint8_t>(p), zeroed<int64_t>(sum), zeroed<int64_t>(weighted),
                                 zeroed<int32_t>(count), zeroed<int32_t>(exponent), zeroed<int64_t>(distance), zeroed<int64_t>(score),
                                 zeroed<float>(level), zeroed<int64_t>(total), zeroed<int64_t>(slope)};
    Tensor output = run(query, key, value, k_scale, v_scale, options, &trace);
    return {q, k, v, max, p, sum, weighted, output, count, exponent, distance, level, total, score, slope};
}

bool last_met_nan() { return met_nan; }

std::string active_target() { return attnpress::active_target().name; }

std::vector<std::string> supported_targets() {
    std::vector<std::string> names;
    for (const attnpress::Target* target = attnpress::targets(); target->name != nullptr; ++target) {
        if (target->supported()) names.emplace_back(target->name);
    }
    return names;
}

}  // namespace

#define ATTENTION_ARGUMENTS(WHERE)                                                                                          \
    "(Tensor query, Tensor key, Tensor value, " WHERE ", bool causal, float scaling, Tensor? q_scale, Tensor k_scale, "     \
    "Tensor v_scale, Tensor? cutoff, str rule, float sparsity, str mode, int q_max, int k_max, int v_max, int p_max, "      \
    "bool smooth_key, bool q_power_of_two, str tail=\"none\", Tensor? tail_lift=None, Tensor? tail_query=None, "           \
    "Tensor? tail_key=None, Tensor? tail_offset=None, Tensor? tail_step=None)"

STABLE_TORCH_LIBRARY(attnpress, m) {
    m.def("attention" ATTENTION_ARGUMENTS("Tensor? valid") " -> Tensor");
    m.def("attention_packed" ATTENTION_ARGUMENTS("Tensor bounds") " -> Tensor");
    m.def("attention_integers" ATTENTION_ARGUMENTS("Tensor? valid") " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
          "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("active_target() -> str");
    m.def("met_nan() -> bool");
    m.def("supported_targets() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(attnpress, CPU, m) {
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("attention_packed", TORCH_BOX(&attention_packed));
    m.impl("attention_integers", TORCH_BOX(&attention_integers));
}

STABLE_TORCH_LIBRARY_IMPL(attnpress, CompositeExplicitAutograd, m) {
    m.impl("active_target", TORCH_BOX(&active_target));
    m.impl("met_nan", TORCH_BOX(&last_met_nan));
    m.impl("supported_targets", TORCH_BOX(&supported_targets));
}
