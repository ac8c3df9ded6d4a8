// Part of attention_body.h: the two streaming ways (rule relative, mode row).
#pragma once

#include "attention_survivors.h"

namespace attnpress {
namespace {

// Short: all slack of a few rows fits the first cache. Survivors are listed once the maximum is known.
//
// A row's base is its maximum over the first tile, less the cut; slack is what a score has above the base. Where 16 bits
// cannot hold it (rare), exact bases are found, in a sweep of their own.
template <class I, int R>
ATTN_INLINE void sweep(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, const Range& range, bool based) {
    const int64_t first = range.begin / job.W * job.W;
    for (int64_t base = first; base < range.end; base += job.W) {
        typename I::I32 acc[R][I::COLS];
        scores<I, R>(job, unit, codes, rows, range, base, acc);
        if (base == first && !based) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) rows[r].start = rows[r].cut - I::highest(largest<I>(acc[r]));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            raise<I>(acc[r], rows[r].start, acc[r]);
            I::store_slack(rows[r].slack + base, I::narrow(acc[r]));
        }
    }
}

template <class I, int R>
__attribute__((noinline)) void find_bases(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, const Range& range) {
    typename I::I32 top[R];
    for (int r = 0; r < R; ++r) top[r] = I::set1(LOW);
    for (int64_t base = range.begin / job.W * job.W; base < range.end; base += job.W) {
        typename I::I32 acc[R][I::COLS];
        scores<I, R>(job, unit, codes, rows, range, base, acc);
        for (int r = 0; r < R; ++r) top[r] = I::max(top[r], largest<I>(acc[r]));
    }
    for (int r = 0; r < R; ++r) rows[r].start = rows[r].cut - I::highest(top[r]);
}

template <class I> ATTN_INLINE int32_t highest_slack(const Row& row, int64_t begin, int64_t end) {
    typename I::Short top = I::set1_short(0);
    for (int64_t base = begin; base < end; base += Job<I>::W) top = I::max_short(top, I::max_slack(I::load_slack(row.slack + base)));
    return I::highest_short(top);
}

// `swept(based)` fills the slack of at most ROWS rows, and their bases unless it is told that they have been found.
template <class I, class Sweep, class Find>
ATTN_INLINE void survive_short(const Job<I>& job, Row* rows, int64_t count, const Range& range, Survivors<I>& survivors, Sweep swept, Find find) {
    const int64_t begin = range.begin / Job<I>::W * Job<I>::W, end = range.end;
    int32_t top[I::ROWS];
    for (bool based = false;; based = true) {
        swept(based);
        bool fits = true;
        for (int64_t r = 0; r < count; ++r) {
            top[r] = highest_slack<I>(rows[r], begin, end);
            fits &= top[r] <= MAX_CUT;
        }
        if (__builtin_expect(fits, 1)) break;
        find();
    }
    for (int64_t r = 0; r < count; ++r) {
        Row& row = rows[r];
        ask_output(row, job.a.dim);
        row.max = row.begin < row.end ? top[r] - row.start : LOW;
        const int64_t last = row.max == LOW ? begin : end;
        const int32_t floor = top[r] - row.cut;
        const uint16_t* slack = row.slack;
        survivors.add(row, [&](uint16_t* keys, uint16_t* to) {
            int listed = 0;
            for (int64_t base = begin; base < last; base += Job<I>::W) {
                listed += I::list(I::lower(I::load_slack(slack + base), floor), 0, static_cast<int32_t>(base), keys + listed, to + listed);
            }
            return listed;
        });
    }
}

// Rare: a score so far above its row's base that 16 bits cannot hold the difference. The base moves up, and with it the
// list. Where scores are in registers they are computed again, so that the usual way need not keep them.
template <class I, int R, class With> __attribute__((noinline)) void rebase(Row* rows, With with_sums) {
    with_sums([&](const typename I::I32(&acc)[R][I::COLS]) {
        for (int r = 0; r < R; ++r) {
            const int32_t drop = I::highest(largest<I>(acc[r])) - rows[r].cut;
            if (drop + rows[r].cut <= MAX_CUT) continue;
            rows[r].count = drop > MAX_CUT ? 0 : I::sift(rows[r].keys, rows[r].slack, rows[r].count, drop, rows[r].keys, rows[r].slack);
            rows[r].start -= drop;
            rows[r].floor = 0;
            I::store_short(rows[r].top, I::set1_short(0));  // this tile holds the row's maximum, and is about to be taken
        }
    });
}

// One tile of keys meets R rows; `with_sums(f)` calls f with sums that begin at the rows' starts, 0 at first. A row's base is
// its maximum over the first tile (turn 0), less the cut, and its start the negative of that, so that sums are slack: what
// a score has above the base. What has at least the floor is listed. The floor rises now and then with the largest slack so
// far, on a fixed schedule, since a branch for each new maximum would be mispredicted; a last sift makes the list exact.
template <class I, int R, class With> ATTN_INLINE void take(Row* rows, int64_t turn, int64_t base, With with_sums) {
    typename I::Slack slack[R];
    for (;;) {
        typename I::Short peak = I::set1_short(0);
        with_sums([&](typename I::I32(&acc)[R][I::COLS]) __attribute__((always_inline)) {
            if (turn == 0) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    rows[r].start = rows[r].cut - I::highest(largest<I>(acc[r]));
                    raise<I>(acc[r], rows[r].start, acc[r]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                slack[r] = I::narrow(acc[r]);
                const typename I::Short most_of = I::max_slack(slack[r]);
                peak = I::max_short(peak, most_of);
                I::store_short(rows[r].top, I::max_short(I::load_short_top(rows[r].top), most_of));
            }
        });
        if (__builtin_expect(!I::any_above(peak, MAX_CUT), 1)) break;
        rebase<I, R>(rows, with_sums);
    }
    if (turn > 0 && (turn & (turn - 1)) == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) rows[r].floor = I::highest_short(I::load_short_top(rows[r].top)) - rows[r].cut;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        Row& row = rows[r];
        row.count += I::list(slack[r], row.floor, static_cast<int32_t>(base), row.keys + row.count, row.slack + row.count);
    }
}

// Whether a tile holds keys that some row of the range may attend to.
template <class I> ATTN_INLINE bool meets(const Range& range, int64_t base) {
    return base < range.end && base + Job<I>::W > range.begin;
}

template <class I, int R>
void stream(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, const Range& range, int64_t base) {
    if (!meets<I>(range, base)) return;
    take<I, R>(rows, (base - range.begin / job.W * job.W) / job.W, base, [&](auto use) __attribute__((always_inline)) {
        typename I::I32 acc[R][I::COLS];
        slacks<I, R>(job, unit, codes, rows, range, base, acc);
        use(acc);
    });
}

}  // namespace
}  // namespace attnpress
