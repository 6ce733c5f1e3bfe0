#include "panels.h"

#include <algorithm>
#include <vector>

#include "bfloat16.h"

namespace hf_topkast {
namespace {

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

// Calls visit(segment, first, last, column, slot) for runs of entries of one segment; column(i) within the panel and
// slot(i), of the strip's first value, are those of entry i: first <= i < last. A run is what one row of blocks has in a
// panel or, where blocks are wider than one, the columns of a single block. Threads have strips of their own.
template <class Column, class Visit>
void for_runs(const Pattern& pattern, const Grid& grid, bool stored, const Column* columns, int threads,
              Visit visit) {
    int64_t width = pattern.width, halves = stored ? 2 : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < grid.rows; row += grid.strip) {
        int64_t inner = row % pattern.height, base = grid.segment(row, 0);
        int64_t stride = grid.segment(row, 1) - base;
        for (int64_t half = 0; half < halves; ++half) {
            int64_t line = row / pattern.height;
            if (half) line = pattern.exploring(line);
            int64_t block = pattern.begin(line), end = pattern.end(line);
            while (block < end) {
                if (width == 1) {
                    int64_t panel = columns[block] >> grid.column_bits, next = (panel + 1) << grid.column_bits;
                    int64_t first = block, left = panel << grid.column_bits;
                    while (block < end && columns[block] < next) ++block;
                    visit(
                        base + panel * stride, first, block, [&](int64_t i) { return columns[i] - left; },
                        [&](int64_t i) { return i * pattern.height + inner; });
                    continue;
                }
                int64_t left = columns[block] * width, right = left + width;
                int64_t slot = (block++ * pattern.height + inner) * width - left;
                for (int64_t first = left, last; first < right; first = last) {
                    int64_t panel = first >> grid.column_bits, corner = panel << grid.column_bits;
                    last = std::min(right, corner + (int64_t(1) << grid.column_bits));
                    visit(
                        base + panel * stride, first, last, [&](int64_t i) { return i - corner; },
                        [&](int64_t i) { return slot + i; });
                }
            }
        }
    }
}

// Calls visit(segment, column within the panel, slot of the strip's first value) for the entries of A, where αᵀ is cut
// into panels, of the pattern's rows. Threads have panels, and so segments, of their own.
template <class Column, class Visit>
void for_transposed(const Pattern& pattern, const Grid& grid, const Column* columns, int threads, Visit visit) {
    int64_t width = pattern.width;
    std::vector<int64_t> bases(grid.panels() * grid.groups());  // segment − strip
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < grid.panels(); ++panel) {
        int64_t* base = bases.data() + panel * grid.groups();
        for (int64_t group = 0; group < grid.groups(); ++group)
            base[group] = grid.first_segment(group, panel) - grid.first_row(group) / grid.strip;
        int64_t first = panel << grid.column_bits;
        int64_t last = std::min(grid.columns, first + (int64_t(1) << grid.column_bits));
        for (int64_t row = first; row < last; ++row) {
            int64_t line = row / pattern.height, inner = row % pattern.height;
            for (int64_t block = pattern.begin(line), end = pattern.end(line); block < end; ++block)
                for (int64_t j = 0; j < width; j += grid.strip) {
                    int64_t column = columns[block] * width + j;
                    visit(base[column >> grid.row_bits] + column / grid.strip, row - first,
                          (block * pattern.height + inner) * width + j);
                }
        }
    }
}

// Turns the counts in starts[s + 1] into where the segments start, each padded.
void add_up(int64_t* starts, int64_t segments, int64_t padding) {
    for (int64_t s = 0; s < segments; ++s)
        starts[s + 1] = starts[s] + (starts[s + 1] + padding - 1) / padding * padding;
}

}  // namespace

int strip_of(const Pattern& pattern, Entries which) {
    int64_t shared = which == Entries::ACTIVE_TRANSPOSED ? pattern.width : pattern.height;
    return shared % 4 == 0 ? 4 : 1;
}

