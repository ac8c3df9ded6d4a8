#include "linear_passes.h"

namespace attnpress {

const Passes& passes_avx512() { return PASSES; }

}  // namespace attnpress
