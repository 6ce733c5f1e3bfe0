// Where the kernels' time would go without care: the first touch of a page costs more than the work on it.
#pragma once

#include <cstdint>

#include "operands.h"

namespace hf_topkast {

// Memory of this thread that lives from call to call: at least so many floats, aligned to a cache line. What an earlier
// call got is lost.
float* scratch(int64_t floats);

// Asks for large pages under a large new output: its pages are touched for the first time by the product, and on a
// 3072 × 768 layer small ones would cost as much as the arithmetic.
void expect_large_pages(const Array& output, int64_t size);

}  // namespace hf_topkast
