// Target "avx512vnni": AVX-512 F, BW, DQ, VL, VNNI and VBMI2. Ice Lake, Zen 4 and later.
//
// vpdpbusd multiplies unsigned by signed bytes, four products a lane, two instructions a cycle (ports 0 and 5 of Intel
// servers). Keys are the unsigned side, as code + 128: that adds 128 * sum(q) to all scores of a row alike, and only
// differences within a row matter. 6 rows x 64 keys take 24 of the 32 registers.
#pragma once

#include <immintrin.h>

#include "attention_body.h"

namespace attnpress {
namespace {

struct Avx512Vnni : VectorProducts {
    static constexpr int LANES = 16, GROUP = 4, VALUE_GROUP = 4, ROWS = 6, COLS = 4, KEY_OFFSET = 128;
    using I32 = __m512i;
    using F32 = __m512;
    using Key = uint8_t;
    using Query = int8_t;
    using Prob = uint8_t;
    using Value = int8_t;
    using Left = int8_t;
    using Digit = uint8_t;
    static constexpr int DIGIT_GROUP = 4, DIGIT_BITS = 8, SUMS = 24;
    static constexpr bool SIGNED_DIGITS = false;
    using Seen = uint8_t;
    using SeenQuery = int8_t;
    static constexpr int SEEN_OFFSET = 128, SCORE_PLANES = 2, SCORE_OFFSET = 1 << 15;
    using Short = __m512i;
    struct Slack {
        __m512i low, high;
    };

