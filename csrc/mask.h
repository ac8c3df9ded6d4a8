// Reads a boolean mask once, so that the kernel skips what it rules out instead of masking it.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace attnpress {

// A bool mask [B, H, Sq, Sk] by strides in bytes (0 where broadcast); the last dimension is contiguous. Null allows all.
struct MaskBytes {
    const uint8_t* data;
    int64_t batch, head, row;
};

// Owns what `Keys` points to. Padding, causal, sliding windows and their mixtures become one span of packed keys per row;
// a mask that differs by head, or has holes, stays in bytes.
class KeysOfBatch {
  public:
    KeysOfBatch(const MaskBytes& mask, int64_t batch, int64_t heads, int64_t rows, int64_t keys, bool causal);
    Keys view() const;

  private:
    void see_all(int64_t rows, int64_t keys, bool causal);
    // False if a byte is neither 0 nor 1, as in a view of other bytes as bool: nothing below could count with them.
    bool read(const MaskBytes& mask, int64_t heads, int64_t rows, int64_t keys, bool causal);
    MaskBytes as_booleans(const MaskBytes& mask, int64_t heads, int64_t rows, int64_t keys);
    bool find_spans(const uint8_t* first_row, int64_t row_stride, int64_t rows, int64_t keys, bool causal);

    std::vector<int32_t> seen_, all_;
    std::vector<Span> spans_;
    std::vector<uint8_t> booleans_;
    const uint8_t* bytes_ = nullptr;
    int64_t byte_head_ = 0, byte_row_ = 0;
};

}  // namespace attnpress
