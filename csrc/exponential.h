// Constants of the integer exponential of core/exponential.py; attention_scores.h evaluates it.
#pragma once

#include <cstdint>

namespace attnpress {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int STEP_BITS = 10;                         // an exponent counts steps of 1/1024 octave
constexpr int32_t STEPS_PER_OCTAVE = 1 << STEP_BITS;
constexpr int32_t T_MAX = 18 * STEPS_PER_OCTAVE;      // exponents saturate here, where the power is 0
constexpr int ONE_BITS = 16;                          // powers and fractions of an octave are in units of 2^-16
constexpr int32_t ONE = 1 << ONE_BITS;
constexpr int FRACTION_SHIFT = ONE_BITS - STEP_BITS;  // from steps to these units
constexpr int32_t C1 = 45324, C2 = 15148, C3 = 2596;  // of a cubic for 1 - 2^-x on [0, 1)

}  // namespace attnpress
