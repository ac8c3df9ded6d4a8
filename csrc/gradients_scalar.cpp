#include "gradients_rows.h"

namespace attnpress {

void gradients_scalar(const HeadGradients& h) { add_all_gradients(h); }

}  // namespace attnpress
