// Which target runs: an ordered table, best first; ATTNPRESS_CPU_TARGET forces one by name.
#include <cstdlib>
#include <stdexcept>
#include <string>

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
