#include "few_tokens.h"

#include <algorithm>
#include <memory>

#include "memory.h"

namespace hf_topkast {
namespace {

constexpr int64_t CHUNK = 64;  // rows whose lines are made together

}  // namespace

void forward_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                 const float* bias, int64_t tokens, const Array& x, const Array& y) {
    int64_t in = pattern.in_features, out = pattern.out_features, line = kernels.width << schedule.tile;
    auto kernel = kernels.multiply_row[schedule.tile];
    Scratch scratch(schedule.threads, (in + CHUNK) * line);
#pragma omp parallel num_threads(schedule.threads)
    {
        float* inputs = scratch.own();
        float* lines = inputs + in * line;
        kernels.load_tile(x.at(0), x.itemsize, in, tokens, in, line, inputs);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < out; first += CHUNK) {
            int64_t rows = std::min(CHUNK, out - first);
            for (int64_t r = 0; r < rows; ++r)
                kernel(inputs, pattern.columns, values, pattern.begin(first + r), pattern.end(first + r),
                       bias ? bias[first + r] : 0, lines + r * line);
            kernels.store_tile(lines, line, tokens, rows, y.at(first), y.itemsize, out);
        }
    }
}

void forward_dots(const Kernels& kernels, int threads, const Pattern& pattern, const Array& values,
                  const float* bias, int64_t tokens, const float* x, float* y) {
    // Some 100 µs of work: threads that wake up late find less of it left, and the others do not wait for them.
    int64_t parts = threads == 1 ? 1 : std::min<int64_t>(pattern.rows(), 8 * threads);
#pragma omp parallel for schedule(guided) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
        int64_t first = pattern.rows() * part / parts, last = pattern.rows() * (part + 1) / parts;
        kernels.dot_rows(x, tokens, pattern, values, bias, first, last, y);
    }
}

void grad_input_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, const Array& values,
                    int64_t tokens, const Array& dy, const Array& dx) {
    int64_t in = pattern.in_features, out = pattern.out_features, line = kernels.width << schedule.tile;
    auto kernel = kernels.scatter_row[schedule.tile];
    // Each thread adds up a fixed share of the rows: the result depends on the number of threads, never on their timing.
    int parts = schedule.threads;
    std::unique_ptr<float[]> sums(new float[parts * in * line]);
    Scratch scratch(parts, CHUNK * line);
#pragma omp parallel num_threads(parts)
    {
        float* lines = scratch.own();
#pragma omp for schedule(static)
        for (int part = 0; part < parts; ++part) {
            float* own = sums.get() + part * in * line;
            std::fill(own, own + in * line, 0.0f);
            for (int64_t first = out * part / parts, last = out * (part + 1) / parts; first < last; first += CHUNK) {
                int64_t rows = std::min(CHUNK, last - first);
                kernels.load_tile(dy.at(first), dy.itemsize, out, tokens, rows, line, lines);
                for (int64_t r = 0; r < rows; ++r)
                    kernel(own, pattern.columns, values, pattern.begin(first + r), pattern.end(first + r),
                           lines + r * line);
            }
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < in; first += CHUNK) {
            int64_t columns = std::min(CHUNK, in - first);
            float* total = sums.get() + first * line;
            for (int part = 1; part < parts; ++part)
                for (int64_t i = 0; i < columns * line; ++i) total[i] += total[part * in * line + i];
            kernels.store_tile(total, line, tokens, columns, dx.at(first), dx.itemsize, in);
        }
    }
}

void grad_values_few(const Kernels& kernels, const Schedule& schedule, const Pattern& pattern, int64_t tokens,
                     const Array& dy, const Array& x, const Array& gradient) {
    int64_t in = pattern.in_features, out = pattern.out_features, line = kernels.width << schedule.tile;
    auto kernel = kernels.inner_row[schedule.tile];
    Scratch scratch(schedule.threads, (in + CHUNK) * line);
#pragma omp parallel num_threads(schedule.threads)
    {
        float* inputs = scratch.own();
        float* lines = inputs + in * line;
        kernels.load_tile(x.at(0), x.itemsize, in, tokens, in, line, inputs);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < out; first += CHUNK) {
            int64_t rows = std::min(CHUNK, out - first);
            kernels.load_tile(dy.at(first), dy.itemsize, out, tokens, rows, line, lines);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t row : {first + r, pattern.exploring(first + r)})  // of A, and of B\A
                    kernel(inputs, pattern.columns, pattern.begin(row), pattern.end(row), lines + r * line, gradient);
        }
    }
}

}  // namespace hf_topkast
