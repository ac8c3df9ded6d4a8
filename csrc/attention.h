// The contract between the torch operator (library.cpp), the algorithm (attention_body.h) and the CPU targets (isa_*.cpp).
// Shapes: query [B, Hq, Sq, D]; key, value [B, Hkv, Sk, D]; output float32 [B, Sq, Hq, D], contiguous.
#pragma once

#include <cstdint>

#include "exponential.h"

namespace attnpress {

// Ranges within which distances, steps and cuts stay ordinary float32 numbers: core/arguments.py.
constexpr float SMALLEST_SCALE = 0x1p-40f, LARGEST_SCALE = 0x1p40f;
constexpr float SMALLEST_SCALING = 0x1p-32f, LARGEST_SCALING = 0x1p32f;

enum class DType : int32_t { f32, bf16, f16 };
enum class Rule : int32_t { relative, threshold, topk };
enum class ProbMode : int32_t { row, unit, unit_renormalized };
enum class TailKind : int32_t { none, mean, linear };

// A tensor [B, H, S, D] whose last dimension is contiguous; strides in bytes.
struct Rows {
    const char* data;
    int64_t batch, head, row;
    DType dtype;
};

// float32 [1, 1 or H, 1, 1 or D]; strides in elements, 0 where shared. data is null where Q is scaled row by row.
struct Scale {
    const float* data;
    int64_t head, channel;
};

// Which packed keys a query row may attend to: [begin, end).
struct Span {
    int32_t begin, end;
};

// The mask of one batch element, understood (mask.h).
struct Keys {
    const int32_t* packed;  // [packed_count] original indexes of the keys that are packed, ascending
    const int32_t* seen;    // [seen_count] of the keys that some query may attend to
    const Span* spans;      // [Sq]
    const uint8_t* bytes;   // a mask that spans cannot express, else null; then all Sk keys are packed
    int64_t byte_head, byte_row;
    int32_t packed_count, seen_count;
};

// What the pairs of a row without a P code add (numerics, section 8). Whole numbers as float32, contiguous, but for step.
struct Tail {
    TailKind kind;
    int64_t rank;        // directions; D where the whole score is seen
    const float* lift;   // [Hq]; TAIL_OFF for a head without a tail
    const float *query, *key;  // [Hkv, D, rank]; null where the whole score is seen
    const float *offset, *step;  // [Hkv, rank] and [Hkv]; likewise
};

// Bounds of what `Tail` points to, within which sums fit: core/tail.py.
constexpr float TAIL_OFF = -0x1p20f, LARGEST_LIFT = T_MAX, LARGEST_DIRECTION = 32767, LARGEST_OFFSET = 0x1p20f;
constexpr int64_t LARGEST_RANK = 256;

constexpr int LARGEST_HEAD = 256;  // kernels/head_size.py

// Where to record the integers of a call; null in normal use. Codes of keys that nobody may attend to stay untouched.
struct Trace {
    int8_t *q_codes, *k_codes, *v_codes;  // [B, Hq or Hkv, S, D]
    int32_t* row_max;                     // [B, Hq, Sq], 0 in a row without a valid key
    uint8_t* p_codes;                     // [B, Hq, Sq, Sk], zeroed by the caller
    int64_t* code_sum;                    // [B, Hq, Sq]
    int64_t* weighted;                    // [B, Hq, Sq, D]
    int32_t *tail_count, *tail_exponent;  // [B, Hq, Sq], as are the next two
    int64_t *tail_distance, *tail_score;
    float* tail_level;
    int64_t *tail_value, *tail_slope;     // [B, Hq, Sq, D]
};

struct Attention {
    Rows query, key, value;
    float* output;
    const Keys* keys;  // [B]
    Scale q_scale, k_scale, v_scale;
    const float* cutoff;  // [Hq]: -ln tau, or theta for rule threshold; null prunes nothing
    Tail tail;
    const Trace* trace;
    bool* met_nan;  // set where a value to be coded is NaN, or where a sum of values leaves float32
    // Runs body(context, begin, end) over [0, count) on torch's threads.
    void (*parallel)(int64_t count, void (*body)(void*, int64_t, int64_t), void* context);
    double sparsity;  // of rule topk
    int64_t batch, q_heads, kv_heads, q_rows, key_rows, dim, threads;
    float scaling;
    int32_t q_max, k_max, v_max, p_max;  // largest codes; p_max is 2^n - 1
    Rule rule;
    ProbMode mode;
    bool smooth_key, q_power_of_two;
};

using Kernel = void (*)(const Attention&);

struct Target {
    const char* name;
    Kernel kernel;
    bool (*supported)();
};

// Targets of this build, best first; terminated by a null name.
const Target* targets();

// The target in force: the one ATTNPRESS_CPU_TARGET names, else the first that this processor supports.
// Throws std::runtime_error if the one named is unknown or unsupported.
const Target& active_target();

void attention_scalar(const Attention&);
void attention_avx2(const Attention&);
void attention_avx512vnni(const Attention&);
void attention_amx(const Attention&);

}  // namespace attnpress
