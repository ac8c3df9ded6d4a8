// Compressed attention in integers, once for every CPU target: a template over an ISA struct of primitives (isa_*.cpp).
//
// Keys are packed in tiles of W = COLS x LANES, values in rows; both as codes. A few query rows meet one tile of keys at a
// time, with all scores in registers. Then one of two ways, which give the same integers:
//   streaming (rule relative, mode row): scores within `cut` of the largest so far are compressed into a list of survivors
//     while they are still in registers; a larger maximum sifts the list. The list ends up exact: no second look at a score.
//   thorough (any rule and mode, and rows where most pairs survive): scores go to a buffer of a few rows; then maximum,
//     total, keep mask and codes of whole rows.
// P V takes survivors a group at a time, or a dense integer product where they are many.
//
// Everything here has internal linkage, and no std:: template is instantiated: code compiled for one instruction set must
// never be the copy that the linker picks for another.
#pragma once

#include "attention_blocks.h"
#include "attention_pack.h"
#include "attention_tail_sums.h"
#include "attention_thorough.h"

namespace attnpress {
namespace {

template <class I> void start_row(const Job<I>& job, const Head<I>& unit, int64_t index, Row& row, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const Keys& mask = unit.mask;
    row.scale = job.v_scale + unit.kv_head * job.width;
    row.output = a.output + ((unit.batch * a.q_rows + index) * a.q_heads + unit.head) * a.dim;
    row.place = (unit.batch * a.q_heads + unit.head) * a.q_rows + index;
    row.begin = mask.spans[index].begin;
    row.end = most(row.begin, mask.spans[index].end);
    row.bytes = mask.bytes == nullptr ? nullptr : mask.bytes + unit.head * mask.byte_head + index * mask.byte_row;
    const float alpha = (unit.q_scales[index] * scale_of(a.k_scale, unit.kv_head)) * a.scaling;
    row.alpha = alpha;
    row.rate = (alpha * LOG2_E) * static_cast<float>(STEPS_PER_OCTAVE);
    if (scratch.cut_of != unit.head || scratch.cut_alpha != alpha) {
        const float cutoff = a.rule == Rule::relative && a.cutoff != nullptr ? a.cutoff[unit.head] : INFINITY;
        scratch.cut = find_cut(cutoff, alpha, row.rate, job.last_exponent);
        scratch.cut_of = unit.head;
        scratch.cut_alpha = alpha;
    }
    row.cut = scratch.cut;
    row.max = LOW;
    if (a.trace == nullptr) return;
    row.query_sum = 0;
    for (int64_t d = 0; d < a.dim; ++d) row.query_sum += unit.queries[index * job.width + d];
}

template <class I>
void survive_long(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Scratch<I>& scratch, Survivors<I>& survivors) {
    const int64_t room = unit.padded + 64;
    auto* lists = scratch.keys.template get<uint16_t>(job.PASS * room);
    auto* slack = scratch.slack.template get<uint16_t>(job.PASS * room);
    for (int64_t r = 0; r < count; ++r) {
        rows[r].keys = lists + r * room;
        rows[r].slack = slack + r * room;
        rows[r].count = rows[r].floor = rows[r].start = 0;
        I::store_short(rows[r].top, I::set1_short(0));
        ask_output(rows[r], job.a.dim);
    }
    if constexpr (I::BLOCK > 1) {
        stream_blocks(job, unit, codes, rows, count, scratch);
    } else {
        Range ranges[Job<I>::PASS];
        in_groups<I>(count, [&](auto R, int64_t r) { ranges[r] = range_of(rows + r, R.value); });
        for (int64_t base = 0; base < unit.padded; base += job.W) {
            in_groups<I>(count, [&](auto R, int64_t r) {
                stream<I, R.value>(job, unit, codes + r * job.width, rows + r, ranges[r], base);
            });
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        Row& row = rows[r];
        const int32_t top = row.begin < row.end ? I::highest_short(I::load_short_top(row.top)) : 0;
        row.max = row.begin < row.end ? top - row.start : LOW;
        survivors.add(row, [&](uint16_t* keys, uint16_t* to) {
            // Without a valid key the list holds pairs that are not valid.
            return row.max == LOW ? 0 : I::sift(row.keys, row.slack, row.count, top - row.cut, keys, to);
        });
    }
}

template <class I>
void survive_short_rows(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Scratch<I>& scratch, Survivors<I>& survivors) {
    auto* slack = scratch.slack.template get<uint16_t>(I::ROWS * unit.padded);
    for (int64_t r = 0; r < count; ++r) rows[r].slack = slack + r % I::ROWS * unit.padded;
    if constexpr (I::BLOCK > 1) {
        Blocks<I> blocks(job, unit, scratch);
        for (int64_t r = 0; r < count; r += I::BLOCK) {
            const int64_t next = r + I::BLOCK;
            survive_short_block(job, blocks, codes + r * job.width, rows + r, least<int64_t>(I::BLOCK, count - r), survivors, [&] {
                if (next >= count) return;
                const Range range = range_of(rows + next, least<int64_t>(I::BLOCK, count - next));
                if (range.begin < range.end) blocks.ahead(codes + next * job.width, range.begin / job.W * job.W);
            });
        }
    } else {
        in_groups<I>(count, [&](auto R, int64_t r) {
            const Range range = range_of(rows + r, R.value);
            const auto* of_group = codes + r * job.width;
            survive_short<I>(job, rows + r, R.value, range, survivors,
                             [&](bool based) { sweep<I, R.value>(job, unit, of_group, rows + r, range, based); },
                             [&] { find_bases<I, R.value>(job, unit, of_group, rows + r, range); });
        });
    }
}

// All lists first, then all codes, then all sums of values: what one row waits for, another fills.
template <class I>
void attend_streaming(const Job<I>& job, const Head<I>& unit, const typename I::Query* codes, Row* rows, int64_t count, Scratch<I>& scratch) {
    Survivors<I> survivors(job, unit, scratch);
    if (unit.padded <= SHORT) {
        survive_short_rows(job, unit, codes, rows, count, scratch, survivors);
    } else {
        survive_long(job, unit, codes, rows, count, scratch, survivors);
    }
    survivors.code(job, rows, count);
    if (job.tailed) emit_tails(job, unit, codes, rows, count, survivors, scratch);
    auto* weighted = scratch.weighted.template get<int32_t>(I::ROWS * job.width);
    int64_t found = 0, pairs = 0;
    for (int64_t r = 0; r < count; ++r) {
        if (!job.tailed) survivors.emit_row(job, unit, rows[r], weighted);
        found += rows[r].count;
        pairs += rows[r].end - rows[r].begin;
    }
    scratch.many = found * MANY > pairs;
}

// At most PASS query rows of one head, from `first`.
template <class I> void attend(const Job<I>& job, const Head<I>& unit, int64_t first, Scratch<I>& scratch) {
    const Attention& a = job.a;
    const int64_t count = least<int64_t>(job.PASS, a.q_rows - first);
    const auto* codes = unit.queries + first * job.width;
    Row rows[Job<I>::PASS];
    int32_t widest = 0;
    for (int64_t r = 0; r < count; ++r) {
        start_row(job, unit, first + r, rows[r], scratch);
        widest = most(widest, rows[r].cut);
    }
    const bool streamable = a.rule == Rule::relative && a.mode == ProbMode::row && unit.count <= CHUNK &&
                            (!job.tailed || see_all(unit, rows, count));
    if (streamable && widest <= MAX_CUT && !scratch.many) return attend_streaming(job, unit, codes, rows, count, scratch);
    in_groups<I>(count, [&](auto R, int64_t r) { consider<I, R.value>(job, unit, codes + r * job.width, rows + r, scratch); });
}

template <class I> Head<I> head_of(const Job<I>& job, const Batch<I>& batch, int64_t head) {
    const int64_t kv = head / job.group, tile_sums = job.tailed ? batch.padded / job.W * job.width : 0;
    return {batch.queries + head * job.a.q_rows * job.width, batch.q_scales + head * job.a.q_rows,
            batch.keys + kv * batch.padded * job.a.dim, batch.values + kv * batch.padded * job.width,
            batch.key_sums + kv * tile_sums, batch.value_sums + kv * tile_sums, batch.seen + kv * batch.padded * job.seen_width,
            *batch.mask, batch.index, head, kv, batch.count, batch.padded};
}

// The three steps of one batch element; `share(count, f)` runs f(begin, end, scratch) over [0, count).
template <class I, class Share> void attend_batch(const Job<I>& job, int64_t index, Batch<I>& batch, Share share) {
    const Attention& a = job.a;
    prepare(job, index, batch);
    if (a.smooth_key) {
        share(a.kv_heads, [&](int64_t begin, int64_t end, Scratch<I>& scratch) {
            for (int64_t head = begin; head < end; ++head) find_mean(job, batch, head, scratch);
        });
    }
    const int64_t tiles = batch.padded / job.W, passes = (a.q_rows + job.PASS - 1) / job.PASS;
    share(tiles + passes, [&](int64_t begin, int64_t end, Scratch<I>& scratch) {
        for (int64_t work = begin; work < end; ++work) {
            if (work < tiles) {
                const Tile<I> tile(batch, work);
                pack_keys(job, batch, tile, scratch);
                pack_values(job, batch, tile, scratch);
                continue;
            }
            const int64_t first = (work - tiles) * job.PASS;
            pack_queries(job, batch, first, least(first + job.PASS, a.q_rows), scratch);
        }
    });
    share(a.q_heads * passes, [&](int64_t begin, int64_t end, Scratch<I>& scratch) {
        scratch.cut_of = scratch.panel_of = scratch.sums.of = -1;
        scratch.many = false;
        for (int64_t work = begin; work < end; ++work) {
            attend(job, head_of(job, batch, work / passes), work % passes * job.PASS, scratch);
        }
    });
}

template <class I> Job<I>::Job(const Attention& args)
    : a(args), steps(args.dim / I::GROUP), width(round_up(args.dim, W)), group(args.q_heads / args.kv_heads), last_exponent(args.mode == ProbMode::row ? last_coded_exponent(args.p_max) : T_MAX - 1),
      tailed(args.tail.kind != TailKind::none), directed(args.tail.query != nullptr), seen_width(directed ? round_up(args.tail.rank, SEEN_STEP) : 0) {
    if (directed) make_maps(*this, map_room, query_map, key_map);
    v_scale = room.template get<float>(2 * a.kv_heads * width + a.kv_heads + a.q_heads);
    v_inverse = v_scale + a.kv_heads * width;
    k_inverse = v_inverse + a.kv_heads * width;
    q_inverse = a.q_scale.data == nullptr ? nullptr : k_inverse + a.kv_heads;
    for (int64_t i = 0; i < a.kv_heads * width; ++i) {
        v_scale[i] = scale_of(a.v_scale, i / width, least(i % width, a.dim - 1));
        v_inverse[i] = 1.0f / v_scale[i];
    }
    for (int64_t head = 0; head < a.kv_heads; ++head) k_inverse[head] = 1.0f / scale_of(a.k_scale, head);
    for (int64_t head = 0; q_inverse != nullptr && head < a.q_heads; ++head) q_inverse[head] = 1.0f / scale_of(a.q_scale, head);
}

template <class F> void parallel(const Attention& a, int64_t count, F f) {
    a.parallel(count, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &f);
}

// Memory that a thread keeps from call to call: asked of the system anew each time, its pages cost more than a short call.
template <class T> T& kept() {
    static thread_local T memory;
    return memory;
}

// Each thread takes whole batch elements where they come out even; else all threads share each one.
template <class I> void run(const Attention& a) {
    const Job<I> job(a);
    if (a.batch % a.threads == 0 || a.batch >= 4 * a.threads) {
        parallel(a, a.batch, [&](int64_t begin, int64_t end) {
            auto& batch = kept<Batch<I>>();
            auto& scratch = kept<Scratch<I>>();
            const typename I::Session session(a.dim);
            for (int64_t index = begin; index < end; ++index) {
                attend_batch(job, index, batch, [&](int64_t count, auto f) { f(0, count, scratch); });
            }
        });
        return;
    }
    auto& batch = kept<Batch<I>>();
    for (int64_t index = 0; index < a.batch; ++index) {
        attend_batch(job, index, batch, [&](int64_t count, auto f) {
            parallel(a, count, [&](int64_t begin, int64_t end) {
                const typename I::Session session(a.dim);
                f(begin, end, kept<Scratch<I>>());
            });
        });
    }
}

}  // namespace
}  // namespace attnpress
