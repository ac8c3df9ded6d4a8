// Target "avx512vnni": see isa_avx512vnni.h.
#include "isa_avx512vnni.h"

namespace attnpress {

void attention_avx512vnni(const Attention& a) { run<Avx512Vnni>(a); }

}  // namespace attnpress
