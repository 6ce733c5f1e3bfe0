// The product of one token: part of kernels.inl, which comes once for each instruction set.
#include "kernels.h"
#include "vector.h"

namespace hf_topkast {
namespace {

// Calls visit(columns, values) with the types that the arrays have.
template <class Visit>
INLINE void with_types(const Array& columns, const Array& values, Visit visit) {
    auto with_column = [&](auto* typed) {
        if (values.itemsize == 4)
            visit(typed, (float*)values.address);
        else
            visit(typed, (BFloat16*)values.address);
    };
    if (columns.itemsize == 2)
        with_column((const int16_t*)columns.address);
    else
        with_column((const int32_t*)columns.address);
}

// One token's product is bound by reading the pattern, which the processor's own prefetching does not do far enough
// ahead. The entries of the next row follow in memory.
constexpr int64_t AHEAD = 512;

// The product of a row, of single weights, with one token.
template <class Column, class Value>
struct RowDot {
    const float* x;
    const Column* columns;
    const Value* values;
    int64_t p, end;
    Vec sums[2] = {};

    INLINE Vec products(int64_t first) const { return widen(values + first) * gather(x, columns + first); }

    INLINE bool whole_steps_left() const { return p + 2 * W <= end; }

    INLINE void step() {
        __builtin_prefetch(values + p + AHEAD);
        __builtin_prefetch(values + p + W + AHEAD);
        __builtin_prefetch(columns + p + AHEAD);
        sums[0] += products(p);
        sums[1] += products(p + W);
        p += 2 * W;
    }

    INLINE float finish() {
        while (whole_steps_left()) step();
        if (p + W <= end) {
            sums[0] += products(p);
            p += W;
        }
        float sum = 0;
        if (end >= W)  // the last entries of this row, behind some that were added already or are another row's
            sums[1] += last_lanes(products(end - W), int(end - p));
        else
            for (; p < end; ++p) sum += to_float(values[p]) * x[columns[p]];
        return sum + fold<1>(sums[0] + sums[1])[0];
    }
};

// Σ a[i] · b[i]
template <class Value>
INLINE float dot(const Value* a, const float* b, int64_t size) {
    Vec sums = {};
    int64_t i = 0;
    for (; i + W <= size; i += W) sums += widen(a + i) * load(b + i);
    float sum = fold<1>(sums)[0];
    for (; i < size; ++i) sum += to_float(a[i]) * b[i];
    return sum;
}

// to[i] += a · b[i]
template <class Value>
INLINE void add_multiple(float* to, float a, const Value* b, int64_t size) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(to + i, load(to + i) + broadcast(a) * widen(b + i));
    for (; i < size; ++i) to[i] += a * to_float(b[i]);
}

template <class Column, class Value>
void dot_blocks(const float* x, const Column* columns, const Value* values, int64_t begin, int64_t end, int64_t height,
                int64_t width, float* out) {
    for (int64_t p = begin; p < end; ++p) {
        const Value* block = values + p * height * width;
        const float* inputs = x + columns[p] * width;
        if (width == 1)
            add_multiple(out, *inputs, block, height);
        else
            for (int64_t i = 0; i < height; ++i) out[i] += dot(block + i * width, inputs, width);
    }
}

// Rows of the first half in turn with those of the second: two streams come from memory faster than one.
template <class Column, class Value>
void dot_single_weights(const float* x, const Pattern& pattern, const Column* columns, const Value* values,
                        const float* bias, int64_t first, int64_t last, float* y) {
    auto start = [&](int64_t row) INLINE_LAMBDA {
        return RowDot<Column, Value>{x, columns, values, pattern.begin(row), pattern.end(row)};
    };
    auto put = [&](int64_t row, RowDot<Column, Value>& dot) INLINE_LAMBDA {
        y[row] = (bias ? bias[row] : 0) + dot.finish();
    };
    int64_t half = (last - first + 1) / 2;
    for (int64_t row = first; row < first + half; ++row) {
        auto one = start(row);
        if (row + half < last) {
            auto other = start(row + half);
            while (one.whole_steps_left() && other.whole_steps_left()) one.step(), other.step();
            put(row + half, other);
        }
        put(row, one);
    }
}

void dot_rows(const float* x, int64_t tokens, const Pattern& pattern, const Array& values, const float* bias,
              int64_t first, int64_t last, float* y) {
    int64_t height = pattern.height;
    with_types(pattern.columns, values, [&](auto* c, auto* v) {
        for (int64_t token = 0; token < tokens; ++token, x += pattern.in_features, y += pattern.out_features) {
            if (pattern.unstructured()) {
                dot_single_weights(x, pattern, c, v, bias, first, last, y);
                continue;
            }
            for (int64_t row = first; row < last; ++row) {
                float* out = y + row * height;
                for (int64_t i = 0; i < height; ++i) out[i] = bias ? bias[row * height + i] : 0;
                dot_blocks(x, c, v, pattern.begin(row), pattern.end(row), height, pattern.width, out);
            }
        }
    });
}

}  // namespace
}  // namespace hf_topkast
