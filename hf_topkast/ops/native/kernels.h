// What each instruction set provides: work on one tile of tokens by one thread.
//
// A tile is feature-major: `features` lines of N · width floats, one for each of its tokens, so that one weight meets
// whole vectors of tokens. Tile sizes are N = 1, 2, 4, 8 vectors; tables are indexed by log2 N.
#pragma once

#include <cstdint>

#include "operands.h"

namespace hf_topkast {

constexpr int TILE_SIZES = 4;

struct Kernels {
    const char* name;
    int width;  // floats in a vector

    // Token-major memory (itemsize 4: fp32, 2: bf16) to a tile; tokens that are missing become zeros.
    void (*load_tile)(const void* from, int itemsize, int64_t stride, int64_t tokens, int64_t features,
                      int tile_tokens, float* tile);
    // A tile to token-major memory.
    void (*store_tile)(const float* tile, int tile_tokens, int64_t tokens, int64_t features, void* to, int itemsize,
                       int64_t stride);

    // out[r] += Σ values[p] · panel[offsets[p]] over the entries p of row r: starts[r] <= p < starts[r + 1].
    // `out` has one tile line per row; it starts from initial[r] where `initial` is given. Offsets count floats.
    void (*multiply[TILE_SIZES])(const float* panel, const int64_t* starts, const uint16_t* offsets,
                                 const float* values, int64_t rows, const float* initial, float* out);
    // sums[p] += <lines[r], panel[offsets[p]]>; the entries of a row are padded to a multiple of four.
    void (*inner[TILE_SIZES])(const float* panel, const int64_t* starts, const uint16_t* offsets, const float* lines,
                              int64_t rows, float* sums);

    // For few tokens, straight from a pattern's arrays (columns int16 or int32, values fp32 or bf16):
    // initial + Σ values[p] · tile[columns[p]] over begin <= p < end, of lines or, for one token, of numbers.
    void (*multiply_row[TILE_SIZES])(const float* tile, const Array& columns, const Array& values, int64_t begin,
                                     int64_t end, float initial, float* out);
    float (*dot_row)(const float* x, const Array& columns, const Array& values, int64_t begin, int64_t end,
                     int64_t ahead, float initial);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace hf_topkast
