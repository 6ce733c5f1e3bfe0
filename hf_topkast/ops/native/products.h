// The three masked products, token-major in and out, on all threads.
#pragma once

#include "kernels.h"
#include "operands.h"

namespace hf_topkast {

struct Schedule {
    int tile;              // log2 of the vectors of a tile line
    int64_t column_block;  // columns of a block, a power of two
    int64_t row_group;
    int threads;
};

// y = x·αᵀ + bias: (tokens, in) → (tokens, out). `bias`, fp32, may be null.
void forward(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, Array x, int64_t tokens,
             Array values, const float* bias, Array y);

// dX = dY·α: (tokens, out) → (tokens, in).
void grad_input(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, Array dy, int64_t tokens,
                Array values, Array dx);

// dW|B = dYᵀX at the slots of B.
void grad_values(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, Array dy, Array x,
                 int64_t tokens, Array gradient);

}  // namespace hf_topkast
