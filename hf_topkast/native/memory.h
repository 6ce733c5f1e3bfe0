// Where the kernels' time would go without care: the first touch of a page costs more than the work on it.
#pragma once

#include <omp.h>

#include <cstdint>

#include "operands.h"

namespace hf_topkast {

// Memory for the threads of a parallel region, a share of so many floats each, aligned to cache lines. Made before the
// region, out of which no exception may come. It lives from call to call; what an earlier call put there is lost.
class Scratch {
   public:
    Scratch(int threads, int64_t floats);
    float* own() const { return first + omp_get_thread_num() * share; }  // of the thread that asks

   private:
    int64_t share;
    float* first;
};

// Asks for large pages under a large new output: its pages are touched for the first time by the product, and on a
// 3072 × 768 layer small ones would cost as much as the arithmetic.
void expect_large_pages(const Array& output, int64_t size);

}  // namespace hf_topkast
