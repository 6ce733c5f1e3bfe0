#include "products.h"

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "blocks.h"

namespace hf_topkast {
namespace {

// Memory of one thread that lives from call to call: fresh pages would cost more than the work on them.
float* scratch(int64_t floats) {
    struct Buffer {
        float* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < floats) {
        std::free(buffer.data);
        buffer.size = 0;
        buffer.data = (float*)std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = floats;
    }
    return buffer.data;
}

// Asks for large pages under a large new output: its pages are touched for the first time by the product, and on a
// 3072 × 768 layer small ones would cost as much as the arithmetic.
void expect_large_pages(const Array& output, int64_t size) {
#if defined(__linux__)
    constexpr uintptr_t LARGE = uintptr_t(1) << 21;
    uintptr_t first = (output.address + LARGE - 1) / LARGE * LARGE;
    uintptr_t last = (output.address + size * output.itemsize) / LARGE * LARGE;
    if (first + 4 * LARGE <= last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

void multiply(const Kernels& kernels, const Schedule& schedule, const Blocks& blocks, const Array& input, int64_t tokens,
              const float* initial, const Array& output) {
    const Grid& grid = blocks.grid;
    int64_t line = kernels.width << schedule.tile;
    auto kernel = kernels.multiply[schedule.tile];
    expect_large_pages(output, tokens * grid.rows);
#pragma omp parallel num_threads(schedule.threads)
    {
        float* inputs = scratch((grid.columns + grid.rows_of(0)) * line);
        float* outputs = inputs + grid.columns * line;
#pragma omp for schedule(dynamic)
        for (int64_t token = 0; token < tokens; token += line) {
            int64_t count = std::min(line, tokens - token);
            kernels.load_tile(input.at(token * grid.columns), input.itemsize, grid.columns, count, grid.columns, line,
                              inputs);
            for (int64_t group = 0; group < grid.groups(); ++group) {
                int64_t rows = grid.rows_of(group), first = grid.first_row(group);
                for (int64_t block = 0; block < grid.blocks(); ++block)
                    kernel(inputs + (block << grid.column_bits) * line,
                           blocks.starts.get() + grid.first_segment(group, block), blocks.offsets.get(),
                           blocks.values.get(), rows, block ? nullptr : initial + first, outputs);
                kernels.store_tile(outputs, line, count, rows, output.at(token * grid.rows + first), output.itemsize,
                                   grid.rows);
            }
        }
    }
}

}  // namespace

void forward(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
             const float* bias, int64_t tokens, const Array& x, const Array& y) {
    int64_t line = kernels.width << schedule.tile;
    Blocks blocks = make_blocks(pattern, Entries::ACTIVE, &values, schedule.column_bits, schedule.row_bits, line,
                                schedule.threads);
    std::vector<float> zeros(bias ? 0 : pattern.out_features);
    multiply(kernels, schedule, blocks, x, tokens, bias ? bias : zeros.data(), y);
}

void forward_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                 const float* bias, int64_t tokens, const Array& x, const Array& y) {
    constexpr int64_t CHUNK = 64;  // rows
    int64_t in = pattern.in_features, out = pattern.out_features, line = kernels.width << schedule.tile;
    auto kernel = kernels.multiply_row[schedule.tile];
#pragma omp parallel num_threads(schedule.threads)
    {
        float* inputs = scratch((in + CHUNK) * line);
        float* lines = inputs + in * line;
        kernels.load_tile(x.at(0), x.itemsize, in, tokens, in, line, inputs);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < out; first += CHUNK) {
            int64_t rows = std::min(CHUNK, out - first);
            for (int64_t r = 0; r < rows; ++r)
                kernel(inputs, pattern.columns, values, pattern.begin(first + r), pattern.active_end(first + r),
                       bias ? bias[first + r] : 0, lines + r * line);
            kernels.store_tile(lines, line, tokens, rows, y.at(first), y.itemsize, out);
        }
    }
}

void forward_dots(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                  const float* bias, int64_t tokens, const float* x, float* y) {
    int64_t in = pattern.in_features, out = pattern.out_features;
    // Memory is what limits this product. Between the active entries of two rows lie those of B\A, which are not read:
    // prefetch the same place of a later row, about AHEAD entries on, not what comes next in memory.
    constexpr int64_t AHEAD = 1536;
    int64_t later = 1 + AHEAD / (1 + pattern.stored() / out);
#pragma omp parallel for schedule(dynamic, 64) num_threads(schedule.threads)
    for (int64_t row = 0; row < out; ++row) {
        int64_t begin = pattern.begin(row), ahead = pattern.begin(row + later < out ? row + later : row) - begin;
        for (int64_t token = 0; token < tokens; ++token)
            y[token * out + row] = kernels.dot_row(x + token * in, pattern.columns, values, begin,
                                                   pattern.active_end(row), ahead, bias ? bias[row] : 0);
    }
}

void grad_input(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                int64_t tokens, const Array& dy, const Array& dx) {
    int64_t line = kernels.width << schedule.tile;
    Blocks blocks = make_blocks(pattern, Entries::ACTIVE_TRANSPOSED, &values, schedule.column_bits,
                                schedule.row_bits, line, schedule.threads);
    std::vector<float> zeros(pattern.in_features);
    multiply(kernels, schedule, blocks, dy, tokens, zeros.data(), dx);
}

void grad_values(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, int64_t tokens,
                 const Array& dy, const Array& x, const Array& gradient) {
    int64_t line = kernels.width << schedule.tile;
    Blocks blocks = make_blocks(pattern, Entries::STORED, nullptr, schedule.column_bits, schedule.row_bits, line,
                                schedule.threads);
    const Grid& grid = blocks.grid;
    auto kernel = kernels.inner[schedule.tile];
    // Each thread sums a fixed share of the tokens: the result depends on the number of threads, never on their timing.
    int64_t tiles = (tokens + line - 1) / line;
    int parts = (int)std::max<int64_t>(1, std::min<int64_t>(schedule.threads, tiles));
    int64_t stride = (blocks.size() + 15) / 16 * 16;
    std::unique_ptr<float[]> sums(new float[parts * stride]);
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int part = 0; part < parts; ++part) {
        float* inputs = scratch((grid.columns + grid.rows_of(0)) * line);
        float* lines = inputs + grid.columns * line;
        float* own = sums.get() + part * stride;
        std::fill(own, own + blocks.size(), 0.0f);
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
            int64_t token = tile * line, count = std::min(line, tokens - token);
            kernels.load_tile(x.at(token * grid.columns), x.itemsize, grid.columns, count, grid.columns, line, inputs);
            for (int64_t group = 0; group < grid.groups(); ++group) {
                int64_t rows = grid.rows_of(group), first = grid.first_row(group);
                kernels.load_tile(dy.at(token * grid.rows + first), dy.itemsize, grid.rows, count, rows, line, lines);
                for (int64_t block = 0; block < grid.blocks(); ++block)
                    kernel(inputs + (block << grid.column_bits) * line,
                           blocks.starts.get() + grid.first_segment(group, block), blocks.offsets.get(), lines, rows,
                           own);
            }
        }
    }
    collect_sums(pattern, blocks, sums.get(), parts, stride, gradient, schedule.threads);
}

}  // namespace hf_topkast
