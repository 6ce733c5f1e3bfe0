// The tensors of one masked product, as addresses.
#pragma once

#include <cstdint>

namespace hf_topkast {

// A dense array; the size of an item tells its type: fp32 (4) or bf16 (2), int16 (2), int32 (4) or int64 (8).
struct Array {
    uintptr_t address;
    int itemsize;

    void* at(int64_t index) const { return (char*)address + index * itemsize; }
    Array from(int64_t index) const { return {address + index * itemsize, itemsize}; }

    int64_t integer(int64_t index) const {
        if (itemsize == 2) return ((const int16_t*)address)[index];
        return itemsize == 4 ? ((const int32_t*)address)[index] : ((const int64_t*)address)[index];
    }
};

// `Pattern` of pattern.py: a CSR structure of blocks; its first `rows()` rows are those of A, the others those of B\A.
// Or a part of one, some of its rows, where the arrays of the whole are: slots and columns are read and written there.
struct Pattern {
    Array row_offsets, columns;
    int64_t out_features, in_features;
    int64_t height, width;  // of a block
    int64_t apart = 0;      // of a part: how many rows after one of A the same one of B\A comes

    int64_t rows() const { return out_features / height; }
    int64_t exploring(int64_t row) const { return row + (apart ? apart : rows()); }  // the row of B\A
    int64_t begin(int64_t row) const { return row_offsets.integer(row); }
    int64_t end(int64_t row) const { return row_offsets.integer(row + 1); }
    int64_t active() const { return (begin(rows()) - begin(0)) * height * width; }  // values of A
    int64_t stored() const {                                                        // and of B
        return active() + (begin(exploring(rows())) - begin(exploring(0))) * height * width;
    }

    // The rows of weights from `first` on, as many as `count`; both are multiples of the blocks' height.
    Pattern part(int64_t first, int64_t count) const {
        return {row_offsets.from(first / height), columns, count, in_features, height, width, exploring(0)};
    }
    // Inlined always: compiled for several CPUs, and the linker would keep any one of them.
    __attribute__((always_inline)) bool unstructured() const { return height == 1 && width == 1; }
};

}  // namespace hf_topkast
