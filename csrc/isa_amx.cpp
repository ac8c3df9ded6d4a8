// Target "amx": the products of AMX-INT8, 16 rows x 64 keys at a time, and all else as AVX-512 VNNI has it. Sapphire
// Rapids and later.
//
// tdpbsud and tdpbusd multiply 16 x 64 by 64 x 16 bytes in 16 cycles, eight times what vpdpbusd does in them. Their right
// side wants what a packed tile of keys, or a panel of values, is: four codes of one column side by side. Sums leave for the first
// cache, where the rest of the body finds them: a block of 16 rows is 4 KB, too much for registers.
#include "isa_avx512vnni.h"

namespace attnpress {
namespace {

struct Amx : Avx512Vnni {
    static constexpr int ROWS = 16, BLOCK = 16;

    // Tiles 0 to 3 are sums of 16 rows x 16 columns. 4 and 5 are the two sides; 6 and 7 those of the last few steps.
    class Session {
      public:
        explicit Session(int64_t dim) {
            alignas(64) Config config{};
            const auto rest = static_cast<uint8_t>(dim / GROUP % SIDE);
            for (int tile = 0; tile < 8; ++tile) {
                config.rows[tile] = SIDE;
                config.row_bytes[tile] = SIDE * GROUP;
            }
            if (rest > 0) {
                config.row_bytes[6] = rest * GROUP;
                config.rows[7] = rest;
            }
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;

      private:
        struct Config {
            uint8_t palette = 1, start_row = 0, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        };
    };

    static void score_block(const Query* rows, int64_t stride, const Key* tile, int64_t steps, int32_t* sums, int64_t line) {
        multiply<true>(rows, stride, tile, steps, sums, line);
    }
    static void value_block(const Prob* rows, int64_t stride, const Value* tile, int64_t steps, int32_t* sums, int64_t line) {
        multiply<false>(rows, stride, tile, steps, sums, line);
    }

  private:
    static constexpr int SIDE = 16;

// Names of tiles are part of an instruction, so no loop can have them.
#define ATTN_MULTIPLY(C, LEFT, RIGHT)                                    \
    _tile_loadd(RIGHT, right + C * SIDE * GROUP, LINE);                  \
    if constexpr (SIGNED_LEFT) _tile_dpbsud(C, LEFT, RIGHT); else _tile_dpbusd(C, LEFT, RIGHT);
#define ATTN_MULTIPLY_ALL(LEFT, RIGHT)  \
    _tile_loadd(LEFT, left, stride);    \
    ATTN_MULTIPLY(0, LEFT, RIGHT)       \
    ATTN_MULTIPLY(1, LEFT, RIGHT)       \
    ATTN_MULTIPLY(2, LEFT, RIGHT)       \
    ATTN_MULTIPLY(3, LEFT, RIGHT)

    // sums[16][COLS * LANES], `line` bytes apart. Always all 16 rows: behind fewer there is memory to read, and none of it counts.
    template <bool SIGNED_LEFT>
    static ATTN_INLINE void multiply(const void* rows, int64_t stride, const void* tile, int64_t steps, int32_t* sums, int64_t line) {
        constexpr int64_t LINE = COLS * LANES * GROUP;
        const auto *left = static_cast<const char*>(rows), *right = static_cast<const char*>(tile);
        asm volatile("" ::: "memory");  // the loads of tiles do not tell the compiler what they read
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (; steps >= SIDE; steps -= SIDE) {
            ATTN_MULTIPLY_ALL(4, 5)
            left += SIDE * GROUP;
            right += SIDE * LINE;
        }
        if (steps > 0) {
            ATTN_MULTIPLY_ALL(6, 7)
        }
        _tile_stored(0, sums, line);
        _tile_stored(1, sums + LANES, line);
        _tile_stored(2, sums + 2 * LANES, line);
        _tile_stored(3, sums + 3 * LANES, line);
    }
#undef ATTN_MULTIPLY_ALL
#undef ATTN_MULTIPLY
};

}  // namespace

void attention_amx(const Attention& a) { run<Amx>(a); }

}  // namespace attnpress
