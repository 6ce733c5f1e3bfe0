#include "blocks.h"

#include <algorithm>
#include <cstring>

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

// Calls visit(row, column, slot) for every chosen entry, in slot order. Threads take whole blocks of pattern rows, so
// that no two of them meet in a segment, whether the pattern's rows are the segments' rows or their columns.
template <class Visit>
void for_entries(const Pattern& pattern, bool stored, int64_t chunk, int threads, Visit visit) {
    auto walk = [&](auto columns) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t first = 0; first < pattern.out_features; first += chunk)
            for (int64_t row = first; row < std::min(first + chunk, pattern.out_features); ++row) {
                int64_t end = stored ? pattern.end(row) : pattern.active_end(row);
                for (int64_t slot = pattern.begin(row); slot < end; ++slot) visit(row, columns[slot], slot);
            }
    };
    if (pattern.columns.itemsize == 2)
        walk((const int16_t*)pattern.columns.address);
    else
        walk((const int32_t*)pattern.columns.address);
}

}  // namespace

Blocks make_blocks(const Pattern& pattern, Entries which, const Array* values, int64_t column_block,
                   int64_t row_group, int64_t line, int threads) {
    bool transposed = which == Entries::ACTIVE_TRANSPOSED, stored = which == Entries::STORED;
    int64_t padding = stored ? 4 : 1;
    Grid grid = {pattern.out_features, pattern.in_features, column_block, row_group};
    if (transposed) std::swap(grid.rows, grid.columns);
    int64_t segments = grid.rows * grid.blocks();
    int64_t chunk = transposed ? column_block : 16;

    auto segment_of = [&](int64_t row, int64_t column) {
        return transposed ? grid.segment(column, row) : grid.segment(row, column);
    };
    Blocks blocks = {grid, std::make_unique<int64_t[]>(segments + 1), nullptr, nullptr, 0};
    int64_t* starts = blocks.starts.get();
    for_entries(pattern, stored, chunk, threads,
                [&](int64_t row, int64_t column, int64_t) { ++starts[segment_of(row, column) + 1]; });
    for (int64_t s = 0; s < segments; ++s)
        starts[s + 1] = starts[s] + (starts[s + 1] + padding - 1) / padding * padding;
    blocks.size = starts[segments];

    blocks.offsets.reset(new uint16_t[blocks.size]);
    std::unique_ptr<int64_t[]> next(new int64_t[segments]);
    std::copy(starts, starts + segments, next.get());
    uint16_t* offsets = blocks.offsets.get();
    auto offset_of = [&](int64_t row, int64_t column) {
        return uint16_t((transposed ? row : column) % column_block * line);
    };
    if (stored) {
        for_entries(pattern, stored, chunk, threads, [&](int64_t row, int64_t column, int64_t) {
            offsets[next[segment_of(row, column)]++] = offset_of(row, column);
        });
        for (int64_t s = 0; s < segments; ++s)
            for (int64_t p = next[s]; p < starts[s + 1]; ++p) offsets[p] = 0;
        return blocks;
    }
    blocks.values.reset(new float[blocks.size]);
    float* packed = blocks.values.get();
    auto fill = [&](auto numbers) {
        for_entries(pattern, stored, chunk, threads, [&](int64_t row, int64_t column, int64_t slot) {
            int64_t p = next[segment_of(row, column)]++;
            offsets[p] = offset_of(row, column);
            packed[p] = float_of(numbers[slot]);
        });
    };
    if (values->itemsize == 4)
        fill((const float*)values->address);
    else
        fill((const uint16_t*)values->address);
    return blocks;
}

void collect_sums(const Pattern& pattern, const Blocks& blocks, const float* sums, int parts, int64_t stride,
                  const Array& gradient, int threads) {
    int64_t segments = blocks.grid.rows * blocks.grid.blocks();
    std::unique_ptr<int64_t[]> next(new int64_t[segments]);
    std::copy(blocks.starts.get(), blocks.starts.get() + segments, next.get());
    for_entries(pattern, true, 16, threads, [&](int64_t row, int64_t column, int64_t slot) {
        int64_t p = next[blocks.grid.segment(row, column)]++;
        float sum = 0;
        for (int part = 0; part < parts; ++part) sum += sums[part * stride + p];
        if (gradient.itemsize == 4)
            ((float*)gradient.address)[slot] = sum;
        else
            ((uint16_t*)gradient.address)[slot] = bfloat16_of(sum);
    });
}

}  // namespace hf_topkast
