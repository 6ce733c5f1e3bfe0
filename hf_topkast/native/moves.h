// What moves when a layer gets other sets, in one pass over the layer each. Masks are bytes of 0 and 1, (out, in).
#pragma once

#include "operands.h"

namespace hf_topkast {

// θ of the values at their places and, in ascending order, the reservoir everywhere else; without one, zeros.
void assemble(const Pattern& pattern, const Array& values, const Array& reservoir, const Array& theta, int threads);

// The numbers that are not marked, in their order; `marked` are not among them.
void leave_out(const Array& numbers, const uint8_t* mask, int64_t numel, int64_t marked, const Array& rest,
               int threads);

// θ from one pair of sets to another, of which `backward` is the larger as a mask: the slot in `before` of each slot, or
// -1, the values and, if it has an address, the reservoir. Both patterns have the same blocks.
void rearrange(const Pattern& before, const Pattern& now, const Array& theta, const uint8_t* backward,
               const Array& sources, const Array& values, const Array& reservoir, int threads);

// How many sources are among the first `former` slots.
int64_t count_from(const Array& sources, int64_t count, int64_t former);

// The numbers at their sources, and where there is none (-1) `fresh`: one for all with `step` 0, one a slot with 1. False
// if a source lies behind the `former` numbers.
bool carry(const Array& numbers, int64_t former, const Array& sources, int64_t count, const Array& fresh, int step,
           const Array& moved, int threads);

}  // namespace hf_topkast
