// Between a pattern's values and dense rows of the same type, for the products that are faster dense.
#pragma once

#include "operands.h"

namespace hf_topkast {

// α, (out, in): the values of A at their places, zeros elsewhere.
void expand(const Pattern& pattern, const Array& values, const Array& alpha, int threads);

// Reads `rows` rows of a dense gradient, (rows, in), from row `first` of the layer on, at the slots of B. Both are
// multiples of the blocks' height.
void gather(const Pattern& pattern, int64_t first, int64_t rows, const Array& dense, const Array& gradient,
            int threads);

}  // namespace hf_topkast
