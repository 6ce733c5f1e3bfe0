// The largest of many numbers, exactly, without sorting or copying them all.
#pragma once

#include "operands.h"

namespace hf_topkast {

// Marks in `masks[j]`, bytes of (rows, columns), the `counts[j]` largest scores; among equal ones the lower index wins.
// Each row is compared with itself only and gets an equal share of the count, the first ones what is left over.
struct Marking {
    int64_t count;
    uint8_t* mask;
};

// `scores` are fp32, or (2 bytes) bf16 or fp16, without NaN; with `magnitudes` they rank without their signs.
void mark_largest(const Array& scores, bool magnitudes, int64_t rows, int64_t columns, const Marking* markings,
                  int sets, int threads);

}  // namespace hf_topkast
