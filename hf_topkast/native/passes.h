// Sets in their forms: masks, bytes of 0 and 1, (out, in); CSR structures; bits. In one pass over the layer each.
#pragma once

#include "operands.h"

namespace hf_topkast {

// Where the rows of A and then those of B\A begin, 2·rows + 1 integers. False if a mask is not made of whole blocks.
bool count_rows(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int threads);

// The columns of A and then those of B\A, given where their rows begin.
void fill_columns(const uint8_t* active, const uint8_t* backward, const Pattern& pattern, int threads);

// Whether the structure stays inside a layer of its size: one that was read from a file may not.
bool is_sound(const Pattern& pattern, int64_t blocks);

// The mask of A, or of B with `all`.
void mark_members(const Pattern& pattern, bool all, uint8_t* mask, int threads);

// |A|, |B|, and how many members of A are not in B.
struct SetSizes {
    int64_t active, backward, torn;
};
SetSizes set_sizes(const uint8_t* active, const uint8_t* backward, int64_t numel, int threads);

// Bit i of byte j is element 8·j + i.
void pack_bits(const uint8_t* mask, int64_t numel, uint8_t* packed, int threads);
void unpack_bits(const uint8_t* packed, int64_t numel, uint8_t* mask, int threads);

// `set_digest` of storage/.
int64_t set_digest(const Pattern& pattern, int threads);

}  // namespace hf_topkast
