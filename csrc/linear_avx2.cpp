#include "linear_passes.h"

namespace attnpress {

const Passes& passes_avx2() { return PASSES; }

}  // namespace attnpress
