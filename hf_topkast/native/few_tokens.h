// The masked products of so few tokens that cutting the pattern into panels would not pay: they walk it as it is.
// At most one tile of tokens; unstructured patterns only, but for `forward_dots`.
#pragma once

#include "products.h"

namespace hf_topkast {

void forward_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                 const float* bias, int64_t tokens, const Array& x, const Array& y);

// For a few single tokens, where gathering a row's inputs beats making a tile of them. fp32 in and out, any blocks.
void forward_dots(const Kernels& kernels, int threads, const Pattern& pattern, const Array& values,
                  const float* bias, int64_t tokens, const float* x, float* y);

void grad_input_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                    int64_t tokens, const Array& dy, const Array& dx);

void grad_values_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, int64_t tokens,
                     const Array& dy, const Array& x, const Array& gradient);

}  // namespace hf_topkast
