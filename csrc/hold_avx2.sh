#!/usr/bin/env bash
# Runs a command as on a processor that ends at AVX2, whatever this one can do, and says in one line how:
#
#     csrc/hold_avx2.sh COMMAND [ARGUMENT...]
#     HOLD_TO=avx512vnni csrc/hold_avx2.sh COMMAND [ARGUMENT...]      # as on one that ends at AVX-512 VNNI, without AMX
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

case ${HOLD_TO:=avx2} in
    avx2) name=AVX2 more='avx512f|avx_vnni' capability=avx2 isa=AVX2 ;;
    avx512vnni) name='AVX-512 VNNI' more='amx_tile|avx512_bf16' capability=avx512 isa=AVX512_CORE_VNNI ;;
    *) echo "hold_avx2: HOLD_TO is avx2 or avx512vnni, found $HOLD_TO" >&2 && exit 2 ;;
esac
export HOLD_TO

say() { echo "held to $name: $1" >&2; }

if [ "$HOLD_TO" = avx512vnni ] && ! grep -qsw avx512_vnni /proc/cpuinfo; then
    echo "hold_avx2: HOLD_TO=avx512vnni needs a processor with AVX-512 VNNI, and Linux" >&2 && exit 2
fi
if [ "$(uname -sm)" = "Linux x86_64" ] && ! grep -qwE "$more" /proc/cpuinfo; then
    say "nothing to do, this processor has no more"
elif [ "$(uname -sm)" = "Linux x86_64" ] && built && LD_PRELOAD=$library /bin/true 2> /dev/null; then
    say "CPUID answers so to every library"
    export LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD}
elif [ "$(uname -m)" = x86_64 ]; then
    say "by variables alone (no CPUID faulting here), which ONNX Runtime does not know"
    export ATTNPRESS_CPU_TARGET=$HOLD_TO ONEDNN_MAX_CPU_ISA=$isa ATEN_CPU_CAPABILITY=$capability MKL_ENABLE_INSTRUCTIONS=${isa%_CORE*}
else
    say "not possible, since this is no x86-64 processor; the command runs as it is"
fi
exec "$@"
