#include "dense.h"

#include <algorithm>

#include "memory.h"

namespace hf_topkast {
namespace {

// Calls visit(columns, numbers, others) with the types that the arrays have; the two last have the same.
template <class Visit>
void with_types(const Pattern& pattern, const Array& numbers, const Array& others, Visit visit) {
    auto with_column = [&](auto* columns) {
        if (numbers.itemsize == 4)
            visit(columns, (uint32_t*)numbers.address, (uint32_t*)others.address);
        else
            visit(columns, (uint16_t*)numbers.address, (uint16_t*)others.address);
    };
    if (pattern.columns.itemsize == 2)
        with_column((const int16_t*)pattern.columns.address);
    else
        with_column((const int32_t*)pattern.columns.address);
}

// Calls visit(first column, first slot) for every piece of `width` columns that the blocks begin … end have in one row.
template <class Column, class Visit>
inline void for_pieces(const Pattern& pattern, const Column* columns, int64_t line, int64_t inner, Visit visit) {
    int64_t height = pattern.height, width = pattern.width;
    for (int64_t block = pattern.begin(line), end = pattern.end(line); block < end; ++block)
        visit(columns[block] * width, (block * height + inner) * width);
}

}  // namespace

void expand(const Pattern& pattern, const Array& values, const Array& alpha, int threads) {
    int64_t in = pattern.in_features, width = pattern.width;
    expect_large_pages(alpha, pattern.out_features * in);
    with_types(pattern, values, alpha, [&](auto* columns, auto* from, auto* to) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < pattern.out_features; ++row) {
            auto* line = to + row * in;
            std::fill(line, line + in, 0);
            for_pieces(pattern, columns, row / pattern.height, row % pattern.height, [&](int64_t column, int64_t slot) {
                for (int64_t j = 0; j < width; ++j) line[column + j] = from[slot + j];
            });
        }
    });
}

void gather(const Pattern& pattern, int64_t first, int64_t rows, const Array& dense, const Array& gradient,
            int threads) {
    int64_t in = pattern.in_features, width = pattern.width;
    with_types(pattern, dense, gradient, [&](auto* columns, auto* from, auto* to) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            int64_t line = (first + row) / pattern.height, inner = row % pattern.height;
            const auto* numbers = from + row * in;
            for (int64_t half : {line, pattern.rows() + line})  // of A, and of B\A
                for_pieces(pattern, columns, half, inner, [&](int64_t column, int64_t slot) {
                    for (int64_t j = 0; j < width; ++j) to[slot + j] = numbers[column + j];
                });
        }
    });
}

}  // namespace hf_topkast
