#include "norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"

namespace hf_topkast {
namespace {

FOR_EVERY_CPU
void add_squares(const float* numbers, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += double(numbers[i]) * double(numbers[i]);
}

}  // namespace

void block_norms(const float* theta, int64_t rows, int64_t columns, int64_t height, int64_t width, float* norms,
                 int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> sums(columns);  // of the columns of a row of blocks
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows / height; ++row) {
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t i = 0; i < height; ++i)
                add_squares(theta + (row * height + i) * columns, columns, sums.data());
            for (int64_t block = 0; block < columns / width; ++block) {
                double sum = 0;
                for (int64_t j = 0; j < width; ++j) sum += sums[block * width + j];
                norms[row * (columns / width) + block] = float(std::sqrt(sum));
            }
        }
    }
}

}  // namespace hf_topkast
