// Which target runs: an ordered table, best first; ATTNPRESS_CPU_TARGET forces one by name.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "attention.h"

namespace attnpress {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// These builtins also ask the operating system whether it saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2");
}

#if defined(ATTN_AMX)
// The registers of AMX are so large that Linux hands them out to those who ask. Elsewhere nobody was there to try.
bool has_amx() {
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    static const bool granted = has_avx512vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & TILE) != 0 &&
                                (edx & INT8) != 0 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
#else
    return false;
#endif
}
#endif
#endif

std::string supported_names() {
    std::string names;
    for (const Target* target = targets(); target->name != nullptr; ++target) {
        if (target->supported()) names += (names.empty() ? "" : ", ") + std::string(target->name);
    }
    return names;
}

const Target& choose(const char* wanted) {
    for (const Target* target = targets(); target->name != nullptr; ++target) {
        if (wanted != nullptr && std::string(wanted) != target->name) continue;
        if (target->supported()) return *target;
        if (wanted != nullptr) {
            throw std::runtime_error(std::string("ATTNPRESS_CPU_TARGET=") + wanted +
                                     ": this processor does not support it; use one of " + supported_names());
        }
    }
    throw std::runtime_error(std::string("ATTNPRESS_CPU_TARGET=") + wanted + ": no such target; use one of " + supported_names());
}

}  // namespace

const Target* targets() {
    static const Target table[] = {
#if defined(__x86_64__)
#if defined(ATTN_AMX)
        {"amx", attention_amx, has_amx},
#endif
        {"avx512vnni", attention_avx512vnni, has_avx512vnni},
        {"avx2", attention_avx2, has_avx2},
#endif
        {"scalar", attention_scalar, always},
        {nullptr, nullptr, nullptr},
    };
    return table;
}

// Read at every call, so that one process can compare targets.
const Target& active_target() {
    const char* wanted = std::getenv("ATTNPRESS_CPU_TARGET");
    return choose(wanted == nullptr || *wanted == '\0' ? nullptr : wanted);
}

}  // namespace attnpress
