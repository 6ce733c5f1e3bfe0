// The masked products of the experts of a block: matrices of one size in one pattern, one below the other, each with
// rows of inputs of its own.
#pragma once

#include <vector>

#include "products.h"

namespace hf_topkast {

// For which experts a dense product through an expanded α is faster: the table of costs.py for one product.
struct Limits {
    std::vector<double> tokens, densities;  // up to so dense the sparse kernels are the faster ones, at so many tokens
    int64_t dense_from, dense_until;        // tokens with which they never are

    bool sparse(int64_t count, int64_t values, int64_t numel) const;
};

struct Experts {
    Pattern pattern;      // of the (experts · out, in) matrix
    const int32_t* ends;  // where the rows of each expert end; those past the last end are for none
    int64_t experts, rows;

    int64_t out_features() const { return pattern.out_features / experts; }
};

// The rows of an expert.
struct Rows {
    int64_t expert, first, last;
};

// Each of these leaves out the experts for which dense products are faster, and returns them; what is for no expert,
// or of one without rows, becomes zero. They raise std::invalid_argument if `ends` are not those of the rows.

// y = x·αₑᵀ + bₑ: (rows, in) → (rows, out). `bias`, fp32, (experts, out), may be null.
std::vector<Rows> grouped_forward(const Kernels& kernels, int threads, const Experts& experts, const Limits& limits,
                                  const Array& values, const float* bias, const Array& x, const Array& y);

// dX = dY·αₑ: (rows, out) → (rows, in).
std::vector<Rows> grouped_grad_input(const Kernels& kernels, int threads, const Experts& experts, const Limits& limits,
                                     const Array& values, const Array& dy, const Array& dx);

// dW|B: each expert's dYᵀX at the slots of B.
std::vector<Rows> grouped_grad_values(const Kernels& kernels, int threads, const Experts& experts,
                                      const Limits& limits, const Array& dy, const Array& x, const Array& gradient);

// The forward pass of one fp32 token, whose experts need no sorting, with all that stays the same from token to token.
struct ExpertsOfOneToken {
    const Kernels& kernels;
    Pattern pattern;  // of the (experts · out, in) matrix
    int64_t experts;
    Array values;

    // y[i] = x[i]·αₑᵀ + bₑ with e = chosen[i], zero if there is no expert e. `bias` as above. An input is `apart` numbers
    // behind the one before; 0 if it is the same for all.
    void multiply(int threads, const int64_t* chosen, int64_t count, const float* bias, const float* x, int64_t apart,
                  float* y) const;
};

}  // namespace hf_topkast
