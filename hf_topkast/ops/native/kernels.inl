// The kernels of kernels.h for vectors of VECTOR_WIDTH floats; included once by each instruction set's unit.
#include "kernels.h"
#include "vector.h"

namespace hf_topkast {
namespace {

template <class T>
void load_square(const T* from, int64_t stride, int64_t tokens, int64_t features, Vec* rows) {
    T partial[W] = {};
    for (int64_t t = 0; t < W; ++t) {
        if (t >= tokens) {
            rows[t] = Vec{};
        } else if (features >= W) {
            rows[t] = widen(from + t * stride);
        } else {
            for (int64_t f = 0; f < features; ++f) partial[f] = from[t * stride + f];
            rows[t] = widen(partial);
        }
    }
}

template <class T>
void load_tile(const T* from, int64_t stride, int64_t tokens, int64_t features, int tile_tokens, float* tile) {
    Vec rows[W];
    for (int64_t t = 0; t < tile_tokens; t += W)
        for (int64_t f = 0; f < features; f += W) {
            const T* corner = from + t * stride + f;
            if (t + W <= tokens && f + W <= features) {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) rows[j] = widen(corner + j * stride);
            } else {
                load_square(corner, stride, tokens - t, features - f, rows);
            }
            transpose(rows);
            float* to = tile + f * tile_tokens + t;
            if (f + W <= features) {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) store(to + j * tile_tokens, rows[j]);
            } else {
                for (int64_t j = 0; j < features - f; ++j) store(to + j * tile_tokens, rows[j]);
            }
        }
}

template <class T>
void store_tile(const float* tile, int tile_tokens, int64_t tokens, int64_t features, T* to, int64_t stride) {
    Vec rows[W];
    for (int64_t t = 0; t < tokens; t += W)
        for (int64_t f = 0; f < features; f += W) {
            const float* from = tile + f * tile_tokens + t;
            T* corner = to + t * stride + f;
            if (t + W <= tokens && f + W <= features) {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) rows[j] = load(from + j * tile_tokens);
                transpose(rows);
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) narrow(corner + j * stride, rows[j]);
                continue;
            }
            for (int64_t j = 0; j < W; ++j) rows[j] = f + j < features ? load(from + j * tile_tokens) : Vec{};
            transpose(rows);
            for (int64_t j = 0; j < W && t + j < tokens; ++j) {
                T line[W];
                narrow(line, rows[j]);
                for (int64_t i = 0; i < W && f + i < features; ++i) corner[j * stride + i] = line[i];
            }
        }
}

void load_any(const void* from, int itemsize, int64_t stride, int64_t tokens, int64_t features, int tile_tokens,
              float* tile) {
    if (itemsize == 4)
        load_tile((const float*)from, stride, tokens, features, tile_tokens, tile);
    else
        load_tile((const BFloat16*)from, stride, tokens, features, tile_tokens, tile);
}

void store_any(const float* tile, int tile_tokens, int64_t tokens, int64_t features, void* to, int itemsize,
               int64_t stride) {
    if (itemsize == 4)
        store_tile(tile, tile_tokens, tokens, features, (float*)to, stride);
    else
        store_tile(tile, tile_tokens, tokens, features, (BFloat16*)to, stride);
}

template <int N>
void multiply(const float* panel, const int64_t* starts, const uint16_t* offsets, const float* values, int64_t rows,
              const float* initial, float* out) {
    for (int64_t r = 0; r < rows; ++r, out += N * W) {
        Vec sums[N];
        for (int n = 0; n < N; ++n) sums[n] = initial ? broadcast(initial[r]) : load(out + n * W);
        for (int64_t p = starts[r]; p < starts[r + 1]; ++p) {
            const float* line = panel + offsets[p];
            Vec weight = broadcast(values[p]);
            for (int n = 0; n < N; ++n) sums[n] += weight * load(line + n * W);
        }
        for (int n = 0; n < N; ++n) store(out + n * W, sums[n]);
    }
}

// Lane i: Σ over the lanes of `line` that agree with i in the bits of 2H … W/2 … of the product with entry i & (2H - 1).
// The tree of additions is walked depth first, so that only log2 W partial sums live at once.
template <int N, int H>
INLINE Vec inner_tree(const Vec* line, const float* panel, const uint16_t* offsets) {
    if constexpr (H == 0) {
        const float* other = panel + *offsets;
        Vec sum = line[0] * load(other);
        for (int n = 1; n < N; ++n) sum += line[n] * load(other + n * W);
        return sum;
    } else {
        Vec first = inner_tree<N, H / 2>(line, panel, offsets);
        return add_pairs<H>(first, inner_tree<N, H / 2>(line, panel, offsets + H));
    }
}

template <int H>
INLINE Vec fold(Vec x) {  // adds the lanes that differ in bit H and above
    if constexpr (H < W) return fold<2 * H>(x + across<H>(x, x, LANES));
    return x;
}

template <int N>
void inner(const float* panel, const int64_t* starts, const uint16_t* offsets, const float* lines, int64_t rows,
           float* sums) {
    for (int64_t r = 0; r < rows; ++r, lines += N * W) {
        Vec line[N];
        for (int n = 0; n < N; ++n) line[n] = load(lines + n * W);
        int64_t p = starts[r], end = starts[r + 1];
        for (; p + W <= end; p += W)
            store(sums + p, load(sums + p) + inner_tree<N, W / 2>(line, panel, offsets + p));
        for (; p < end; p += 4) {
            Vec four = fold<4>(inner_tree<N, 2>(line, panel, offsets + p));
            store(sums + p, load_as<Quad>(sums + p) + __builtin_shufflevector(four, four, 0, 1, 2, 3));
        }
    }
}

constexpr Kernels TABLE = {
    ISA_NAME, W, load_any, store_any, {multiply<1>, multiply<2>, multiply<4>, multiply<8>},
    {inner<1>, inner<2>, inner<4>, inner<8>},
};

}  // namespace
}  // namespace hf_topkast
