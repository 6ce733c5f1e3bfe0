#include "scratch.h"

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

}  // namespace hf_topkast
