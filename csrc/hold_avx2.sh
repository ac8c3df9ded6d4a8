#!/usr/bin/env bash
# Runs a command as on a processor that ends at AVX2, whatever this one can do, and says in one line how:
#
#     csrc/hold_avx2.sh COMMAND [ARGUMENT...]
#
# By hold_avx2.c, which no library can look behind, where there is CPUID faulting and a C compiler. Elsewhere by the variables
# that our kernel, oneDNN and torch listen to; ONNX Runtime has none.
set -euo pipefail
csrc=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
library=$csrc/../build/hold_avx2.so

built() {
    [ "$library" -nt "$csrc/hold_avx2.c" ] && return
    mkdir -p "${library%/*}" &&
        "${CC:-cc}" -std=gnu11 -O2 -fPIC -shared -Wall -Wextra -o "$library.$$" "$csrc/hold_avx2.c" -ldl && mv "$library.$$" "$library"
}

say() { echo "held to AVX2: $1" >&2; }

if [ "$(uname -sm)" = "Linux x86_64" ] && ! grep -qwE 'avx512f|avx_vnni' /proc/cpuinfo; then
    say "nothing to do, this processor has no more"
elif [ "$(uname -sm)" = "Linux x86_64" ] && built && LD_PRELOAD=$library /bin/true 2> /dev/null; then
    say "CPUID answers so to every library"
    export LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD}
elif [ "$(uname -m)" = x86_64 ]; then
    say "by variables alone (no CPUID faulting here), which ONNX Runtime does not know"
    export ATTNPRESS_CPU_TARGET=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
else
    say "not possible, since this is no x86-64 processor; the command runs as it is"
fi
exec "$@"
