// The tensors of one masked product, as addresses.
#pragma once

#include <cstdint>

namespace hf_topkast {

// A dense array; the size of an item tells its type: fp32 (4) or bf16 (2), int16 (2), int32 (4) or int64 (8).
struct Array {
    uintptr_t address;
    int itemsize;

    void* at(int64_t index) const { return (char*)address + index * itemsize; }

    int64_t integer(int64_t index) const {
        if (itemsize == 2) return ((const int16_t*)address)[index];
        return itemsize == 4 ? ((const int32_t*)address)[index] : ((const int64_t*)address)[index];
    }
};

// `Pattern` of pattern.py: a CSR structure of blocks; its first `rows()` rows are those of A, the others those of B\A.
struct Pattern {
    Array row_offsets, columns;
    int64_t out_features, in_features;
    int64_t height, width;  // of a block

    int64_t rows() const { return out_features / height; }
    int64_t begin(int64_t row) const { return row_offsets.integer(row); }
    int64_t end(int64_t row) const { return row_offsets.integer(row + 1); }
    // Inlined always: compiled for several CPUs, and the linker would keep any one of them.
    __attribute__((always_inline)) bool unstructured() const { return height == 1 && width == 1; }
};

}  // namespace hf_topkast
