#include "mask.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace attnpress {
namespace {

// Keys that the causal order leaves to a row: the last row sees all, as in tril(Sk - Sq).
int64_t causal_end(int64_t row, int64_t rows, int64_t keys, bool causal) {
    return causal ? std::clamp<int64_t>(row + keys - rows + 1, 0, keys) : keys;
}

}  // namespace

KeysOfBatch::KeysOfBatch(const MaskBytes& mask, int64_t batch, int64_t heads, int64_t rows, int64_t keys, bool causal)
    : spans_(rows) {
    if (mask.data == nullptr) {
        see_all(rows, keys, causal);
    } else {
        const MaskBytes own{mask.data + batch * mask.batch, 0, mask.head, mask.row};
        if (!read(own, heads, rows, keys, causal)) read(as_booleans(own, heads, rows, keys), heads, rows, keys, causal);
    }
}

void KeysOfBatch::see_all(int64_t rows, int64_t keys, bool causal) {
    seen_.resize(rows > 0 ? keys : 0);
    std::iota(seen_.begin(), seen_.end(), 0);
    for (int64_t row = 0; row < rows; ++row) {
        spans_[row] = {0, static_cast<int32_t>(causal_end(row, rows, keys, causal))};
    }
}

MaskBytes KeysOfBatch::as_booleans(const MaskBytes& mask, int64_t heads, int64_t rows, int64_t keys) {
    const int64_t own_heads = mask.head == 0 ? 1 : heads, own_rows = mask.row == 0 ? 1 : rows;
    booleans_.reserve(own_heads * own_rows * keys);
    for (int64_t head = 0; head < own_heads; ++head) {
        for (int64_t row = 0; row < own_rows; ++row) {
            const uint8_t* valid = mask.data + head * mask.head + row * mask.row;
            for (int64_t key = 0; key < keys; ++key) booleans_.push_back(valid[key] != 0);
        }
    }
    return {booleans_.data(), 0, mask.head == 0 ? 0 : own_rows * keys, mask.row == 0 ? 0 : keys};
}

bool KeysOfBatch::read(const MaskBytes& mask, int64_t heads, int64_t rows, int64_t keys, bool causal) {
    std::vector<uint8_t> any(keys, 0);
    const bool same_rows = mask.row == 0 && !causal;
    for (int64_t head = 0; head < (mask.head == 0 ? 1 : heads); ++head) {
        for (int64_t row = 0; row < (same_rows ? 1 : rows); ++row) {
            const uint8_t* valid = mask.data + head * mask.head + row * mask.row;
            const int64_t end = causal_end(row, rows, keys, causal);
            for (int64_t key = 0; key < end; ++key) any[key] |= valid[key];
        }
    }
    if (std::any_of(any.begin(), any.end(), [](uint8_t byte) { return byte > 1; })) return false;
    for (int64_t key = 0; key < keys; ++key) {
        if (any[key]) seen_.push_back(static_cast<int32_t>(key));
    }
    if (mask.head == 0 && find_spans(mask.data, mask.row, rows, keys, causal)) return true;
    bytes_ = mask.data;
    byte_head_ = mask.head;
    byte_row_ = mask.row;
    all_.resize(keys);
    std::iota(all_.begin(), all_.end(), 0);
    for (int64_t row = 0; row < rows; ++row) {
        spans_[row] = {0, static_cast<int32_t>(causal_end(row, rows, keys, causal))};
    }
    return true;
}

bool KeysOfBatch::find_spans(const uint8_t* first_row, int64_t row_stride, int64_t rows, int64_t keys, bool causal) {
    std::vector<int32_t> rank(keys, 0);
    for (size_t place = 0; place < seen_.size(); ++place) rank[seen_[place]] = static_cast<int32_t>(place);
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* valid = first_row + row * row_stride;
        const int64_t end = causal_end(row, rows, keys, causal);
        if (row > 0 && !causal && (row_stride == 0 || std::memcmp(valid, valid - row_stride, keys) == 0)) {
            spans_[row] = spans_[row - 1];
            continue;
        }
        int64_t count = 0;
        for (int64_t key = 0; key < end; ++key) count += valid[key];
        if (count == 0) {
            spans_[row] = {0, 0};
            continue;
        }
        const auto first = static_cast<const uint8_t*>(std::memchr(valid, 1, end)) - valid;
        const auto last = static_cast<const uint8_t*>(memrchr(valid, 1, end)) - valid;
        if (rank[last] - rank[first] + 1 != count) return false;
        spans_[row] = {rank[first], rank[last] + 1};
    }
    return true;
}

Keys KeysOfBatch::view() const {
    const auto& packed = bytes_ == nullptr ? seen_ : all_;
    return {packed.data(), seen_.data(), spans_.data(), bytes_, byte_head_, byte_row_,
            static_cast<int32_t>(packed.size()), static_cast<int32_t>(seen_.size())};
}

}  // namespace attnpress