    static ATTN_INLINE I32 set1(int32_t x) { return _mm512_set1_epi32(x); }
    static ATTN_INLINE F32 set1f(float x) { return _mm512_set1_ps(x); }
    static ATTN_INLINE I32 iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static ATTN_INLINE I32 load(const int32_t* p) { return _mm512_loadu_si512(p); }
    static ATTN_INLINE void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x); }
    static ATTN_INLINE F32 loadf(const float* p) { return _mm512_loadu_ps(p); }
    static ATTN_INLINE void storef(float* p, F32 x) { _mm512_storeu_ps(p, x); }
    static ATTN_INLINE __m256i half_at(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static ATTN_INLINE F32 load_halves(const uint16_t* p) { return _mm512_cvtph_ps(half_at(p)); }
    static ATTN_INLINE F32 load_bfloats(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_short(p), 16)); }
    static ATTN_INLINE I32 load_short(const uint16_t* p) { return _mm512_cvtepi16_epi32(half_at(p)); }
    static ATTN_INLINE I32 load_codes(const void* p) { return _mm512_loadu_si512(p); }
    static ATTN_INLINE void store_codes(void* p, I32 x) { _mm512_storeu_si512(p, x); }
    static ATTN_INLINE void store_code(void* p, I32 x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
    static ATTN_INLINE I32 broadcast(const void* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }

    static ATTN_INLINE I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
    static ATTN_INLINE I32 sub(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
    static ATTN_INLINE I32 band(I32 a, I32 b) { return _mm512_and_si512(a, b); }
    static ATTN_INLINE I32 max(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
    template <int N> static ATTN_INLINE I32 shr(I32 a) { return _mm512_srli_epi32(a, N); }
    template <int N> static ATTN_INLINE I32 shl(I32 a) { return _mm512_slli_epi32(a, N); }
    static ATTN_INLINE I32 sllv(I32 a, I32 n) { return _mm512_sllv_epi32(a, n); }
    static ATTN_INLINE I32 srlv(I32 a, I32 n) { return _mm512_srlv_epi32(a, n); }
    static ATTN_INLINE I32 mulhi(I32 a, I32 b) { return _mm512_mulhi_epu16(a, b); }
    static ATTN_INLINE I32 select_le(I32 a, I32 b, I32 x) { return _mm512_maskz_mov_epi32(_mm512_cmple_epi32_mask(a, b), x); }
    static ATTN_INLINE I32 where(uint64_t bits, I32 x, int32_t other) {
        return _mm512_mask_mov_epi32(set1(other), static_cast<__mmask16>(bits), x);
    }
    static ATTN_INLINE int32_t total(I32 a) { return _mm512_reduce_add_epi32(a); }
    static ATTN_INLINE int32_t first(I32 a) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(a)); }
    static ATTN_INLINE int32_t highest(I32 a) { return _mm512_reduce_max_epi32(a); }
    static ATTN_INLINE float highest(F32 a) { return _mm512_reduce_max_ps(a); }

    static ATTN_INLINE F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
    static ATTN_INLINE I32 round(F32 a) { return _mm512_cvtps_epi32(a); }
    static ATTN_INLINE F32 nearest(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static ATTN_INLINE F32 clamp(F32 a, F32 low, F32 high) {
        const __mmask16 ordered = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
        return _mm512_maskz_min_ps(ordered, _mm512_max_ps(a, low), high);
    }
    // clamp(round(a), -limit, limit), 0 for NaN.
    static ATTN_INLINE I32 round_within(F32 a, F32 limit) {
        constexpr int LEAST_MAGNITUDE_SIGN_OF_FIRST = 2;
        return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), _mm512_range_ps(a, limit, LEAST_MAGNITUDE_SIGN_OF_FIRST));
    }
    static ATTN_INLINE F32 mulf(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
    static ATTN_INLINE F32 addf(F32 a, F32 b) { return _mm512_add_ps(a, b); }
    static ATTN_INLINE F32 quotient(F32 a, F32 b) { return _mm512_div_ps(a, b); }
    static ATTN_INLINE F32 as_float(I32 a) { return _mm512_castsi512_ps(a); }
    static ATTN_INLINE I32 mullo(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
    static ATTN_INLINE I32 min(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
    template <int N> static ATTN_INLINE I32 sra(I32 a) { return _mm512_srai_epi32(a, N); }
    static ATTN_INLINE I32 load_seen(const SeenQuery* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static ATTN_INLINE I32 bxor(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
    static ATTN_INLINE bool passes_short(I32 a) { return _mm512_test_epi32_mask(a, set1(static_cast<int32_t>(0xffff0000))) != 0; }
    // Lane r: the sum of the lanes of row r.
    static ATTN_INLINE I32 totals(const I32 (&rows)[LANES]) {
        I32 quarter[4], half[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const I32 &a = rows[4 * i], &b = rows[4 * i + 1], &c = rows[4 * i + 2], &d = rows[4 * i + 3];
            const I32 ab = add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)), cd = add(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            quarter[i] = add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const I32 &a = quarter[2 * i], &b = quarter[2 * i + 1];
            half[i] = add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
        }
        return add(_mm512_shuffle_i32x4(half[0], half[1], 0x88), _mm512_shuffle_i32x4(half[0], half[1], 0xdd));
    }
    // Sum, in lanes, of numbers below 2^15.
    static ATTN_INLINE I32 sum_shorts(const uint16_t* from, int count) {
        I32 sum = set1(0);
        for (int i = 0; i < count; i += 32) {
            const __mmask32 inside = count - i >= 32 ? ~uint32_t{0} : (uint32_t{1} << (count - i)) - 1;
            sum = add(sum, _mm512_madd_epi16(_mm512_maskz_loadu_epi16(inside, from + i), set1_short(1)));
        }
        return sum;
    }
    static ATTN_INLINE F32 subf(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
    static ATTN_INLINE F32 minf(F32 a, F32 b) { return _mm512_min_ps(a, b); }
    static ATTN_INLINE F32 maxf(F32 a, F32 b) { return _mm512_max_ps(a, b); }
    // x / by from inverse = 1 / by: one correction rounds like a division (Markstein), at a tenth of the cycles;
    // infinities stay as they are.
    static ATTN_INLINE F32 divide(F32 x, F32 by, F32 inverse) {
        const F32 first = _mm512_mul_ps(x, inverse), rest = _mm512_fnmadd_ps(first, by, x);
        return _mm512_mask_fmadd_ps(first, _mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), set1f(1.0f), _mm512_mul_ps(rest, inverse));
    }
    static ATTN_INLINE F32 finite_magnitude(F32 a) {
        const F32 magnitude = _mm512_abs_ps(a);
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(magnitude, set1f(INFINITY), _CMP_LT_OQ), magnitude);
    }

    // g++ 12 spills accumulators around the intrinsic; an opaque instruction with a read-write register stays in place.
    static ATTN_INLINE I32 dot(I32 acc, I32 bytes, I32 signed_bytes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(bytes), "v"(signed_bytes));
        return acc;
    }
    static ATTN_INLINE I32 dot_scores(I32 acc, I32 key, I32 query) { return dot(acc, key, query); }
    static ATTN_INLINE I32 dot_values(I32 acc, I32 code, I32 value) { return dot(acc, code, value); }
    static ATTN_INLINE I32 dot_digits(I32 acc, I32 digits, I32 codes) { return dot(acc, digits, codes); }
    // query . seen[key] of LANES keys, `width` codes each, a multiple of 8.
    static ATTN_INLINE I32 see(const SeenQuery* query, const Seen* seen, int64_t width, const uint16_t* keys) {
        const auto both = [&](int64_t known) __attribute__((always_inline)) {
            return _mm512_inserti64x4(_mm512_castsi256_si512(see_eight(query, seen, known, keys)), see_eight(query, seen, known, keys + 8), 1);
        };
        return width == 8 ? both(8) : both(width);
    }
    // `rank` columns of `count` keys as rows, `line` apart, of codes of P; count is a multiple of 16.
    static void turn(const Seen* seen, int64_t width, int64_t rank, int64_t count, Prob* to, int64_t line) {
        for (int64_t first = 0; first < rank; first += 8) {
            for (int64_t key = 0; key < count; key += 16) {
                __m128i a[16], b[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) a[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(seen + (key + i) * width + first));
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) b[i] = _mm_unpacklo_epi8(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    a[2 * i] = _mm_unpacklo_epi16(b[2 * i], b[2 * i + 1]);
                    a[2 * i + 1] = _mm_unpackhi_epi16(b[2 * i], b[2 * i + 1]);
                }
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        b[4 * i + 2 * half] = _mm_unpacklo_epi32(a[4 * i + half], a[4 * i + 2 + half]);
                        b[4 * i + 2 * half + 1] = _mm_unpackhi_epi32(a[4 * i + half], a[4 * i + 2 + half]);
                    }
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const auto put = [&](int64_t row, __m128i x) {
                        if (first + row < rank) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (first + row) * line + key), x);
                    };
                    put(2 * i, _mm_unpacklo_epi64(b[i], b[4 + i]));
                    put(2 * i + 1, _mm_unpackhi_epi64(b[i], b[4 + i]));
                }
            }
        }
    }
    static ATTN_INLINE __m256i see_eight(const SeenQuery* query, const Seen* seen, int64_t width, const uint16_t* keys) {
        __m256i low = _mm256_setzero_si256(), high = low;  // keys 0, 1, 4, 5 and 2, 3, 6, 7, two sums each
        for (int64_t i = 0; i < width; i += 8) {
            const auto two = [&](int first) {
                const auto at = [&](int key) { return reinterpret_cast<const char*>(seen + keys[key] * width + i); };
                return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at(first)))),
                                                     reinterpret_cast<const __m64*>(at(first + 1))));
            };
            int64_t eight;
            std::memcpy(&eight, query + i, 8);
            const __m256i group = _mm256_set1_epi64x(eight);
            low = _mm256_dpbusd_epi32(low, _mm256_inserti128_si256(_mm256_castsi128_si256(two(0)), two(4), 1), group);
            high = _mm256_dpbusd_epi32(high, _mm256_inserti128_si256(_mm256_castsi128_si256(two(2)), two(6), 1), group);
        }
        return _mm256_hadd_epi32(low, high);
    }
    static ATTN_INLINE I32 at_most_one(I32 codes) { return _mm512_min_epu8(codes, ones()); }
    // The code at one place of each group, as it is packed.
    static ATTN_INLINE I32 member(I32 group, int place) { return band(_mm512_srli_epi32(group, 8 * place), set1(255)); }

    static ATTN_INLINE I32 ones() { return _mm512_set1_epi8(1); }

    // Lane L of the packed vector holds codes 4 L to 4 L + 3 of each of the four: the order that interleave undoes.
    static ATTN_INLINE I32 packed(const I32 (&codes)[COLS]) {
        return _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
    }
    static ATTN_INLINE void store_arranged(Value* to, const I32 (&codes)[COLS]) { store_codes(to, packed(codes)); }
    static ATTN_INLINE void store_ordered(Query* to, const I32 (&codes)[COLS]) {
        const I32 order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        store_codes(to, _mm512_permutexvar_epi32(order, packed(codes)));
    }
    static ATTN_INLINE void interleave(const Value* const (&from)[4], int64_t offset, I32 (&columns)[COLS]) {
        const I32 a = load_codes(from[0] + offset), b = load_codes(from[1] + offset);
        const I32 c = load_codes(from[2] + offset), d = load_codes(from[3] + offset);
        const I32 ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
        const I32 ab_high = _mm512_unpackhi_epi8(a, b), cd_high = _mm512_unpackhi_epi8(c, d);
        columns[0] = _mm512_unpacklo_epi16(ab, cd);
        columns[1] = _mm512_unpackhi_epi16(ab, cd);
        columns[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
        columns[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
    }

    // 16 x 16 transposes of groups of four codes. Reads up to 60 bytes past the last row: the buffer has 64 to spare.
    static void pack_tile(const Query* codes, int64_t stride, int64_t steps, Key* to) {
        const I32 offset = _mm512_set1_epi8(static_cast<char>(0x80));  // code + 128 as unsigned
        for (int c = 0; c < COLS; ++c) {
            for (int64_t first = 0; first < steps; first += 16) {
                I32 row[16], mixed[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) row[i] = _mm512_xor_si512(load_codes(codes + (c * 16 + i) * stride + first * GROUP), offset);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i += 2) {
                    mixed[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
                    mixed[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
                }
#pragma GCC unroll 16
                for (int i = 0; i < 16; i += 4) {
                    row[i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
                    row[i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
                    row[i + 2] = _mm512_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
                    row[i + 3] = _mm512_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
                }
                // row[4 k + j], lane L: group 4 L + j of keys 4 k to 4 k + 3.
#pragma GCC unroll 16
                for (int j = 0; j < 4; ++j) {
                    const I32 low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88), high = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
                    const I32 low2 = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88), high2 = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
                    mixed[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
                    mixed[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
                    mixed[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
                    mixed[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
                }
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    if (i < steps - first) store_codes(to + ((first + i) * COLS + c) * LANES * GROUP, mixed[i]);
                }
            }
        }
    }

    static ATTN_INLINE uint64_t byte_bits(const uint8_t* bytes, int count) {
        const __mmask64 inside = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
        const __m512i some = _mm512_maskz_loadu_epi8(inside, bytes);
        return _mm512_test_epi8_mask(some, some);
    }

    // vpackssdw works in 128-bit lanes: position 8 L + 4 j + i holds key 16 j + 4 L + i.
    static ATTN_INLINE I32 pack_order() {
        return _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8,
                                23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    }
    static ATTN_INLINE Short set1_short(int16_t x) { return _mm512_set1_epi16(x); }
    static ATTN_INLINE Short load_short_top(const int16_t* p) { return _mm512_load_si512(p); }
    static ATTN_INLINE void store_short(void* p, Short x) { _mm512_storeu_si512(p, x); }
    static ATTN_INLINE Short max_short(Short a, Short b) { return _mm512_max_epi16(a, b); }
    static ATTN_INLINE bool any_above(Short a, int32_t limit) {
        return _mm512_cmpgt_epi16_mask(a, set1_short(static_cast<int16_t>(limit))) != 0;
    }
    static ATTN_INLINE int32_t highest_short(Short a) {
        // vphminposuw finds the least of eight unsigned numbers: 32767 - x turns the order round.
        const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
        const __m128i quarter = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        return 0x7fff - _mm_extract_epi16(_mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(0x7fff), quarter)), 0);
    }
    static ATTN_INLINE Slack narrow(const I32 (&acc)[COLS]) {
        return {_mm512_packs_epi32(acc[0], acc[1]), _mm512_packs_epi32(acc[2], acc[3])};
    }
    static ATTN_INLINE Short max_slack(const Slack& slack) { return _mm512_max_epi16(slack.low, slack.high); }
    static ATTN_INLINE void store_slack(uint16_t* to, const Slack& slack) {
        store_codes(to, slack.low);
        store_codes(to + 32, slack.high);
    }
    static ATTN_INLINE Slack load_slack(const uint16_t* from) { return {load_codes(from), load_codes(from + 32)}; }
    static ATTN_INLINE Slack lower(const Slack& slack, int32_t by) {
        const I32 less = _mm512_set1_epi16(static_cast<int16_t>(by));
        return {_mm512_subs_epi16(slack.low, less), _mm512_subs_epi16(slack.high, less)};
    }
    static ATTN_INLINE void store_half(void* p, I32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(x)); }
    static ATTN_INLINE int list(const Slack& slack, int32_t floor, int32_t base, uint16_t* keys, uint16_t* to) {
        const I32 least_slack = _mm512_set1_epi16(static_cast<int16_t>(floor));
        const __mmask32 in_low = _mm512_cmpge_epi16_mask(slack.low, least_slack), in_high = _mm512_cmpge_epi16_mask(slack.high, least_slack);
        const I32 order = _mm512_add_epi16(pack_order(), _mm512_set1_epi16(static_cast<int16_t>(base)));
        const int count = __builtin_popcount(in_low), more = __builtin_popcount(in_high);
        const I32 high_order = _mm512_add_epi16(order, _mm512_set1_epi16(32));
        if (__builtin_expect(most(count, more) <= 16, 1)) {
            store_half(keys, _mm512_maskz_compress_epi16(in_low, order));
            store_half(to, _mm512_maskz_compress_epi16(in_low, slack.low));
            store_half(keys + count, _mm512_maskz_compress_epi16(in_high, high_order));
            store_half(to + count, _mm512_maskz_compress_epi16(in_high, slack.high));
            return count + more;
        }
        store_codes(keys, _mm512_maskz_compress_epi16(in_low, order));
        store_codes(to, _mm512_maskz_compress_epi16(in_low, slack.low));
        store_codes(keys + count, _mm512_maskz_compress_epi16(in_high, high_order));
        store_codes(to + count, _mm512_maskz_compress_epi16(in_high, slack.high));
        return count + more;
    }
    static int sift(const uint16_t* keys, const uint16_t* slack, int count, int32_t drop, uint16_t* to_keys, uint16_t* to) {
        const I32 sink = _mm512_set1_epi16(static_cast<int16_t>(drop));
        int kept = 0;
        for (int i = 0; i < count; i += 32) {
            const __mmask32 inside = count - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count - i)) - 1;
            const I32 rest = _mm512_sub_epi16(load_codes(slack + i), sink);
            const __mmask32 keep = ~_mm512_movepi16_mask(rest) & inside;
            const I32 moved = _mm512_maskz_compress_epi16(keep, load_codes(keys + i));
            store_codes(to + kept, _mm512_maskz_compress_epi16(keep, rest));
            store_codes(to_keys + kept, moved);
            kept += __builtin_popcount(keep);
        }
        return kept;
    }
};

}  // namespace
}  // namespace attnpress
