#include "isa.h"

#include <stdexcept>

namespace hf_topkast {

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) usable.push_back(avx512_kernels());
    if (avx2) usable.push_back(avx2_kernels());
#endif
    usable.push_back(portable_kernels());
    return usable;
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* kernels : usable_kernels())
        if (kernels->name == name) return *kernels;
    throw std::invalid_argument("this CPU cannot run the instruction set '" + name + "'");
}

}  // namespace hf_topkast
