// Target "avx2": AVX2, FMA, F16C. Haswell (2013), Zen and later.
//
// Codes travel as 16-bit pairs: vpmaddwd and vpaddd make 16 exact products in two instructions. The 8-bit vpmaddubsw would
// have to be kept from saturating (255 * 127 twice) with a sign and an absolute value for each pair of operands, and then
// needs four instructions for 32 products: no gain. 6 rows x 16 keys take 12 of the 16 registers.
//
// Codes of Q and K of few bits are the exception (Avx2Short): see there.
#include <immintrin.h>

#include "attention_body.h"

namespace attnpress {
namespace {

// Which bytes to move for each set of 16-bit lanes to keep: AVX2 has no instruction that compresses.
struct Compress {
    alignas(64) uint8_t bytes[256][16] = {};
    constexpr Compress() {
        for (int bits = 0; bits < 256; ++bits) {
            int end = 0;
            for (int lane = 0; lane < 8; ++lane) {
                if ((bits >> lane & 1) == 0) continue;
                bytes[bits][end++] = static_cast<uint8_t>(2 * lane);
                bytes[bits][end++] = static_cast<uint8_t>(2 * lane + 1);
            }
        }
    }
};
constexpr Compress COMPRESS;

struct Avx2 : VectorProducts {
    static constexpr int LANES = 8, GROUP = 2, VALUE_GROUP = 2, ROWS = 6, COLS = 2, KEY_OFFSET = 0;
    using I32 = __m256i;
    using F32 = __m256;
    using Key = int16_t;
    using Query = int16_t;
    using Prob = int16_t;
    using Value = int16_t;
    using Left = int16_t;
    using Digit = int16_t;
    static constexpr int DIGIT_GROUP = 2, DIGIT_BITS = 16, SUMS = 12;
    static constexpr bool SIGNED_DIGITS = true;
    using Seen = int16_t;
    using SeenQuery = int16_t;
    static constexpr int SEEN_OFFSET = 0, SCORE_PLANES = 1, SCORE_OFFSET = 0;
    using Short = __m256i;
    using Slack = __m256i;

    static ATTN_INLINE I32 at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static ATTN_INLINE void to(void* p, I32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

    static ATTN_INLINE I32 set1(int32_t x) { return _mm256_set1_epi32(x); }
    static ATTN_INLINE F32 set1f(float x) { return _mm256_set1_ps(x); }
    static ATTN_INLINE I32 iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    static ATTN_INLINE I32 load(const int32_t* p) { return at(p); }
    static ATTN_INLINE void store(int32_t* p, I32 x) { to(p, x); }
    static ATTN_INLINE F32 loadf(const float* p) { return _mm256_loadu_ps(p); }
    static ATTN_INLINE void storef(float* p, F32 x) { _mm256_storeu_ps(p, x); }
    static ATTN_INLINE __m128i half_at(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static ATTN_INLINE F32 load_halves(const uint16_t* p) { return _mm256_cvtph_ps(half_at(p)); }
    static ATTN_INLINE F32 load_bfloats(const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_short(p), 16)); }
    static ATTN_INLINE I32 load_short(const uint16_t* p) { return _mm256_cvtepi16_epi32(half_at(p)); }
    static ATTN_INLINE I32 load_codes(const int16_t* p) { return at(p); }
    static ATTN_INLINE void store_codes(int16_t* p, I32 x) { to(p, x); }
    static ATTN_INLINE void store_code(int16_t* p, I32 x) {
        const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
    }
    static ATTN_INLINE I32 broadcast(const int16_t* p) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        return _mm256_set1_epi32(pair);
    }

