#include "products.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "memory.h"
#include "panels.h"

namespace hf_topkast {
namespace {

void multiply(const Kernels& kernels, const Schedule& schedule, const Panels& panels, const Array& input, int64_t tokens,
              const float* initial, const Array& output) {
    const Grid& grid = panels.grid;
    int64_t line = kernels.width << schedule.tile;
    auto kernel = kernels.multiply[grid.strip == 4][schedule.tile];
    expect_large_pages(output, tokens * grid.rows);
    Scratch scratch(schedule.threads, (grid.columns + grid.rows_of(0)) * line);
#pragma omp parallel num_threads(schedule.threads)
    {
        float* inputs = scratch.own();
        float* outputs = inputs + grid.columns * line;
#pragma omp for schedule(dynamic)
        for (int64_t token = 0; token < tokens; token += line) {
            int64_t count = std::min(line, tokens - token);
            kernels.load_tile(input.at(token * grid.columns), input.itemsize, grid.columns, count, grid.columns, line,
                              inputs);
            for (int64_t group = 0; group < grid.groups(); ++group) {
                int64_t rows = grid.rows_of(group), first = grid.first_row(group);
                for (int64_t panel = 0; panel < grid.panels(); ++panel)
                    kernel(inputs + (panel << grid.column_bits) * line,
                           panels.starts.get() + grid.first_segment(group, panel), panels.offsets.get(),
                           panels.values.get(), rows / grid.strip, panel ? nullptr : initial + first, outputs);
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
    Panels panels = make_panels(pattern, Entries::ACTIVE, &values, schedule.column_bits, schedule.row_bits, line,
                                schedule.threads);
    std::vector<float> zeros(bias ? 0 : pattern.out_features);
    multiply(kernels, schedule, panels, x, tokens, bias ? bias : zeros.data(), y);
}

void grad_input(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                int64_t tokens, const Array& dy, const Array& dx) {
    int64_t line = kernels.width << schedule.tile;
    Panels panels = make_panels(pattern, Entries::ACTIVE_TRANSPOSED, &values, schedule.column_bits,
                                schedule.row_bits, line, schedule.threads);
    std::vector<float> zeros(pattern.in_features);
    multiply(kernels, schedule, panels, dy, tokens, zeros.data(), dx);
}

void grad_values(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, int64_t tokens,
                 const Array& dy, const Array& x, const Array& gradient) {
    int64_t line = kernels.width << schedule.tile;
    // Each thread sums a fixed share of the tokens, for all rows or, if there are more threads than may have sums of
    // their own, for a share of the rows: the result depends on the number of threads, never on their timing.
    constexpr int MOST_PARTS = 4;
    int64_t tiles = (tokens + line - 1) / line;
    int parts = (int)std::max<int64_t>(1, std::min<int64_t>(std::min(schedule.threads, MOST_PARTS), tiles));
    int shares = std::max(1, schedule.threads / parts), row_bits = schedule.row_bits;
    while (row_bits > 4 && ((pattern.out_features - 1) >> row_bits) + 1 < shares) --row_bits;
    Panels panels = make_panels(pattern, Entries::STORED, nullptr, schedule.column_bits, row_bits, line,
                                schedule.threads);
    const Grid& grid = panels.grid;
    auto kernel = kernels.inner[grid.strip == 4][schedule.tile];
    int64_t stride = (panels.size() * grid.strip + 15) / 16 * 16;
    std::unique_ptr<float[]> sums(new float[parts * stride]);
    Scratch scratch(parts * shares, (grid.columns + grid.rows_of(0)) * line);
#pragma omp parallel for schedule(static) num_threads(parts * shares)
    for (int item = 0; item < parts * shares; ++item) {
        int part = item / shares, share = item % shares;
        int64_t first_group = grid.groups() * share / shares, last_group = grid.groups() * (share + 1) / shares;
        if (first_group == last_group) continue;
        float* inputs = scratch.own();
        float* lines = inputs + grid.columns * line;
        float* own = sums.get() + part * stride;
        auto sums_of = [&](int64_t group) {  // where a group's sums begin
            int64_t segment = group < grid.groups() ? grid.first_segment(group, 0) : grid.segments();
            return own + panels.starts[segment] * grid.strip;
        };
        std::fill(sums_of(first_group), sums_of(last_group), 0.0f);
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
            int64_t token = tile * line, count = std::min(line, tokens - token);
            kernels.load_tile(x.at(token * grid.columns), x.itemsize, grid.columns, count, grid.columns, line, inputs);
            for (int64_t group = first_group; group < last_group; ++group) {
                int64_t rows = grid.rows_of(group), first = grid.first_row(group);
                kernels.load_tile(dy.at(token * grid.rows + first), dy.itemsize, grid.rows, count, rows, line, lines);
                for (int64_t panel = 0; panel < grid.panels(); ++panel)
                    kernel(inputs + (panel << grid.column_bits) * line,
                           panels.starts.get() + grid.first_segment(group, panel), panels.offsets.get(), lines,
                           rows / grid.strip, own);
            }
        }
    }
    collect_sums(pattern, panels, sums.get(), parts, stride, gradient, schedule.threads);
}

}  // namespace hf_topkast
