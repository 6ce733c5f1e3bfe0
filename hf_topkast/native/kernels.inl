// The kernels of kernels.h for vectors of VECTOR_WIDTH floats; included once by each instruction set's unit.
#include "dots.inl"
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

template <int N, int STRIP>
void multiply(const float* panel, const int64_t* starts, const uint16_t* offsets, const float* values, int64_t strips,
              const float* initial, float* out) {
    for (int64_t s = 0; s < strips; ++s, out += STRIP * N * W) {
        Vec sums[STRIP][N];
        for (int r = 0; r < STRIP; ++r)
            for (int n = 0; n < N; ++n)
                sums[r][n] = initial ? broadcast(initial[s * STRIP + r]) : load(out + (r * N + n) * W);
        for (int64_t p = starts[s]; p < starts[s + 1]; ++p) {
            const float* line = panel + offsets[p];
            for (int r = 0; r < STRIP; ++r) {
                Vec weight = broadcast(values[p * STRIP + r]);
                for (int n = 0; n < N; ++n) sums[r][n] += weight * load(line + n * W);
            }
        }
        for (int r = 0; r < STRIP; ++r)
            for (int n = 0; n < N; ++n) store(out + (r * N + n) * W, sums[r][n]);
    }
}

// Lane i: Σ over the lanes of vector i & (2H - 1) that agree with i in the bits of 2H … W/2. With H = W/2, the sum of
// vector i. The tree is walked depth first, so that where `vector` makes them only log2 W partial sums live at once.
template <int H, class Vector>
INLINE Vec sum_lanes(Vector vector, int first = 0) {
    if constexpr (H == 0) {
        return vector(first);
    } else {
        Vec left = sum_lanes<H / 2>(vector, first);
        return add_pairs<H>(left, sum_lanes<H / 2>(vector, first + H));
    }
}

template <int N>
INLINE Vec product(const Vec* line, const float* other) {
    Vec sum = line[0] * load(other);
    for (int n = 1; n < N; ++n) sum += line[n] * load(other + n * W);
    return sum;
}

template <int N>
void inner(const float* panel, const int64_t* starts, const uint16_t* offsets, const float* lines, int64_t rows,
           float* sums) {
    for (int64_t r = 0; r < rows; ++r, lines += N * W) {
        Vec line[N];
        for (int n = 0; n < N; ++n) line[n] = load(lines + n * W);
        int64_t p = starts[r], end = starts[r + 1];
        auto entry = [&](int i) INLINE_LAMBDA { return product<N>(line, panel + offsets[p + i]); };
        for (; p + W <= end; p += W) store(sums + p, load(sums + p) + sum_lanes<W / 2>(entry));
        for (; p < end; p += 4) {
            Vec four = fold<4>(sum_lanes<2>(entry));
            store(sums + p, load_as<Quad>(sums + p) + __builtin_shufflevector(four, four, 0, 1, 2, 3));
        }
    }
}

// As many entries at a time as leave their products with the four rows in registers, so that a load serves several.
template <int N>
void inner_strips(const float* panel, const int64_t* starts, const uint16_t* offsets, const float* lines,
                  int64_t strips, float* sums) {
    constexpr int ENTRIES = W == 16 ? 4 : 2;
    for (int64_t s = 0; s < strips; ++s, lines += 4 * N * W)
        for (int64_t p = starts[s]; p < starts[s + 1]; p += ENTRIES) {
            Vec products[ENTRIES * 4] = {};
            for (int n = 0; n < N; ++n) {
                Vec rows[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) rows[r] = load(lines + (r * N + n) * W);
#pragma GCC unroll 4
                for (int e = 0; e < ENTRIES; ++e) {
                    Vec other = load(panel + offsets[p + e] + n * W);
#pragma GCC unroll 4
                    for (int r = 0; r < 4; ++r) products[e * 4 + r] += rows[r] * other;
                }
            }
            for (int first = 0; first < ENTRIES * 4; first += W) {
                float* to = sums + p * 4 + first;
                store(to, load(to) + sum_lanes<W / 2>([&](int i) INLINE_LAMBDA { return products[first + i]; }));
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

template <int N, class Column, class Value>
void scatter_row(float* tile, const Column* columns, const Value* values, int64_t begin, int64_t end,
                 const float* line) {
    Vec added[N];
    for (int n = 0; n < N; ++n) added[n] = load(line + n * W);
    for (int64_t p = begin; p < end; ++p) {
        float* to = tile + int64_t(columns[p]) * (N * W);
        Vec weight = broadcast(to_float(values[p]));
        for (int n = 0; n < N; ++n) store(to + n * W, load(to + n * W) + weight * added[n]);
    }
}

template <int N, class Column, class Value>
void inner_row(const float* tile, const Column* columns, int64_t begin, int64_t end, const float* line_at,
               Value* gradient) {
    Vec line[N];
    for (int n = 0; n < N; ++n) line[n] = load(line_at + n * W);
    int64_t p = begin;
    auto entry = [&](int i) INLINE_LAMBDA { return product<N>(line, tile + int64_t(columns[p + i]) * (N * W)); };
    for (; p + W <= end; p += W) narrow(gradient + p, sum_lanes<W / 2>(entry));
    for (; p < end; ++p) {
        Value sums[W];
        narrow(sums, fold<1>(entry(0)));
        gradient[p] = sums[0];
    }
}

template <int N>
void multiply_any_row(const float* tile, const Array& columns, const Array& values, int64_t begin, int64_t end,
                      float initial, float* out) {
    with_types(columns, values,
               [&](auto* c, auto* v) { multiply_row<N>(tile, c, v, begin, end, initial, out); });
}

template <int N>
void scatter_any_row(float* tile, const Array& columns, const Array& values, int64_t begin, int64_t end,
                     const float* line) {
    with_types(columns, values, [&](auto* c, auto* v) { scatter_row<N>(tile, c, v, begin, end, line); });
}

template <int N>
void inner_any_row(const float* tile, const Array& columns, int64_t begin, int64_t end, const float* line,
                   const Array& gradient) {
    with_types(columns, gradient, [&](auto* c, auto* v) { inner_row<N>(tile, c, begin, end, line, v); });
}

constexpr Kernels TABLE = {
    ISA_NAME,
    W,
    load_any,
    store_any,
    {{multiply<1, 1>, multiply<2, 1>, multiply<4, 1>, multiply<8, 1>},
     {multiply<1, 4>, multiply<2, 4>, multiply<4, 4>, multiply<8, 4>}},
    {{inner<1>, inner<2>, inner<4>, inner<8>}, {inner_strips<1>, inner_strips<2>, inner_strips<4>, inner_strips<8>}},
    {multiply_any_row<1>, multiply_any_row<2>, multiply_any_row<4>, multiply_any_row<8>},
    {scatter_any_row<1>, scatter_any_row<2>, scatter_any_row<4>, scatter_any_row<8>},
    {inner_any_row<1>, inner_any_row<2>, inner_any_row<4>, inner_any_row<8>},
    dot_rows,
};

}  // namespace
}  // namespace hf_topkast