Panels make_panels(const Pattern& pattern, Entries which, const Array* values, int column_bits, int row_bits,
                   int64_t line, int threads) {
    bool stored = which == Entries::STORED, transposed = which == Entries::ACTIVE_TRANSPOSED;
    int strip = strip_of(pattern, which);
    Panels panels = {{pattern.out_features, pattern.in_features, strip, column_bits, row_bits}, nullptr, nullptr, nullptr};
    Grid& grid = panels.grid;
    if (transposed) std::swap(grid.rows, grid.columns);
    int64_t segments = grid.segments();
    panels.starts = std::make_unique<int64_t[]>(segments + 1);
    int64_t* starts = panels.starts.get();
    with_columns(pattern, [&](auto* columns) {
        if (transposed)
            for_transposed(pattern, grid, columns, threads,
                           [&](int64_t segment, int64_t, int64_t) { ++starts[segment + 1]; });
        else
            for_runs(pattern, grid, stored, columns, threads,
                     [&](int64_t segment, int64_t first, int64_t last, auto, auto) {
                         starts[segment + 1] += last - first;
                     });
    });
    add_up(starts, segments, stored ? 4 : 1);

    std::unique_ptr<int64_t[]> next(new int64_t[segments]);  // entry of each segment
    std::copy(starts, starts + segments, next.get());
    panels.offsets.reset(new uint16_t[panels.size()]);
    uint16_t* offsets = panels.offsets.get();
    if (stored) {
        std::fill(offsets, offsets + panels.size(), 0);
        with_columns(pattern, [&](auto* columns) {
            for_runs(pattern, grid, true, columns, threads,
                     [&](int64_t segment, int64_t first, int64_t last, auto column, auto) {
                         uint16_t* to = offsets + next[segment];
                         for (int64_t i = first; i < last; ++i) *to++ = uint16_t(column(i) * line);
                         next[segment] += last - first;
                     });
        });
        return panels;
    }
    panels.values.reset(new float[panels.size() * strip]);
    float* packed = panels.values.get();
    with_columns(pattern, [&](auto* columns) {
        with_values(*values, [&](auto* numbers) {
            if (transposed)
                for_transposed(pattern, grid, columns, threads, [&](int64_t segment, int64_t row, int64_t slot) {
                    int64_t p = next[segment]++;
                    offsets[p] = uint16_t(row * line);
                    for (int k = 0; k < strip; ++k) packed[p * strip + k] = float_of(numbers[slot + k]);
                });
            else
                for_runs(pattern, grid, false, columns, threads,
                         [&](int64_t segment, int64_t first, int64_t last, auto column, auto slot) {
                             uint16_t* to = offsets + next[segment];
                             float* into = packed + next[segment] * strip;
                             next[segment] += last - first;
                             for (int64_t i = first; i < last; ++i) *to++ = uint16_t(column(i) * line);
                             for (int64_t i = first; i < last; ++i)
                                 for (int k = 0; k < strip; ++k)
                                     *into++ = float_of(numbers[slot(i) + k * pattern.width]);
                         });
        });
    });
    return panels;
}

void collect_sums(const Pattern& pattern, const Panels& panels, const float* sums, int parts, int64_t stride,
                  const Array& gradient, int threads) {
    int strip = panels.grid.strip;
    std::unique_ptr<int64_t[]> next(new int64_t[panels.grid.segments()]);
    std::copy(panels.starts.get(), panels.starts.get() + panels.grid.segments(), next.get());
    with_columns(pattern, [&](auto* columns) {
        for_runs(pattern, panels.grid, true, columns, threads,
                 [&](int64_t segment, int64_t first, int64_t last, auto, auto slot) {
                     const float* from = sums + next[segment] * strip;
                     next[segment] += last - first;
                     for (int64_t i = first; i < last; ++i)
                         for (int k = 0; k < strip; ++k, ++from) {
                             float sum = 0;
                             for (int part = 0; part < parts; ++part) sum += from[part * stride];
                             int64_t place = slot(i) + k * pattern.width;
                             if (gradient.itemsize == 4)
                                 ((float*)gradient.address)[place] = sum;
                             else
                                 ((uint16_t*)gradient.address)[place] = bfloat16_of(sum);
                         }
                 });
    });
}

}  // namespace hf_topkast
