// The three masked products, token-major in and out, on all threads.
#pragma once

#include "kernels.h"
#include "operands.h"

namespace hf_topkast {

struct Schedule {
    int tile;         // log2 of the vectors of a tile line
    int column_bits;  // log2 of the columns of a panel
    int row_bits;     // log2 of the rows of a group, whose output lines are made together; at least 2
    int threads;
};

// y = x·αᵀ + bias: (tokens, in) → (tokens, out). `bias`, fp32, may be null.
void forward(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
             const float* bias, int64_t tokens, const Array& x, const Array& y);

// dX = dY·α: (tokens, out) → (tokens, in).
void grad_input(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                int64_t tokens, const Array& dy, const Array& dx);

// dW|B = dYᵀX at the slots of B.
void grad_values(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, int64_t tokens,
                 const Array& dy, const Array& x, const Array& gradient);

}  // namespace hf_topkast