    static ATTN_INLINE I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
    static ATTN_INLINE I32 sub(I32 a, I32 b) { return _mm256_sub_epi32(a, b); }
    static ATTN_INLINE I32 band(I32 a, I32 b) { return _mm256_and_si256(a, b); }
    static ATTN_INLINE I32 max(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
    template <int N> static ATTN_INLINE I32 shr(I32 a) { return _mm256_srli_epi32(a, N); }
    template <int N> static ATTN_INLINE I32 shl(I32 a) { return _mm256_slli_epi32(a, N); }
    static ATTN_INLINE I32 sllv(I32 a, I32 n) { return _mm256_sllv_epi32(a, n); }
    static ATTN_INLINE I32 srlv(I32 a, I32 n) { return _mm256_srlv_epi32(a, n); }
    static ATTN_INLINE I32 mulhi(I32 a, I32 b) { return _mm256_mulhi_epu16(a, b); }
    static ATTN_INLINE I32 select_le(I32 a, I32 b, I32 x) { return _mm256_andnot_si256(_mm256_cmpgt_epi32(a, b), x); }
    static ATTN_INLINE I32 where(uint64_t bits, I32 x, int32_t other) {
        const I32 lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const I32 off = _mm256_cmpeq_epi32(_mm256_and_si256(set1(static_cast<int32_t>(bits & 255)), lane), set1(0));
        return _mm256_blendv_epi8(x, set1(other), off);
    }
    static ATTN_INLINE int32_t first(I32 a) { return _mm256_cvtsi256_si32(a); }
    static ATTN_INLINE int32_t total(I32 a) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static ATTN_INLINE int32_t highest(I32 a) {
        __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static ATTN_INLINE float highest(F32 a) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
    }

    static ATTN_INLINE F32 to_float(I32 a) { return _mm256_cvtepi32_ps(a); }
    static ATTN_INLINE I32 round(F32 a) { return _mm256_cvtps_epi32(a); }
    static ATTN_INLINE F32 nearest(F32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static ATTN_INLINE F32 clamp(F32 a, F32 low, F32 high) {
        const F32 ordered = _mm256_cmp_ps(a, a, _CMP_ORD_Q);
        return _mm256_and_ps(_mm256_min_ps(_mm256_max_ps(a, low), high), ordered);
    }
    static ATTN_INLINE I32 round_within(F32 a, F32 limit) { return round(clamp(a, subf(set1f(0.0f), limit), limit)); }
    static ATTN_INLINE F32 mulf(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
    static ATTN_INLINE F32 addf(F32 a, F32 b) { return _mm256_add_ps(a, b); }
    static ATTN_INLINE F32 quotient(F32 a, F32 b) { return _mm256_div_ps(a, b); }
    static ATTN_INLINE F32 as_float(I32 a) { return _mm256_castsi256_ps(a); }
    static ATTN_INLINE I32 mullo(I32 a, I32 b) { return _mm256_mullo_epi32(a, b); }
    static ATTN_INLINE I32 min(I32 a, I32 b) { return _mm256_min_epi32(a, b); }
    template <int N> static ATTN_INLINE I32 sra(I32 a) { return _mm256_srai_epi32(a, N); }
    static ATTN_INLINE I32 load_seen(const SeenQuery* p) { return load_short(reinterpret_cast<const uint16_t*>(p)); }
    static ATTN_INLINE I32 bxor(I32 a, I32 b) { return _mm256_xor_si256(a, b); }
    static ATTN_INLINE bool passes_short(I32 a) { return _mm256_testz_si256(a, set1(static_cast<int32_t>(0xffff0000))) == 0; }
    // Lane r: the sum of the lanes of row r.
    static ATTN_INLINE I32 totals(const I32 (&rows)[LANES]) {
        const I32 a = _mm256_hadd_epi32(_mm256_hadd_epi32(rows[0], rows[1]), _mm256_hadd_epi32(rows[2], rows[3]));
        const I32 b = _mm256_hadd_epi32(_mm256_hadd_epi32(rows[4], rows[5]), _mm256_hadd_epi32(rows[6], rows[7]));
        return add(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }
    // Sum, in lanes, of numbers below 2^15; reads a vector past the last.
    static ATTN_INLINE I32 sum_shorts(const uint16_t* from, int count) {
        const I32 place = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        I32 sum = set1(0);
        for (int i = 0; i < count; i += 16) {
            const I32 inside = _mm256_cmpgt_epi16(set1_short(static_cast<int16_t>(least(count - i, 16))), place);
            sum = add(sum, _mm256_madd_epi16(_mm256_and_si256(at(from + i), inside), ones()));
        }
        return sum;
    }
    static ATTN_INLINE F32 subf(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
    static ATTN_INLINE F32 minf(F32 a, F32 b) { return _mm256_min_ps(a, b); }
    static ATTN_INLINE F32 maxf(F32 a, F32 b) { return _mm256_max_ps(a, b); }
    // x / by from inverse = 1 / by: one correction rounds like a division (Markstein); infinities stay as they are.
    static ATTN_INLINE F32 divide(F32 x, F32 by, F32 inverse) {
        const F32 first = _mm256_mul_ps(x, inverse), rest = _mm256_fnmadd_ps(first, by, x);
        return _mm256_blendv_ps(_mm256_fmadd_ps(rest, inverse, first), first, _mm256_cmp_ps(rest, rest, _CMP_UNORD_Q));
    }
    static ATTN_INLINE F32 finite_magnitude(F32 a) {
        const F32 magnitude = _mm256_andnot_ps(set1f(-0.0f), a);
        return _mm256_and_ps(magnitude, _mm256_cmp_ps(magnitude, set1f(INFINITY), _CMP_LT_OQ));
    }

    static ATTN_INLINE I32 ones() { return _mm256_set1_epi16(1); }
    static ATTN_INLINE I32 dot_scores(I32 acc, I32 key, I32 query) { return _mm256_add_epi32(acc, _mm256_madd_epi16(key, query)); }
    static ATTN_INLINE I32 dot_values(I32 acc, I32 code, I32 value) { return _mm256_add_epi32(acc, _mm256_madd_epi16(code, value)); }
    static ATTN_INLINE I32 dot_digits(I32 acc, I32 digits, I32 codes) { return _mm256_add_epi32(acc, _mm256_madd_epi16(digits, codes)); }
    // query . seen[key] of LANES keys, `width` codes each, a multiple of 8.
    static ATTN_INLINE I32 see(const SeenQuery* query, const Seen* seen, int64_t width, const uint16_t* keys) {
        I32 sums[4] = {set1(0), set1(0), set1(0), set1(0)};  // of keys g and g + 4
        for (int64_t i = 0; i < width; i += 8) {
            const I32 group = _mm256_broadcastsi128_si256(half_at(reinterpret_cast<const uint16_t*>(query + i)));
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) {
                const auto half = [&](int key) { return half_at(reinterpret_cast<const uint16_t*>(seen + keys[key] * width + i)); };
                sums[g] = add(sums[g], _mm256_madd_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(half(g)), half(g + 4), 1), group));
            }
        }
        return _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    }
    // `rank` columns of `count` keys as rows, `line` apart, of codes of P.
    static void turn(const Seen* seen, int64_t width, int64_t rank, int64_t count, Prob* to, int64_t line) {
        for (int64_t key = 0; key < count; ++key) {
            for (int64_t i = 0; i < rank; ++i) to[i * line + key] = static_cast<Prob>(seen[key * width + i] + RAISED);
        }
    }
    static ATTN_INLINE I32 at_most_one(I32 codes) { return _mm256_min_epi16(codes, ones()); }
    // The code at one place of each group, as it is packed.
    static ATTN_INLINE I32 member(I32 group, int place) {
        return place == 0 ? _mm256_srai_epi32(_mm256_slli_epi32(group, 16), 16) : _mm256_srai_epi32(group, 16);
    }
    // In 128-bit halves: codes 4 L to 4 L + 3 of both, the order that interleave undoes.
    static ATTN_INLINE void store_arranged(Value* where, const I32 (&codes)[COLS]) { to(where, _mm256_packs_epi32(codes[0], codes[1])); }
    static ATTN_INLINE void store_ordered(Query* where, const I32 (&codes)[COLS]) {
        to(where, _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), 0xd8));
    }
    static ATTN_INLINE void interleave(const Value* const (&from)[2], int64_t offset, I32 (&columns)[COLS]) {
        const I32 a = at(from[0] + offset), b = at(from[1] + offset);
        columns[0] = _mm256_unpacklo_epi16(a, b);
        columns[1] = _mm256_unpackhi_epi16(a, b);
    }

