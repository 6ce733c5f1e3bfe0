#include "ways.h"

#include <algorithm>

#include "bfloat16.h"
#include "few_tokens.h"

namespace hf_topkast {
namespace {

// Vectors of a tile's line that the kernels keep in registers: powers of two up to this.
constexpr int64_t MAX_VECTORS = 8;
// Sizes measured on an AVX-512 CPU (48 KB of first cache, 2 MB of second), with torch 2.13 and 2 threads.
// Floats of the inputs that the kernels read at random, which the innermost cache is to hold: more where entries are so
// few that the outputs' coming and going weighs more than that of the inputs.
constexpr int64_t PANEL = 1 << 13, SPARSE_PANEL = 1 << 14;
// Tokens of a tile in those two cases, as far as the instruction set's registers hold a line of them.
constexpr int64_t LINE = 128, SPARSE_LINE = 64;
constexpr double SPARSE_DENSITY = 0.25;
// Rows, as a power of two, whose output lines stay in the second cache together.
constexpr int ROW_BITS = 10;
// Up to so many tokens the products go over an unstructured pattern as it is: cutting it into panels would not pay.
constexpr int64_t FEW_FORWARD = 192, FEW_GRAD_INPUT = 128, FEW_GRAD_VALUES = 64;

int log2_of(int64_t power) {
    int bits = 0;
    while (power >> (bits + 1)) ++bits;
    return bits;
}

// Where four lines share their inputs: 32 registers of AVX-512 hold twice as many as the 16 of the others.
int64_t strip_vectors(int width) { return width == 16 ? 4 : 2; }

// For panels, with so many values in them; `side` is that of the blocks along the rows of outputs.
Schedule schedule_for(const Kernels& kernels, int threads, const Pattern& pattern, int64_t tokens, int64_t entries,
                      int64_t side) {
    threads = threads_for(tokens * entries, threads);
    bool dense = entries >= SPARSE_DENSITY * pattern.out_features * pattern.in_features;
    // The lines of outputs that share their inputs, four of them in blocks, are kept in registers together.
    int64_t most = side % 4 ? MAX_VECTORS : strip_vectors(kernels.width);
    int64_t vectors = std::min(most, (dense ? LINE : SPARSE_LINE) / kernels.width);
    while (vectors > 1 && vectors * kernels.width * threads > tokens) vectors /= 2;  // rather a tile for each thread
    int64_t panel = (dense ? PANEL : SPARSE_PANEL) / (vectors * kernels.width);
    return {log2_of(vectors), log2_of(panel), ROW_BITS, threads};
}

// For the pattern as it is: the smallest tile that holds the tokens.
Schedule few_schedule(const Kernels& kernels, int threads, const Pattern& pattern, int64_t tokens) {
    int tile = 0;
    while (kernels.width << tile < tokens) ++tile;
    return {tile, 0, 0, threads_for(tokens * pattern.stored(), threads)};
}

// Calls run(first token, tokens) for as many tokens at a time as one tile is to hold.
template <class Run>
void for_tiles(const Kernels& kernels, int64_t tokens, Run run) {
    int64_t line = std::min(SPARSE_LINE, MAX_VECTORS * kernels.width);
    for (int64_t token = 0; token < tokens; token += line) run(token, std::min(line, tokens - token));
}

}  // namespace

int threads_for(int64_t work, int most) { return (int)std::max<int64_t>(1, std::min<int64_t>(most, work / GRAIN)); }

void masked_forward(const Kernels& kernels, int threads, const Pattern& pattern, const Array& values, const float* bias,
                 int64_t tokens, const Array& x, const Array& y) {
    int64_t in = pattern.in_features, out = pattern.out_features;
    if (tokens == 0) return;
    if (tokens <= DOT_TOKENS) {
        forward_dots(kernels, threads, values, {{pattern, bias, tokens, x, y}});
    } else if (tokens <= FEW_FORWARD && pattern.unstructured()) {
        for_tiles(kernels, tokens, [&](int64_t first, int64_t count) {
            Schedule schedule = few_schedule(kernels, threads, pattern, count);
            forward_few(kernels, schedule, pattern, values, bias, count, x.from(first * in), y.from(first * out));
        });
    } else {
        Schedule schedule = schedule_for(kernels, threads, pattern, tokens, pattern.active(), pattern.height);
        forward(kernels, schedule, pattern, values, bias, tokens, x, y);
    }
}

void masked_grad_input(const Kernels& kernels, int threads, const Pattern& pattern, const Array& values, int64_t tokens,
                    const Array& dy, const Array& dx) {
    int64_t in = pattern.in_features, out = pattern.out_features;
    if (tokens == 0) return;
    if (tokens <= FEW_GRAD_INPUT && pattern.unstructured()) {
        for_tiles(kernels, tokens, [&](int64_t first, int64_t count) {
            Schedule schedule = few_schedule(kernels, threads, pattern, count);
            grad_input_few(kernels, schedule, pattern, values, count, dy.from(first * out), dx.from(first * in));
        });
    } else {
        Schedule schedule = schedule_for(kernels, threads, pattern, tokens, pattern.active(), pattern.width);
        grad_input(kernels, schedule, pattern, values, tokens, dy, dx);
    }
}

void masked_grad_values(const Kernels& kernels, int threads, const Pattern& pattern, int64_t tokens, const Array& dy,
                     const Array& x, const Array& gradient) {
    int64_t stored = pattern.stored();
    if (stored == 0) return;
    // The sums over the tokens of a slot are made at once, so that they have to fit into one tile.
    if (tokens <= std::min(MAX_VECTORS * kernels.width, FEW_GRAD_VALUES) && pattern.unstructured()) {
        grad_values_few(kernels, few_schedule(kernels, threads, pattern, tokens), pattern, tokens, dy, x, gradient);
    } else {
        Schedule schedule = schedule_for(kernels, threads, pattern, tokens, stored, 1);
        grad_values(kernels, schedule, pattern, tokens, dy, x, gradient);
    }
}

void forward_dots(const Kernels& kernels, int threads, const Array& values, const std::vector<Dots>& products) {
    int64_t inputs = 0, outputs = 0, work = 0;
    for (const Dots& each : products) {
        work += each.tokens * each.pattern.active();
        if (each.x.itemsize != 4) inputs += each.tokens * each.pattern.in_features;
        if (each.y.itemsize != 4) outputs += each.tokens * each.pattern.out_features;
    }
    std::vector<float> floats(inputs + outputs);  // of those that are bf16
    std::vector<const float*> x;
    std::vector<float*> y;
    float* next = floats.data();
    for (const Dots& each : products) {
        x.push_back((const float*)each.x.address);
        y.push_back((float*)each.y.address);
        if (each.x.itemsize != 4) {
            int64_t count = each.tokens * each.pattern.in_features;
            to_floats(each.x, count, next);
            x.back() = next;
            next += count;
        }
        if (each.y.itemsize != 4) {
            y.back() = next;
            next += each.tokens * each.pattern.out_features;
        }
    }
    threads = threads_for(work, threads);
    // Some 100 µs of work: threads that wake up late find less of it left, and the others do not wait for them.
    int64_t parts = threads == 1 ? 1 : 8 * threads, count = (int64_t)products.size();
#pragma omp parallel for schedule(guided) num_threads(threads)
    for (int64_t item = 0; item < count * parts; ++item) {
        int64_t i = item / parts, part = item % parts, rows = products[i].pattern.rows();
        kernels.dot_rows(x[i], products[i].tokens, products[i].pattern, values, products[i].bias, rows * part / parts,
                         rows * (part + 1) / parts, y[i]);
    }
    for (int64_t i = 0; i < count; ++i)
        if (products[i].y.itemsize != 4)
            from_floats(y[i], products[i].tokens * products[i].pattern.out_features, products[i].y);
}

}  // namespace hf_topkast
