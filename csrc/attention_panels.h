// Part of attention_body.h: rows of raised codes times a matrix of wider integers, split into signed digits that the products of
// values take. What directions see of Q meets what they see of K and V so.
#pragma once

#include "attention_scores.h"

namespace attnpress {
namespace {

constexpr int32_t RAISED = 128;  // makes codes of Q and K, and what directions see of them, codes of P

template <class I> constexpr int DIGITS = 32 / I::DIGIT_BITS;  // planes that 32 bits take at most

// The least number of planes whose signed digits reach `largest`.
template <class I> int planes_for(int64_t largest) {
    const int64_t half = (int64_t{1} << (I::DIGIT_BITS - 1)) - 1;
    int planes = 1;
    for (int64_t reach = half; reach < largest; reach = (reach << I::DIGIT_BITS) + half) ++planes;
    return planes;
}

template <class I> ATTN_INLINE const typename I::Value* panel_of(const Panels<I>& panels, int64_t width, int plane, int64_t column) {
    constexpr int64_t W = I::COLS * I::LANES, GROUP = I::VALUE_GROUP;
    return panels.digits + ((plane * width + column / W * W) * panels.steps + column % W) * GROUP;
}

// From entries [rows][width], no larger than `largest`; planes is 0 where they are too large for digits of 32 bits.
template <class I> void fill_panels(Panels<I>& panels, const int32_t* entries, int64_t rows, int64_t width, int64_t largest, Buffer& digits, Buffer& raised) {
    constexpr int64_t W = I::COLS * I::LANES, GROUP = I::VALUE_GROUP;
    constexpr uint32_t HALF = uint32_t{1} << (I::DIGIT_BITS - 1), SIGNS = HALF == 128 ? 0x80808080u : 0x80008000u;
    panels.steps = round_up(rows, GROUP) / GROUP;
    panels.planes = planes_for<I>(largest);
    if (panels.planes > DIGITS<I>) panels.planes = 0;
    panels.digits = digits.get<typename I::Value>(panels.planes * width * panels.steps * GROUP);
    panels.raised = raised.get<int32_t>(width);
    const auto signs = I::set1(static_cast<int32_t>(SIGNS)), low = I::set1(static_cast<int32_t>(2 * HALF - 1));
    for (int64_t d = 0; d < width; d += I::LANES) {
        auto sum = I::set1(0);
        for (int64_t step = 0; step < panels.steps; ++step) {
            typename I::I32 biased[GROUP];
            for (int64_t g = 0; g < GROUP; ++g) {
                const int64_t row = step * GROUP + g;
                biased[g] = row < rows ? I::load(entries + row * width + d) : I::set1(0);
                sum = I::add(sum, biased[g]);
                biased[g] = I::add(biased[g], signs);
            }
            for (int p = 0; p < panels.planes; ++p) {
                auto* to = const_cast<typename I::Value*>(panel_of(panels, width, p, d)) + step * W * GROUP;
                auto packed = I::set1(0);
                for (int64_t g = 0; g < GROUP; ++g) {
                    const auto digit = I::band(I::srlv(biased[g], I::set1(I::DIGIT_BITS * p)), low);
                    packed = I::add(packed, I::sllv(digit, I::set1(static_cast<int32_t>(I::DIGIT_BITS * g))));
                }
                if constexpr (I::LANES == 1) packed = I::sub(packed, I::set1(static_cast<int32_t>(HALF)));
                else packed = I::bxor(packed, signs);
                I::store_codes(to, packed);
            }
        }
        I::store(panels.raised + d, I::mullo(sum, I::set1(RAISED)));
    }
}

// LANES columns, from d, of R rows: sums of digits of P planes.
template <class I, int P, int R>
ATTN_INLINE void multiply_panels(const Panels<I>& panels, const typename I::Prob* rows, int64_t stride, int64_t width, int64_t d, typename I::I32 (&acc)[R][P]) {
    constexpr int64_t LINE = I::COLS * I::LANES * I::VALUE_GROUP;
    const typename I::Value* from[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) from[p] = panel_of(panels, width, p, d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) acc[r][p] = I::set1(0);
    }
    for (int64_t step = 0; step < panels.steps; ++step) {
        typename I::I32 columns[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) columns[p] = I::load_codes(from[p] + step * LINE);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const auto group = I::broadcast(rows + r * stride + step * I::VALUE_GROUP);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) acc[r][p] = I::dot_values(acc[r][p], group, columns[p]);
        }
    }
}

