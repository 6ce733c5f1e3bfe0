// What ranks the blocks of a weight.
#pragma once

#include <cstdint>

namespace hf_topkast {

// L2 norms of the blocks of a weight, (rows / height, columns / width), summed in fp64.
void block_norms(const float* theta, int64_t rows, int64_t columns, int64_t height, int64_t width, float* norms,
                 int threads);

}  // namespace hf_topkast
