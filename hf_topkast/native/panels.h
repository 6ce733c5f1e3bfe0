// The entries of a pattern in the order in which the kernels meet them: cut into panels of columns, so that the input
// lines that a panel holds stay in the innermost cache while all rows of a group go over it.
//
// Made anew by every product, like the packing of a dense one: it costs a few cycles per entry, against one vector
// operation per entry and 16 tokens, and makes α, αᵀ and B, blocks of any size, and every index and value type the
// same to the kernels.
#pragma once

#include <cstdint>
#include <memory>

#include "operands.h"

namespace hf_topkast {

enum class Entries { ACTIVE, ACTIVE_TRANSPOSED, STORED };

struct Grid {
    int64_t rows, columns;
    int strip;        // rows that share their entries' columns, and so the loads of input lines: 1, or 4 in blocks
    int column_bits;  // a panel has 2^column_bits columns
    int row_bits;     // a group has 2^row_bits rows, whose output lines stay in the second cache together

    int64_t panels() const { return ((columns - 1) >> column_bits) + 1; }
    int64_t groups() const { return ((rows - 1) >> row_bits) + 1; }
    int64_t first_row(int64_t group) const { return group << row_bits; }
    int64_t rows_of(int64_t group) const {
        int64_t left = rows - first_row(group), most = int64_t(1) << row_bits;
        return left < most ? left : most;
    }
    // A segment is the part of one strip in one panel. They are numbered by groups, then panels, then strips.
    int64_t first_segment(int64_t group, int64_t panel) const {
        return (first_row(group) * panels() + panel * rows_of(group)) / strip;
    }
    int64_t segment(int64_t row, int64_t panel) const {
        int64_t group = row >> row_bits;
        return first_segment(group, panel) + (row - first_row(group)) / strip;
    }
    int64_t segments() const { return rows / strip * panels(); }
};

struct Panels {
    Grid grid;
    std::unique_ptr<int64_t[]> starts;    // first entry of each segment, and the end of the last
    std::unique_ptr<uint16_t[]> offsets;  // of an entry's line in its panel, in floats
    std::unique_ptr<float[]> values;      // of ACTIVE and ACTIVE_TRANSPOSED: `strip` of each entry
    int64_t size() const { return starts[grid.segments()]; }
};

// How many rows can share an entry.
int strip_of(const Pattern& pattern, Entries which);

// `line` is the length of a tile line in floats; line · 2^column_bits must not pass 2¹⁶. The entries of STORED segments
// are padded to a multiple of four.
Panels make_panels(const Pattern& pattern, Entries which, const Array* values, int column_bits, int row_bits,
                   int64_t line, int threads);

// gradient[slot] = Σ of the `parts` sums of the slot's entry, in order; `stride` floats apart. For STORED panels.
void collect_sums(const Pattern& pattern, const Panels& panels, const float* sums, int parts, int64_t stride,
                  const Array& gradient, int threads);

}  // namespace hf_topkast