// to[count][width] = rows times the matrix, modulo 2^32.
template <class I, int P, int R = (P > 2 ? 4 : 8)>
void apply_planes(const Panels<I>& panels, const typename I::Prob* rows, int64_t stride, int64_t count, int64_t width, int32_t* to, int64_t first = 0) {
    for (; first + R <= count; first += R) {
        for (int64_t d = 0; d < width; d += I::LANES) {
            typename I::I32 acc[R][P];
            multiply_panels<I, P, R>(panels, rows + first * stride, stride, width, d, acc);
            const auto raised = I::load(panels.raised + d);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                auto whole = I::sub(acc[r][0], raised);
#pragma GCC unroll 4
                for (int p = 1; p < P; ++p) whole = I::add(whole, I::sllv(acc[r][p], I::set1(I::DIGIT_BITS * p)));
                I::store(to + (first + r) * width + d, whole);
            }
        }
    }
    if constexpr (R > 1) apply_planes<I, P, R / 2>(panels, rows, stride, count, width, to, first);
}

// The same with products of BLOCK rows; `rows` and `to` have room for whole blocks.
template <class I, int P> void apply_blocks(const Panels<I>& panels, const typename I::Prob* rows, int64_t stride,
                                            int64_t count, int64_t width, int32_t* to, Scratch<I>& scratch) {
    constexpr int64_t W = I::COLS * I::LANES;
    auto* sums = scratch.blocks.template get<int32_t>(I::BLOCK * W * P);
    for (int64_t first = 0; first < count; first += I::BLOCK) {
        for (int64_t d = 0; d < width; d += W) {
            for (int p = 0; p < P; ++p) {
                I::value_block(rows + first * stride, stride * sizeof(*rows), panel_of(panels, width, p, d), panels.steps, sums + p * I::BLOCK * W, W * sizeof(*sums));
            }
            for (int64_t r = 0; r < least<int64_t>(I::BLOCK, count - first); ++r) {
#pragma GCC unroll 4
                for (int64_t c = 0; c < W; c += I::LANES) {
                    auto whole = I::sub(I::load(sums + r * W + c), I::load(panels.raised + d + c));
#pragma GCC unroll 4
                    for (int p = 1; p < P; ++p)
                        whole = I::add(whole,
                                       I::sllv(I::load(sums + (p * I::BLOCK + r) * W + c), I::set1(I::DIGIT_BITS * p)));
                    I::store(to + (first + r) * width + d + c, whole);
                }
            }
        }
    }
}

template <class I> void apply_panels(const Job<I>& job, const Panels<I>& panels, const typename I::Prob* rows, int64_t stride, int64_t count, int32_t* to, Scratch<I>& scratch) {
    const auto apply = [&](auto P) {
        if constexpr (I::BLOCK > 1) {
            if (panels.steps == job.steps)
                return apply_blocks<I, P.value>(panels, rows, stride, count, job.width, to, scratch);
        }
        apply_planes<I, P.value>(panels, rows, stride, count, job.width, to);
    };
    switch (panels.planes) {
        case 1: return apply(std::integral_constant<int, 1>{});
        case 2: return apply(std::integral_constant<int, 2>{});
        case 3:
            if constexpr (DIGITS<I> > 2) return apply(std::integral_constant<int, 3>{});
            return;
        case 4:
            if constexpr (DIGITS<I> > 2) return apply(std::integral_constant<int, 4>{});
            return;
    }
}

}  // namespace
}  // namespace attnpress
