// Part of attention_body.h: the streaming ways of targets that multiply BLOCK rows at once (isa_amx.cpp). Their sums lie in
// memory. The next block is multiplied before this one is read: stores of a block take a while to reach the cache, and the
// unit that multiplies works beside those of the vectors.
#pragma once

#include "attention_stream.h"

namespace attnpress {
namespace {

constexpr int SLICE = 4;  // rows of a block whose slack fits registers

template <class I> class Blocks {
  public:
    Blocks(const Job<I>& job, const Head<I>& unit, Scratch<I>& scratch)
        : job_(job), unit_(unit), sums_(scratch.blocks.template get<int32_t>(2 * SIZE)) {}

    // Products of a block of rows, given by its codes, and the tile at `base`.
    ATTN_INLINE void multiply(const typename I::Query* codes, int64_t base) {
        turn_ ^= SIZE;
        I::score_block(codes, job_.width, unit_.keys + base * job_.a.dim, job_.steps, sums_ + turn_, job_.W * sizeof(int32_t));
    }

    void no_more() { turn_ ^= SIZE; }

    // Like `multiply`, for a block whose turn comes later: by then it is done, and `begin` has nothing to do.
    ATTN_INLINE void ahead(const typename I::Query* codes, int64_t base) {
        multiply(codes, base);
        begun_ = codes;
    }
    ATTN_INLINE void begin(const typename I::Query* codes, int64_t base) {
        if (begun_ != codes) multiply(codes, base);
        begun_ = nullptr;
    }

    // f(R, first, sums) for SLICE rows at a time, or one; sums are of those rows, of the block before the last multiplied, or
    // of the last if there are no more. Pairs that are not valid are masked.
    template <class F> ATTN_INLINE void read(const Row* rows, int64_t count, const Range& range, int64_t base, F f) {
        int32_t* sums = sums_ + (turn_ ^ SIZE);
        if (!range.has_whole(base, job_.W)) {
            for (int64_t r = 0; r < count; ++r) mask<I>(rows[r], base, at<1>(sums, r)[0]);
        }
        int64_t r = 0;
        for (; r + SLICE <= count; r += SLICE) f(std::integral_constant<int, SLICE>{}, r, at<SLICE>(sums, r));
        for (; r < count; ++r) f(std::integral_constant<int, 1>{}, r, at<1>(sums, r));
    }

  private:
    static constexpr int64_t SIZE = I::BLOCK * Job<I>::W;
    template <int R> static ATTN_INLINE auto& at(int32_t* sums, int64_t r) {
        return *reinterpret_cast<typename I::I32(*)[R][I::COLS]>(sums + r * Job<I>::W);
    }

    const Job<I>& job_;
    const Head<I>& unit_;
    int32_t* sums_;
    int64_t turn_ = 0;
    const typename I::Query* begun_ = nullptr;
};

// f(base, R, first, sums) for all tiles that a block of rows meets.
template <class I, class F>
ATTN_INLINE void for_tiles(Blocks<I>& blocks, const typename I::Query* codes, const Row* rows, int64_t count, const Range& range, F f) {
    const int64_t first = range.begin / Job<I>::W * Job<I>::W;
    if (first < range.end) blocks.begin(codes, first);
    for (int64_t base = first; base < range.end; base += Job<I>::W) {
        if (base + Job<I>::W < range.end) blocks.multiply(codes, base + Job<I>::W); else blocks.no_more();
        blocks.read(rows, count, range, base, [&](auto R, int64_t r, auto& sums) __attribute__((always_inline)) { f(base, R, r, sums); });
    }
}

// One block of rows; `then` is called when its sums have been read.
template <class I, class Then>
void survive_short_block(const Job<I>& job, Blocks<I>& blocks, const typename I::Query* codes, Row* rows, int64_t count, Survivors<I>& survivors, Then then) {
    const Range range = range_of(rows, count);
    const int64_t first = range.begin / job.W * job.W;
    survive_short<I>(job, rows, count, range, survivors, [&](bool based) {
        for_tiles<I>(blocks, codes, rows, count, range, [&](int64_t base, auto R, int64_t from, auto& sums) __attribute__((always_inline)) {
            for (int r = 0; r < R.value; ++r) {
                Row& row = rows[from + r];
                if (base == first && !based) row.start = row.cut - I::highest(largest<I>(sums[r]));
                typename I::I32 over[I::COLS];
                raise<I>(sums[r], row.start, over);
                I::store_slack(row.slack + base, I::narrow(over));
            }
        });
        then();
    }, [&] {
        for (int64_t r = 0; r < count; ++r) rows[r].start = LOW;
        for_tiles<I>(blocks, codes, rows, count, range, [&](int64_t, auto R, int64_t from, auto& sums) {
            for (int r = 0; r < R.value; ++r) rows[from + r].start = most(rows[from + r].start, I::highest(largest<I>(sums[r])));
        });
        for (int64_t r = 0; r < count; ++r) rows[r].start = rows[r].cut - rows[r].start;
    });
}

// All blocks of a pass meet a tile before the next.
template <class I>
void stream_blocks(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Scratch<I>& scratch) {
    Blocks<I> blocks(job, unit, scratch);
    Range ranges[Job<I>::PASS / I::BLOCK];
    for (int64_t r = 0; r < count; r += I::BLOCK) ranges[r / I::BLOCK] = range_of(rows + r, least<int64_t>(I::BLOCK, count - r));
    int64_t last = -1, last_base = 0;
    const auto take_last = [&] {
        if (last < 0) return;
        const Range& range = ranges[last / I::BLOCK];
        blocks.read(rows + last, least<int64_t>(I::BLOCK, count - last), range, last_base, [&](auto R, int64_t r, auto& sums) __attribute__((always_inline)) {
            take<I, R.value>(rows + last + r, (last_base - range.begin / job.W * job.W) / job.W, last_base,
                             [&](auto use) __attribute__((always_inline)) {
                                 typename I::I32 over[R.value][I::COLS];
#pragma GCC unroll 8
                                 for (int i = 0; i < R.value; ++i) raise<I>(sums[i], rows[last + r + i].start, over[i]);
                                 use(over);
                             });
        });
    };
    for (int64_t base = 0; base < unit.padded; base += job.W) {
        for (int64_t r = 0; r < count; r += I::BLOCK) {
            if (!meets<I>(ranges[r / I::BLOCK], base)) continue;
            blocks.multiply(codes + r * job.width, base);
            take_last();
            last = r;
            last_base = base;
        }
    }
    if (last < 0) return;
    blocks.no_more();
    take_last();
}

}  // namespace
}  // namespace attnpress
