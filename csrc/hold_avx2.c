// Makes every library of a process believe that its processor ends at AVX2 (Haswell to Zen 2): no AVX-512, no VNNI, no AMX.
//
//     LD_PRELOAD=build/hold_avx2.so COMMAND      (csrc/hold_avx2.sh COMMAND builds it first, and knows what to do without)
//
// With HOLD_TO=avx512vnni, that it ends there (Ice Lake): no AMX, and no 16-bit floats or sums that came with it.
//
// A library learns what a processor can do from the instruction CPUID, and each has a variable of its own, or none, to make
// it forget. But Intel processors since Ivy Bridge, and AMD's newer ones, can make CPUID itself fault ("cpuid_fault" in
// /proc/cpuinfo). Linux switches that on for a thread and for all that it starts, and sends SIGSEGV at each CPUID; we answer
// in its place, with bits cleared. All other instructions run at full speed, so times are those of such a processor too.
//
// Faults of another kind go where they went before: sigaction and signal are stood in for, and a handler of SIGSEGV that the
// program installs (Python's faulthandler) is called by ours. exec switches faulting off; LD_PRELOAD, inherited, switches it on.
// What remains: a thread that blocks SIGSEGV and then asks CPUID dies, and glibc chose its own memcpy before we came.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

typedef int (*SetAction)(int, const struct sigaction *, struct sigaction *);
typedef sighandler_t (*SetHandler)(int, sighandler_t);

static int keeps_vnni;           // HOLD_TO=avx512vnni
static struct sigaction theirs;  // what the program wants done about SIGSEGV; at first, the default

static int let_cpuid_run(unsigned long yes) {
    const int ARCH_SET_CPUID = 0x1012;
    return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes);
}

static int set_action(int number, const struct sigaction *action, struct sigaction *before) {
    static SetAction real;
    if (real == NULL) real = (SetAction)dlsym(RTLD_NEXT, "sigaction");
    return real(number, action, before);
}

static uint32_t bit(int n) { return (uint32_t)1 << n; }

// What is newer than AVX-512 VNNI, in Intel's numbering of leaves.
static void forget_amx(uint32_t leaf, uint32_t part, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d) {
    if (leaf == 7 && part == 0) {
        *d &= ~(bit(22) | bit(23) | bit(24) | bit(25));  // AMX-BF16 FP16 AMX-TILE AMX-INT8
    } else if (leaf == 7 && part == 1) {
        *a &= ~(bit(0) | bit(1) | bit(2) | bit(4) | bit(5) | bit(21) | bit(23));  // SHA512 SM3 SM4 AVX-VNNI BF16 AMX-FP16 AVX-IFMA
        *d &= ~(bit(4) | bit(5) | bit(8) | bit(10) | bit(19) | bit(21));  // AVX-VNNI-INT8 NE-CONVERT AMX-COMPLEX AVX-VNNI-INT16 AVX10 APX
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {  // the tiles of AMX, and AVX10
        *a = *b = *c = *d = 0;
    }
}

// What else is newer than AVX2; all of it is in one leaf.
static void forget_avx512(uint32_t leaf, uint32_t part, uint32_t *b, uint32_t *c, uint32_t *d) {
    if (leaf != 7 || part != 0) return;
    *b &= ~(bit(16) | bit(17) | bit(21) | bit(26) | bit(27) | bit(28) | bit(30) | bit(31));  // AVX-512 F DQ IFMA PF ER CD BW VL
    *c &= ~(bit(1) | bit(6) | bit(8) | bit(9) | bit(10) | bit(11) | bit(12) | bit(14));  // VBMI VBMI2 GFNI VAES VPCLMULQDQ VNNI BITALG VPOPCNTDQ
    *d &= ~(bit(2) | bit(3) | bit(8));  // 4VNNIW 4FMAPS VP2INTERSECT
}

// A general protection fault at the bytes of CPUID; only then is what the instruction pointer points to sure to be readable.
static int is_cpuid(const siginfo_t *info, const greg_t *registers) {
    return info->si_code == SI_KERNEL && memcmp((const void *)registers[REG_RIP], "\x0f\xa2", 2) == 0;
}

static void pass_on(int number, siginfo_t *info, void *context) {
    const struct sigaction asked = theirs;
    if ((asked.sa_flags & SA_RESETHAND) != 0) memset(&theirs, 0, sizeof theirs);
    if ((asked.sa_flags & SA_SIGINFO) != 0) {
        asked.sa_sigaction(number, info, context);
    } else if (asked.sa_handler != SIG_DFL && asked.sa_handler != SIG_IGN) {
        asked.sa_handler(number);
    } else if (asked.sa_handler == SIG_DFL || info->si_code > 0) {  // a real fault cannot be ignored
        const struct sigaction dead = {.sa_handler = SIG_DFL};
        set_action(number, &dead, NULL);
        if (info->si_code <= 0) raise(number);  // sent by somebody: no instruction will fault again by itself
    }
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (!is_cpuid(info, registers)) {
        pass_on(number, info, context);
        return;
    }
    const uint32_t leaf = (uint32_t)registers[REG_RAX], part = (uint32_t)registers[REG_RCX];
    uint32_t a, b, c, d;
    let_cpuid_run(1);
    __cpuid_count(leaf, part, a, b, c, d);
    let_cpuid_run(0);
    forget_amx(leaf, part, &a, &b, &c, &d);
    if (!keeps_vnni) forget_avx512(leaf, part, &b, &c, &d);
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
    if (number != SIGSEGV) return set_action(number, action, before);
    const struct sigaction last = theirs;
    if (action != NULL) theirs = *action;
    if (before != NULL) *before = last;
    return 0;
}

sighandler_t signal(int number, sighandler_t wanted) {
    if (number != SIGSEGV) return ((SetHandler)dlsym(RTLD_NEXT, "signal"))(number, wanted);
    const sighandler_t last = theirs.sa_handler;
    memset(&theirs, 0, sizeof theirs);
    theirs.sa_handler = wanted;
    theirs.sa_flags = SA_RESTART;
    return last;
}

// Rather no run than one on another processor than was asked for.
__attribute__((constructor)) static void hold(void) {
    const char *last = getenv("HOLD_TO");
    keeps_vnni = last != NULL && strcmp(last, "avx512vnni") == 0;
    const struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    set_action(SIGSEGV, &ours, NULL);
    if (let_cpuid_run(0) == 0) return;
    fputs("hold_avx2: this processor, or this kernel, cannot make CPUID fault\n", stderr);
    _exit(1);
}
