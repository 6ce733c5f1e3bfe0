#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

namespace hf_topkast {

Scratch::Scratch(int threads, int64_t floats) {
    constexpr int64_t LINE = 64 / sizeof(float);
    struct Buffer {
        float* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    share = (floats + LINE - 1) / LINE * LINE;
    if (buffer.size < threads * share) {
        std::free(buffer.data);
        buffer.size = 0;
        buffer.data = (float*)std::aligned_alloc(64, threads * share * sizeof(float));
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = threads * share;
    }
    first = buffer.data;
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
