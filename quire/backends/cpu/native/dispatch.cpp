// Compiled for the baseline, and the only place that asks the CPU what it can do.
#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace quire {
namespace {

#if defined(QUIRE_X86_KERNELS)
const Kernels& avx512vnni_kernels() {
    static const Kernels kernels = [] {
        Kernels k = avx512::kernels;
        k.name = "avx512vnni";
        k.linear_quantized = avx512vnni::linear_quantized;
        k.int8_loop = avx512vnni::int8_loop;
        return k;
    }();
    return kernels;
}
const Kernels& avx512bf16_kernels() {
    static const Kernels kernels = [] {
        Kernels k = avx512vnni_kernels();
        k.name = "avx512bf16";
        k.linear = avx512bf16::linear;
        k.bf16_loop = avx512bf16::bf16_loop;
        return k;
    }();
    return kernels;
}
#endif

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> all;
#if defined(QUIRE_X86_KERNELS)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(QUIRE_EMULATE_AVX512)
    if (v3) all = {&avx2::kernels, &avx512bf16_kernels(), &avx512vnni_kernels(), &avx512::kernels};   // never chosen but by name
#else
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512vnni")) {
            // Zen 4 does twice as many products of bfloat16 a second as of float32. Sapphire and Emerald Rapids, which do two of float32 at
            // a time, seem to do no more of them: there rounding would gain nothing, and is left to who asks for it by name.
            all.push_back(&avx512vnni_kernels());
            if (__builtin_cpu_supports("avx512bf16")) all.insert(__builtin_cpu_is("amd") ? all.begin() : all.end(), &avx512bf16_kernels());
        }
        all.push_back(&avx512::kernels);
    }
    if (v3) all.push_back(&avx2::kernels);
#endif
#endif
    all.push_back(&portable::kernels);
    return all;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
    const Kernels* kernels = active.load(std::memory_order_relaxed);
    if (!kernels) active.store(kernels = supported().front());
    return *kernels;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
    return names;
}

void select_isa(const std::string& name) {
    std::string available;
    for (const Kernels* kernels : supported()) {
        if (name == kernels->name) return active.store(kernels);
        available += (available.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine: choose one of " + available);
}

}  // namespace quire
