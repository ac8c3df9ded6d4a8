// Target "scalar": one lane of plain C++, for any processor; the honest baseline, compiled without auto-vectorization.
#include "attention_body.h"

namespace attnpress {
namespace {

struct Scalar : VectorProducts {
    static constexpr int LANES = 1, GROUP = 1, VALUE_GROUP = 1, ROWS = 2, COLS = 4, KEY_OFFSET = 0;
    using I32 = int32_t;
    using F32 = float;
    using Key = int32_t;
    using Query = int32_t;
    using Prob = int32_t;
    using Value = int32_t;
    using Left = int32_t;
    using Digit = int32_t;
    static constexpr int DIGIT_GROUP = 1, DIGIT_BITS = 16, SUMS = 8;
    static constexpr bool SIGNED_DIGITS = true;
    using Seen = int32_t;
    using SeenQuery = int32_t;
    static constexpr int SEEN_OFFSET = 0, SCORE_PLANES = 1, SCORE_OFFSET = 0;
    using Short = int16_t;
    struct Slack {
        int16_t of[COLS];
    };

    static I32 set1(int32_t x) { return x; }
    static F32 set1f(float x) { return x; }
    static I32 iota() { return 0; }
    static I32 load(const int32_t* p) { return *p; }
    static void store(int32_t* p, I32 x) { *p = x; }
    static F32 loadf(const float* p) { return *p; }
    static void storef(float* p, F32 x) { *p = x; }
    static F32 load_halves(const uint16_t* p) { return half_to_float(*p); }
    static F32 load_bfloats(const uint16_t* p) { return bfloat_to_float(*p); }
    static I32 load_short(const uint16_t* p) { return static_cast<int16_t>(*p); }
    static I32 load_codes(const int32_t* p) { return *p; }
    static void store_codes(int32_t* p, I32 x) { *p = x; }
    static void store_code(int32_t* p, I32 x) { *p = x; }
    static I32 broadcast(const int32_t* p) { return *p; }