    static void pack_tile(const Query* codes, int64_t stride, int64_t steps, Key* where) {
        transpose(codes, stride, steps, where, _mm256_setzero_si256());
    }
    // 8 x 8 transposes of groups of codes, 4 bytes each, with `offset` added to each byte. Reads up to 28 bytes past the last
    // row: the buffer has 64 to spare.
    template <class Code, class Packed>
    static ATTN_INLINE void transpose(const Code* codes, int64_t stride, int64_t steps, Packed* where, I32 offset) {
        constexpr int64_t HELD = 4 / sizeof(Code);
        for (int c = 0; c < COLS; ++c) {
            for (int64_t first = 0; first < steps; first += 8) {
                __m256i row[8], mixed[8];
                for (int i = 0; i < 8; ++i) row[i] = _mm256_add_epi8(at(codes + (c * 8 + i) * stride + first * HELD), offset);
                for (int i = 0; i < 8; i += 2) {
                    mixed[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
                    mixed[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
                }
                for (int i = 0; i < 8; i += 4) {
                    row[i] = _mm256_unpacklo_epi64(mixed[i], mixed[i + 2]);
                    row[i + 1] = _mm256_unpackhi_epi64(mixed[i], mixed[i + 2]);
                    row[i + 2] = _mm256_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
                    row[i + 3] = _mm256_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
                }
                for (int i = 0; i < 4; ++i) {
                    mixed[i] = _mm256_permute2x128_si256(row[i], row[i + 4], 0x20);
                    mixed[i + 4] = _mm256_permute2x128_si256(row[i], row[i + 4], 0x31);
                }
                for (int i = 0; i < least<int64_t>(8, steps - first); ++i) {
                    to(where + ((first + i) * COLS + c) * LANES * HELD, mixed[i]);
                }
            }
        }
    }

    static ATTN_INLINE uint64_t byte_bits(const uint8_t* bytes, int count) {
        uint8_t whole[16] = {};
        std::memcpy(whole, bytes, count);
        const __m128i zero = _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(whole)), _mm_setzero_si128());
        return static_cast<uint16_t>(~_mm_movemask_epi8(zero));
    }
    static ATTN_INLINE Short set1_short(int16_t x) { return _mm256_set1_epi16(x); }
    static ATTN_INLINE Short load_short_top(const int16_t* p) { return at(p); }
    static ATTN_INLINE void store_short(void* p, Short x) { to(p, x); }
    static ATTN_INLINE Short max_short(Short a, Short b) { return _mm256_max_epi16(a, b); }
    static ATTN_INLINE bool any_above(Short a, int32_t limit) {
        return _mm256_movemask_epi8(_mm256_cmpgt_epi16(a, set1_short(static_cast<int16_t>(limit)))) != 0;
    }
    static ATTN_INLINE int32_t highest_short(Short a) { return highest_of_eight(_mm_max_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1))); }
    static ATTN_INLINE int32_t highest_of_eight(__m128i a) {
        // vphminposuw finds the least of eight unsigned numbers: 32767 - x turns the order round.
        const __m128i top = _mm_set1_epi16(0x7fff);
        return 0x7fff - _mm_extract_epi16(_mm_minpos_epu16(_mm_sub_epi16(top, a)), 0);
    }
    static ATTN_INLINE Slack narrow(const I32 (&acc)[COLS]) { return _mm256_packs_epi32(acc[0], acc[1]); }
    static ATTN_INLINE Short max_slack(Slack slack) { return slack; }
    static ATTN_INLINE void store_slack(uint16_t* where, Slack slack) { to(where, slack); }
    static ATTN_INLINE Slack load_slack(const uint16_t* from) { return at(from); }
    static ATTN_INLINE Slack lower(Slack slack, int32_t by) { return _mm256_subs_epi16(slack, set1_short(static_cast<int16_t>(by))); }
    // The 16-bit lanes of `bits` first, in order. What follows them is of no account.
    static ATTN_INLINE __m128i compressed(__m128i x, uint32_t bits) {
        const auto* row = reinterpret_cast<const __m128i*>(COMPRESS.bytes[bits]);
        return _mm_shuffle_epi8(x, _mm_load_si128(row));
    }
    static ATTN_INLINE void store_half(uint16_t* to, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), x); }
    // No branch: whether a tile holds a survivor cannot be predicted.
    static ATTN_INLINE int list(Slack slack, int32_t floor, int32_t base, uint16_t* keys, uint16_t* where) {
        const I32 below = _mm256_cmpgt_epi16(set1_short(static_cast<int16_t>(floor)), slack);
        const __m128i low = _mm256_castsi256_si128(slack), high = _mm256_extracti128_si256(slack, 1);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(below), _mm256_extracti128_si256(below, 1));
        const uint32_t bits = ~static_cast<uint32_t>(_mm_movemask_epi8(bytes)), in_low = bits & 255, in_high = bits >> 8 & 255;
        // vpackssdw works in 128-bit halves: lane 8 L + 4 j + i holds key 8 j + 4 L + i.
        const __m128i first = _mm_add_epi16(_mm_setr_epi16(0, 1, 2, 3, 8, 9, 10, 11), _mm_set1_epi16(static_cast<int16_t>(base)));
        const int count = __builtin_popcount(in_low);
        store_half(keys, compressed(first, in_low));
        store_half(where, compressed(low, in_low));
        store_half(keys + count, compressed(_mm_add_epi16(first, _mm_set1_epi16(4)), in_high));
        store_half(where + count, compressed(high, in_high));
        return count + __builtin_popcount(in_high);
    }
    static int sift(const uint16_t* keys, const uint16_t* slack, int count, int32_t drop, uint16_t* to_keys, uint16_t* where) {
        const __m128i sink = _mm_set1_epi16(static_cast<int16_t>(drop));
        int kept = 0;
        for (int i = 0; i < count; i += 8) {
            const __m128i rest = _mm_sub_epi16(half_at(slack + i), sink);
            const uint32_t inside = count - i >= 8 ? 255u : (1u << (count - i)) - 1;
            const uint32_t keep = ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(rest, rest))) & inside;
            const __m128i moved = compressed(half_at(keys + i), keep);
            store_half(where + kept, compressed(rest, keep));
            store_half(to_keys + kept, moved);
            kept += __builtin_popcount(keep);
        }
        return kept;
    }
};

