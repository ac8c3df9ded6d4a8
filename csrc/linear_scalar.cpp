#include "linear_passes.h"

namespace attnpress {

const Passes& passes_scalar() { return PASSES; }

}  // namespace attnpress
