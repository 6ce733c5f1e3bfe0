#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace hf_topkast {
namespace {

float float_of(float value) { return value; }
float float_of(uint16_t bfloat16) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t bfloat16_of(float value) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return uint16_t((bits | 0x400000) >> 16);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class Visit>
void with_columns(const Pattern& pattern, Visit visit) {
    if (pattern.columns.itemsize == 2)
        visit((const int16_t*)pattern.columns.address);
    else
        visit((const int32_t*)pattern.columns.address);
}

template <class Visit>
void with_values(const Array& values, Visit visit) {
    if (values.itemsize == 4)
        visit((const float*)values.address);
    else
        visit((const uint16_t*)values.address);
}

// Calls visit(segment, first column of its block, first slot, last slot) for every run of entries of one segment: a
// segment has one run of A and one of B\A, for columns ascend in both. Threads have rows, and so segments, of their own.
template <class Column, class Visit>
void for_runs(const Pattern& pattern, const Grid& grid, bool stored, const Column* columns, int threads,
              Visit visit) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < grid.rows; ++row) {
        int64_t group = row >> grid.row_bits;
        int64_t stride = grid.rows_of(group), base = grid.first_segment(group, 0) + row - grid.first_row(group);
        int64_t ends[] = {pattern.active_end(row), stored ? pattern.end(row) : 0};
        int64_t slot = pattern.begin(row);
        for (int64_t end : ends)
            while (slot < end) {
                int64_t block = columns[slot] >> grid.column_bits, next = (block + 1) << grid.column_bits;
                int64_t first = slot;
                while (slot < end && columns[slot] < next) ++slot;
                visit(base + block * stride, Column(block << grid.column_bits), first, slot);
            }
    }
}

// Calls visit(segment, row within its block, slot) for the entries of A, where αᵀ is cut into blocks. Threads have
// blocks of the pattern's rows, and so segments, of their own.
template <class Column, class Visit>
void for_transposed(const Pattern& pattern, const Grid& grid, const Column* columns, int threads, Visit visit) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < grid.blocks(); ++block) {
        std::vector<int64_t> base(grid.groups());  // segment − column
        for (int64_t group = 0; group < grid.groups(); ++group)
            base[group] = grid.first_segment(group, block) - grid.first_row(group);
        int64_t first = block << grid.column_bits;
        int64_t last = std::min(grid.columns, first + (int64_t(1) << grid.column_bits));
        for (int64_t row = first; row < last; ++row)
            for (int64_t slot = pattern.begin(row), end = pattern.active_end(row); slot < end; ++slot)
                visit(base[columns[slot] >> grid.row_bits] + columns[slot], row - first, slot);
    }
}

// Turns the counts in starts[s + 1] into where the segments start, each padded.
void add_up(int64_t* starts, int64_t segments, int64_t padding) {
    for (int64_t s = 0; s < segments; ++s)
        starts[s + 1] = starts[s] + (starts[s + 1] + padding - 1) / padding * padding;
}

}  // namespace

Blocks make_blocks(const Pattern& pattern, Entries which, const Array* values, int column_bits, int row_bits,
                   int64_t line, int threads) {
    bool stored = which == Entries::STORED, transposed = which == Entries::ACTIVE_TRANSPOSED;
    Blocks blocks = {{pattern.out_features, pattern.in_features, column_bits, row_bits}, nullptr, nullptr, nullptr};
    Grid& grid = blocks.grid;
    if (transposed) std::swap(grid.rows, grid.columns);
    int64_t segments = grid.segments();
    blocks.starts = std::make_unique<int64_t[]>(segments + 1);
    int64_t* starts = blocks.starts.get();
    with_columns(pattern, [&](auto* columns) {
        if (transposed)
            for_transposed(pattern, grid, columns, threads,
                           [&](int64_t segment, int64_t, int64_t) { ++starts[segment + 1]; });
        else
            for_runs(pattern, grid, stored, columns, threads, [&](int64_t segment, auto, int64_t first, int64_t last) {
                starts[segment + 1] += last - first;
            });
    });
    add_up(starts, segments, stored ? 4 : 1);

    std::unique_ptr<int64_t[]> next(new int64_t[segments]);  // entry of each segment
    std::copy(starts, starts + segments, next.get());
    blocks.offsets.reset(new uint16_t[blocks.size()]);
    uint16_t* offsets = blocks.offsets.get();
    auto place = [&](int64_t segment, auto* columns, auto base, int64_t first, int64_t last) {
        uint16_t* to = offsets + next[segment];
        for (int64_t slot = first; slot < last; ++slot) *to++ = uint16_t((columns[slot] - base) * line);
        return std::exchange(next[segment], next[segment] + last - first);
    };
    if (stored) {
        std::fill(offsets, offsets + blocks.size(), 0);
        with_columns(pattern, [&](auto* columns) {
            for_runs(pattern, grid, true, columns, threads, [&](int64_t segment, auto base, int64_t first, int64_t last) {
                place(segment, columns, base, first, last);
            });
        });
        return blocks;
    }
    blocks.values.reset(new float[blocks.size()]);
    float* packed = blocks.values.get();
    with_columns(pattern, [&](auto* columns) {
        with_values(*values, [&](auto* numbers) {
            if (transposed)
                for_transposed(pattern, grid, columns, threads, [&](int64_t segment, int64_t row, int64_t slot) {
                    int64_t p = next[segment]++;
                    offsets[p] = uint16_t(row * line);
                    packed[p] = float_of(numbers[slot]);
                });
            else
                for_runs(pattern, grid, false, columns, threads,
                         [&](int64_t segment, auto base, int64_t first, int64_t last) {
                             float* to = packed + place(segment, columns, base, first, last);
                             for (int64_t slot = first; slot < last; ++slot) *to++ = float_of(numbers[slot]);
                         });
        });
    });
    return blocks;
}

void collect_sums(const Pattern& pattern, const Blocks& blocks, const float* sums, int parts, int64_t stride,
                  const Array& gradient, int threads) {
    std::unique_ptr<int64_t[]> next(new int64_t[blocks.grid.segments()]);
    std::copy(blocks.starts.get(), blocks.starts.get() + blocks.grid.segments(), next.get());
    with_columns(pattern, [&](auto* columns) {
        for_runs(pattern, blocks.grid, true, columns, threads,
                 [&](int64_t segment, auto, int64_t first, int64_t last) {
                     const float* from = sums + std::exchange(next[segment], next[segment] + last - first);
                     for (int64_t slot = first; slot < last; ++slot, ++from) {
                         float sum = 0;
                         for (int part = 0; part < parts; ++part) sum += from[part * stride];
                         if (gradient.itemsize == 4)
                             ((float*)gradient.address)[slot] = sum;
                         else
                             ((uint16_t*)gradient.address)[slot] = bfloat16_of(sum);
                     }
                 });
    });
}

}  // namespace hf_topkast
