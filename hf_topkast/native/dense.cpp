#include "dense.h"

#include <algorithm>
#include <type_traits>

#include "memory.h"

namespace hf_topkast {
namespace {

// Calls visit(columns, width, numbers, others) with the types that the arrays have; the two last have the same. Width is
// that of a block: where it is 1 the compiler knows it, which halves the time.
template <class Visit>
void with_types(const Pattern& pattern, const Array& numbers, const Array& others, Visit visit) {
    auto with_width = [&](auto* columns, auto width) {
        if (numbers.itemsize == 4)
            visit(columns, width, (uint32_t*)numbers.address, (uint32_t*)others.address);
        else if (numbers.itemsize == 8)
            visit(columns, width, (uint64_t*)numbers.address, (uint64_t*)others.address);
        else
            visit(columns, width, (uint16_t*)numbers.address, (uint16_t*)others.address);
    };
    auto with_column = [&](auto* columns) {
        if (pattern.width == 1)
            with_width(columns, std::integral_constant<int64_t, 1>());
        else
            with_width(columns, pattern.width);
    };
    if (pattern.columns.itemsize == 2)
        with_column((const int16_t*)pattern.columns.address);
    else
        with_column((const int32_t*)pattern.columns.address);
}

// Calls visit(first column, first slot) for every piece of `width` columns that the blocks of one line have in one row.
template <class Column, class Width, class Visit>
inline void for_pieces(const Pattern& pattern, const Column* columns, Width width, int64_t line, int64_t inner,
                       Visit visit) {
    int64_t height = pattern.height;
    for (int64_t block = pattern.begin(line), end = pattern.end(line); block < end; ++block)
        visit(columns[block] * width, (block * height + inner) * width);
}

}  // namespace

void expand(const Pattern& pattern, const Array& values, const Array& alpha, int threads) {
    int64_t in = pattern.in_features;
    expect_large_pages(alpha, pattern.out_features * in);
    with_types(pattern, values, alpha, [&](auto* columns, auto width, auto* from, auto* to) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < pattern.out_features; ++row) {
            auto* line = to + row * in;
            std::fill(line, line + in, 0);
            int64_t inner = row % pattern.height;
            for_pieces(pattern, columns, width, row / pattern.height, inner, [&](int64_t column, int64_t slot) {
                for (int64_t j = 0; j < width; ++j) line[column + j] = from[slot + j];
            });
        }
    });
}

void gather(const Pattern& pattern, int64_t first, int64_t rows, const Array& dense, const Array& gradient,
            int threads) {
    int64_t in = pattern.in_features;
    with_types(pattern, dense, gradient, [&](auto* columns, auto width, auto* from, auto* to) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            int64_t line = (first + row) / pattern.height, inner = row % pattern.height;
            const auto* numbers = from + row * in;
            for (int64_t half : {line, pattern.exploring(line)})  // of A, and of B\A
                for_pieces(pattern, columns, width, half, inner, [&](int64_t column, int64_t slot) {
                    for (int64_t j = 0; j < width; ++j) to[slot + j] = numbers[column + j];
                });
        }
    });
}

}  // namespace hf_topkast
