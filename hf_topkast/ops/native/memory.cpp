#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

namespace hf_topkast {

float* scratch(int64_t floats) {
    struct Buffer {
        float* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < floats) {
        std::free(buffer.data);
        buffer.size = 0;
        buffer.data = (float*)std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = floats;
    }
    return buffer.data;
}

void expect_large_pages(const Array& output, int64_t size) {
#if defined(__linux__)
    constexpr uintptr_t LARGE = uintptr_t(1) << 21;
    uintptr_t first = (output.address + LARGE - 1) / LARGE * LARGE;
    uintptr_t last = (output.address + size * output.itemsize) / LARGE * LARGE;
    if (first + 4 * LARGE <= last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace hf_topkast
