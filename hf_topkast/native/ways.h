// The masked products of any number of tokens: by which kernels, with tiles of which size, on how many threads.
#pragma once

#include <vector>

#include "products.h"

namespace hf_topkast {

constexpr int64_t GRAIN = 1 << 15;  // multiply-adds, or numbers moved, worth waking another thread for

// How many threads so much work is worth.
int threads_for(int64_t work, int most);

// As `forward`, `grad_input` and `grad_values` of products.h, on `threads` threads at most.
void masked_forward(const Kernels& kernels, int threads, const Pattern& pattern, const Array& values, const float* bias,
                 int64_t tokens, const Array& x, const Array& y);

void masked_grad_input(const Kernels& kernels, int threads, const Pattern& pattern, const Array& values, int64_t tokens,
                    const Array& dy, const Array& dx);

void masked_grad_values(const Kernels& kernels, int threads, const Pattern& pattern, int64_t tokens, const Array& dy,
                     const Array& x, const Array& gradient);

// A forward pass of a few tokens, whose inputs each row gathers.
struct Dots {
    Pattern pattern;
    const float* bias;  // or null
    int64_t tokens;     // at most DOT_TOKENS
    Array x, y;
};

constexpr int64_t DOT_TOKENS = 3;

// Several of them, of one set of values, in one parallel region.
void forward_dots(const Kernels& kernels, int threads, const Array& values, const std::vector<Dots>& products);

}  // namespace hf_topkast
