// What each instruction set provides: work on one tile of tokens by one thread.
//
// A tile is feature-major: `features` lines of N · width floats, one for each of its tokens, so that one weight meets
// whole vectors of tokens. Tile sizes are N = 1, 2, 4, 8 vectors; tables are indexed by log2 N. Rows come in strips, of
// one row, or of four that share their entries; the first index of a table says which.
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

    // out[r] += Σ values[p, r] · panel[offsets[p]] over the entries p of strip s: starts[s] <= p < starts[s + 1].
    // `out` has one tile line per row; it starts from initial[r] where `initial` is given. Offsets count floats.
    void (*multiply[2][TILE_SIZES])(const float* panel, const int64_t* starts, const uint16_t* offsets,
                                    const float* values, int64_t strips, const float* initial, float* out);
    // sums[p, r] += <lines[r], panel[offsets[p]]>; the entries of a strip are padded to a multiple of four.
    void (*inner[2][TILE_SIZES])(const float* panel, const int64_t* starts, const uint16_t* offsets,
                                 const float* lines, int64_t strips, float* sums);

    // For few tokens, one row straight from a pattern's arrays (columns int16 or int32, values and gradients fp32 or
    // bf16), over begin <= p < end: out = initial + Σ values[p] · tile[columns[p]];
    void (*multiply_row[TILE_SIZES])(const float* tile, const Array& columns, const Array& values, int64_t begin,
                                     int64_t end, float initial, float* out);
    // tile[columns[p]] += values[p] · line;
    void (*scatter_row[TILE_SIZES])(float* tile, const Array& columns, const Array& values, int64_t begin, int64_t end,
                                    const float* line);
    // gradient[p] = <line, tile[columns[p]]>;
    void (*inner_row[TILE_SIZES])(const float* tile, const Array& columns, int64_t begin, int64_t end,
                                  const float* line, const Array& gradient);
    // and for single tokens, token-major, rows first <= r < last of blocks: y = x·αᵀ + bias, which may be null.
    void (*dot_rows)(const float* x, int64_t tokens, const Pattern& pattern, const Array& values, const float* bias,
                     int64_t first, int64_t last, float* y);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace hf_topkast