// Q and K of few bits. vpmaddubsw makes 32 products of bytes and adds them in pairs; sums stay in 16 bits for all of a head's
// channels and are widened once: two instructions for 32 products, not four. Keys are the unsigned side, as code + 16: all
// scores of a row are higher by 16 * sum(q), and only differences count.
struct Avx2Short : Avx2 {
    static constexpr int GROUP = 4, KEY_OFFSET = 16;
    static constexpr bool SHORT_SUMS = true;
    using Key = uint8_t;
    using Query = int8_t;

    // Whether the sum of D / GROUP pairs of products fits.
    static bool fits(const Attention& a) {
        return a.k_max <= KEY_OFFSET && 2 * (a.k_max + KEY_OFFSET) * a.q_max * (a.dim / GROUP) <= INT16_MAX;
    }

    using Avx2::broadcast;
    using Avx2::load_codes;
    static ATTN_INLINE I32 load_codes(const uint8_t* p) { return at(p); }
    static ATTN_INLINE I32 broadcast(const int8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
    static ATTN_INLINE I32 dot_scores(I32 acc, I32 key, I32 query) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(key, query)); }
    static ATTN_INLINE I32 widen(I32 halves) { return _mm256_madd_epi16(halves, ones()); }
    static ATTN_INLINE I32 member(I32 group, int place) { return band(_mm256_srli_epi32(group, 8 * place), set1(255)); }

    static ATTN_INLINE void store_ordered(Query* where, const I32 (&codes)[COLS]) {
        const I32 shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(where), bytes);
    }
    // The same transposes of 4 bytes; these are four codes.
    static void pack_tile(const Query* codes, int64_t stride, int64_t steps, Key* where) {
        transpose(codes, stride, steps, where, _mm256_set1_epi8(KEY_OFFSET));
    }
};

}  // namespace

void attention_avx2(const Attention& a) {
    if (Avx2Short::fits(a)) run<Avx2Short>(a); else run<Avx2>(a);
}

}  // namespace attnpress
