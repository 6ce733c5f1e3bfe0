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

template <int N, class Column, class Value>
void multiply_row(const float* tile, const Column* columns, const Value* values, int64_t begin, int64_t end,
                  float initial, float* out) {
    constexpr int CHAINS = N < 4 ? 4 / N : 1;  // of dependent additions, enough to hide their latency
    Vec sums[CHAINS][N] = {};
    for (int n = 0; n < N; ++n) sums[0][n] = broadcast(initial);
    auto add = [&](int64_t p, Vec* chain) {
        const float* line = tile + int64_t(columns[p]) * (N * W);
        Vec weight = broadcast(to_float(values[p]));
        for (int n = 0; n < N; ++n) chain[n] += weight * load(line + n * W);
    };
    int64_t p = begin;
    for (; p + CHAINS <= end; p += CHAINS) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) add(p + c, sums[c]);
    }
    for (; p < end; ++p) add(p, sums[0]);
    for (int n = 0; n < N; ++n) {
        for (int c = 1; c < CHAINS; ++c) sums[0][n] += sums[c][n];
        store(out + n * W, sums[0][n]);
    }
}

template <class Column, class Value>
float dot_row(const float* x, const Column* columns, const Value* values, int64_t begin, int64_t end, int64_t ahead,
              float initial) {
    Vec sums[2] = {};
    int64_t p = begin;
    for (; p + 2 * W <= end; p += 2 * W) {
        __builtin_prefetch(values + p + ahead);
        __builtin_prefetch(values + p + W + ahead);
        __builtin_prefetch(columns + p + ahead);
        sums[0] += widen(values + p) * gather(x, columns + p);
        sums[1] += widen(values + p + W) * gather(x, columns + p + W);
    }
    sums[0] = fold<1>(sums[0] + sums[1]);
    float sum = initial + sums[0][0];
    for (; p < end; ++p) sum += to_float(values[p]) * x[columns[p]];
    return sum;
}

// Calls visit(columns, values) with the types that the arrays have.
template <class Visit>
INLINE void with_types(const Array& columns, const Array& values, Visit visit) {
    auto with_column = [&](auto* typed) {
        if (values.itemsize == 4)
            visit(typed, (const float*)values.address);
        else
            visit(typed, (const BFloat16*)values.address);
    };
    if (columns.itemsize == 2)
        with_column((const int16_t*)columns.address);
    else
        with_column((const int32_t*)columns.address);
}

template <int N>
void multiply_any_row(const float* tile, const Array& columns, const Array& values, int64_t begin, int64_t end,
                      float initial, float* out) {
    with_types(columns, values,
               [&](auto* c, auto* v) { multiply_row<N>(tile, c, v, begin, end, initial, out); });
}

float dot_any_row(const float* x, const Array& columns, const Array& values, int64_t begin, int64_t end, int64_t ahead,
                  float initial) {
    float result;
    with_types(columns, values, [&](auto* c, auto* v) { result = dot_row(x, c, v, begin, end, ahead, initial); });
    return result;
}

constexpr Kernels TABLE = {
    ISA_NAME,
    W,
    load_any,
    store_any,
    {multiply<1>, multiply<2>, multiply<4>, multiply<8>},
    {inner<1>, inner<2>, inner<4>, inner<8>},
    {multiply_any_row<1>, multiply_any_row<2>, multiply_any_row<4>, multiply_any_row<8>},
    dot_any_row,
};

}  // namespace
}  // namespace hf_topkast
