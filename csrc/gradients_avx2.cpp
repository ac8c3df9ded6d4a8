#include "gradients_rows.h"

namespace attnpress {

void gradients_avx2(const HeadGradients& h) { add_all_gradients(h); }

}  // namespace attnpress