    // Sums of digits wrap round where only their low bits count.
    static I32 add(I32 a, I32 b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
    static I32 sub(I32 a, I32 b) { return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
    static I32 band(I32 a, I32 b) { return a & b; }
    static I32 max(I32 a, I32 b) { return most(a, b); }
    template <int N> static I32 shr(I32 a) { return static_cast<int32_t>(static_cast<uint32_t>(a) >> N); }
    template <int N> static I32 shl(I32 a) { return static_cast<int32_t>(static_cast<uint32_t>(a) << N); }
    static I32 sllv(I32 a, I32 n) { return static_cast<int32_t>(static_cast<uint32_t>(a) << n); }
    static I32 srlv(I32 a, I32 n) { return static_cast<int32_t>(static_cast<uint32_t>(a) >> n); }
    static I32 mulhi(I32 a, I32 b) { return static_cast<int32_t>((static_cast<uint32_t>(a) * static_cast<uint32_t>(b)) >> 16); }
    static I32 select_le(I32 a, I32 b, I32 x) { return a <= b ? x : 0; }
    static I32 where(uint64_t bits, I32 x, int32_t other) { return bits & 1 ? x : other; }
    static int32_t first(I32 a) { return a; }
    static int32_t total(I32 a) { return a; }
    static int32_t highest(I32 a) { return a; }
    static float highest(F32 a) { return a; }

    static F32 to_float(I32 a) { return static_cast<float>(a); }
    static I32 round(F32 a) { return static_cast<int32_t>(std::lrintf(a)); }
    static F32 nearest(F32 a) { return std::nearbyintf(a); }
    static F32 clamp(F32 a, F32 low, F32 high) { return a != a ? 0.0f : least(most(a, low), high); }
    static I32 round_within(F32 a, F32 limit) { return round(clamp(a, -limit, limit)); }
    static F32 mulf(F32 a, F32 b) { return a * b; }
    static F32 addf(F32 a, F32 b) { return a + b; }
    static F32 quotient(F32 a, F32 b) { return a / b; }
    static F32 as_float(I32 a) {
        float x;
        std::memcpy(&x, &a, sizeof(x));
        return x;
    }
    static I32 mullo(I32 a, I32 b) { return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
    static I32 min(I32 a, I32 b) { return least(a, b); }
    template <int N> static I32 sra(I32 a) { return a >> N; }
    static I32 load_seen(const SeenQuery* p) { return *p; }
    static I32 bxor(I32 a, I32 b) { return a ^ b; }
    static bool passes_short(I32 a) { return static_cast<uint32_t>(a) >> 16 != 0; }
    static I32 totals(const I32 (&rows)[LANES]) { return rows[0]; }
    static I32 sum_shorts(const uint16_t* from, int count) {
        int32_t sum = 0;
        for (int i = 0; i < count; ++i) sum += from[i];
        return sum;
    }
    static F32 subf(F32 a, F32 b) { return a - b; }
    static F32 minf(F32 a, F32 b) { return least(a, b); }
    static F32 maxf(F32 a, F32 b) { return most(a, b); }
    static F32 divide(F32 x, F32 by, F32) { return x / by; }
    static F32 finite_magnitude(F32 a) { return std::isfinite(a) ? std::fabs(a) : 0.0f; }

    static I32 ones() { return 1; }
    static I32 dot_scores(I32 acc, I32 key, I32 query) { return acc + key * query; }
    static I32 dot_values(I32 acc, I32 code, I32 value) { return acc + code * value; }
    static I32 dot_digits(I32 acc, I32 digit, I32 code) { return acc + digit * code; }
    static I32 see(const SeenQuery* query, const Seen* seen, int64_t width, const uint16_t* keys) {
        int32_t sum = 0;
        for (int64_t i = 0; i < width; ++i) sum += query[i] * seen[keys[0] * width + i];
        return sum;
    }
    // `rank` columns of `count` keys as rows, `line` apart, of codes of P.
    static void turn(const Seen* seen, int64_t width, int64_t rank, int64_t count, Prob* to, int64_t line) {
        for (int64_t key = 0; key < count; ++key) {
            for (int64_t i = 0; i < rank; ++i) to[i * line + key] = static_cast<Prob>(seen[key * width + i] + RAISED);
        }
    }
    static I32 at_most_one(I32 codes) { return least(codes, 1); }
    static I32 member(I32 group, int) { return group; }
    static void store_arranged(Value* to, const I32 (&codes)[COLS]) { std::memcpy(to, codes, sizeof(codes)); }
    static void store_ordered(Query* to, const I32 (&codes)[COLS]) { std::memcpy(to, codes, sizeof(codes)); }
    static void interleave(const Value* const (&from)[1], int64_t offset, I32 (&columns)[COLS]) {
        std::memcpy(columns, from[0] + offset, sizeof(columns));
    }
    static void pack_tile(const Query* codes, int64_t stride, int64_t steps, Key* to) {
        for (int64_t step = 0; step < steps; ++step) {
            for (int key = 0; key < COLS; ++key) to[step * COLS + key] = codes[key * stride + step];
        }
    }

    static uint64_t byte_bits(const uint8_t* bytes, int count) {
        uint64_t bits = 0;
        for (int i = 0; i < count; ++i) bits |= static_cast<uint64_t>(bytes[i] != 0) << i;
        return bits;
    }
    static Short set1_short(int16_t x) { return x; }
    static Short load_short_top(const int16_t* p) { return *p; }
    static void store_short(void* p, Short x) { std::memcpy(p, &x, sizeof(x)); }
    static Short max_short(Short a, Short b) { return most(a, b); }
    static bool any_above(Short a, int32_t limit) { return a > limit; }
    static int32_t highest_short(Short a) { return a; }
    static Slack narrow(const I32 (&acc)[COLS]) {
        Slack slack;
        for (int c = 0; c < COLS; ++c) slack.of[c] = static_cast<int16_t>(least(most(acc[c], -32768), 32767));
        return slack;
    }
    static Short max_slack(const Slack& slack) { return most(most(slack.of[0], slack.of[1]), most(slack.of[2], slack.of[3])); }
    static void store_slack(uint16_t* to, const Slack& slack) { std::memcpy(to, slack.of, sizeof(slack.of)); }
    static Slack load_slack(const uint16_t* from) {
        Slack slack;
        std::memcpy(slack.of, from, sizeof(slack.of));
        return slack;
    }
    static Slack lower(Slack slack, int32_t by) {
        for (int16_t& one : slack.of) one = static_cast<int16_t>(most(one - by, -32768));
        return slack;
    }
    static int list(const Slack& slack, int32_t floor, int32_t base, uint16_t* keys, uint16_t* to) {
        int count = 0;
        for (int c = 0; c < COLS; ++c) {
            if (slack.of[c] < floor) continue;
            keys[count] = static_cast<uint16_t>(base + c);
            to[count++] = static_cast<uint16_t>(slack.of[c]);
        }
        return count;
    }
    static int sift(const uint16_t* keys, const uint16_t* slack, int count, int32_t drop, uint16_t* to_keys, uint16_t* to) {
        int kept = 0;
        for (int i = 0; i < count; ++i) {
            if (slack[i] < drop) continue;
            to_keys[kept] = keys[i];
            to[kept++] = static_cast<uint16_t>(slack[i] - drop);
        }
        return kept;
    }
};

}  // namespace

void attention_scalar(const Attention& a) { run<Scalar>(a); }

}  // namespace attnpress
