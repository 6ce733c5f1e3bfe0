#include "products.h"

#include <omp.h>

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

void multiply(const Kernels& kernels, const Schedule& schedule, const Blocks& blocks, Array input, int64_t tokens,
              const float* initial, Array output) {
    const Grid& grid = blocks.grid;
    int64_t line = kernels.width << schedule.tile;
    auto kernel = kernels.multiply[schedule.tile];
#pragma omp parallel num_threads(schedule.threads)
    {
        float* tile = scratch((grid.columns + grid.row_group) * line);
        float* out = tile + grid.columns * line;
#pragma omp for schedule(dynamic)
        for (int64_t token = 0; token < tokens; token += line) {
            int64_t count = std::min(line, tokens - token);
            kernels.load_tile(input.at(token * grid.columns), input.itemsize, grid.columns, count, grid.columns, line,
                              tile);
            for (int64_t group = 0; group < grid.groups(); ++group) {
                int64_t rows = grid.rows_of(group), first = group * grid.row_group;
                for (int64_t block = 0; block < grid.blocks(); ++block)
                    kernel(tile + block * grid.column_block * line,
                           blocks.starts.get() + grid.first_segment(group, block), blocks.offsets.get(),
                           blocks.values.get(), rows, block ? nullptr : initial + first, out);
                kernels.store_tile(out, line, count, rows, output.at(token * grid.rows + first), output.itemsize,
                                   grid.rows);
            }
        }
    }
}

}  // namespace

void forward(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, Array x, int64_t tokens,
             Array values, const float* bias, Array y) {
    int64_t line = kernels.width << schedule.tile;
    Blocks blocks = make_blocks(pattern, Entries::ACTIVE, &values, schedule.column_block, schedule.row_group, line,
                                schedule.threads);
    std::vector<float> zeros(bias ? 0 : pattern.out_features);
    multiply(kernels, schedule, blocks, x, tokens, bias ? bias : zeros.data(), y);
}

void grad_input(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, Array dy, int64_t tokens,
                Array values, Array dx) {
    int64_t line = kernels.width << schedule.tile;
    Blocks blocks = make_blocks(pattern, Entries::ACTIVE_TRANSPOSED, &values, schedule.column_block,
                                schedule.row_group, line, schedule.threads);
    std::vector<float> zeros(pattern.in_features);
    multiply(kernels, schedule, blocks, dy, tokens, zeros.data(), dx);
}

void grad_values(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, Array dy, Array x,
                 int64_t tokens, Array gradient) {
    int64_t line = kernels.width << schedule.tile;
    Blocks blocks = make_blocks(pattern, Entries::STORED, nullptr, schedule.column_block, schedule.row_group, line,
                                schedule.threads);
    const Grid& grid = blocks.grid;
    auto kernel = kernels.inner[schedule.tile];
    // Each thread sums a fixed share of the tokens: the result depends on the number of threads, never on their timing.
    int64_t tiles = (tokens + line - 1) / line;
    int parts = (int)std::max<int64_t>(1, std::min<int64_t>(schedule.threads, tiles));
    int64_t stride = (blocks.size + 15) / 16 * 16;
    std::unique_ptr<float[]> sums(new float[parts * stride]);
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int part = 0; part < parts; ++part) {
        float* tile = scratch((grid.columns + grid.row_group) * line);
        float* lines = tile + grid.columns * line;
        float* own = sums.get() + part * stride;
        std::fill(own, own + blocks.size, 0.0f);
        for (int64_t token = tiles * part / parts * line; token < tiles * (part + 1) / parts * line; token += line) {
            int64_t count = std::min(line, tokens - token);
            kernels.load_tile(x.at(token * grid.columns), x.itemsize, grid.columns, count, grid.columns, line, tile);
            for (int64_t group = 0; group < grid.groups(); ++group) {
                int64_t rows = grid.rows_of(group), first = group * grid.row_group;
                kernels.load_tile(dy.at(token * grid.rows + first), dy.itemsize, grid.rows, count, rows, line, lines);
                for (int64_t block = 0; block < grid.blocks(); ++block)
                    kernel(tile + block * grid.column_block * line,
                           blocks.starts.get() + grid.first_segment(group, block), blocks.offsets.get(), lines, rows,
                           own);
            }
        }
    }
    collect_sums(pattern, blocks, sums.get(), parts, stride, gradient, schedule.threads);
}

}  // namespace hf_topkast
