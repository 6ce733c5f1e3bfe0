#include "grouped.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "ways.h"

namespace hf_topkast {
namespace {

struct Job {
    Rows rows;
    Pattern pattern;  // of the expert
    int64_t work;

    int64_t tokens() const { return rows.last - rows.first; }
};

// To cut a pattern into panels costs as much as so many tokens.
constexpr int64_t TOKENS_OF_PANELS = 16;
// What a product on all threads takes longer than its share of one.
constexpr double TOGETHER = 1.15;

void clear(const Array& array, int64_t first, int64_t last) {
    std::memset(array.at(first), 0, (last - first) * array.itemsize);
}

// The experts that have rows, most work first, and those among them that are left to dense products.
struct Jobs {
    std::vector<Job> jobs;
    std::vector<Rows> dense;

    Jobs(const Experts& experts, const Limits& limits, bool stored) {
        int64_t out = experts.out_features(), first = 0;
        for (int64_t expert = 0; expert < experts.experts; ++expert) {
            int64_t last = experts.ends[expert];
            if (last < first || last > experts.rows)
                throw std::invalid_argument("The ends of the experts' rows must ascend, up to the number of rows.");
            Job job = {{expert, first, last}, experts.pattern.part(expert * out, out), 0};
            first = last;
            if (!job.tokens()) continue;
            int64_t values = stored ? job.pattern.stored() : job.pattern.active();
            job.work = (job.tokens() + TOKENS_OF_PANELS) * values;
            if (limits.sparse(job.tokens(), values, out * job.pattern.in_features))
                jobs.push_back(job);
            else
                dense.push_back(job.rows);
        }
        std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });
    }
};

// How long the jobs take if the first `together` of them are done by all threads, one after the other, and each of the
// others by the first thread that is free.
double time_of(const std::vector<Job>& jobs, size_t together, int threads) {
    double all = 0;
    for (size_t i = 0; i < together; ++i) all += TOGETHER * jobs[i].work / threads;
    std::vector<double> busy(threads);
    for (size_t i = together; i < jobs.size(); ++i) *std::min_element(busy.begin(), busy.end()) += jobs[i].work;
    return all + *std::max_element(busy.begin(), busy.end());
}

// Calls run(job, threads) for every job: a thread takes whole experts, but for the largest ones if they are so few that
// threads would be idle. Which are which depends on the jobs, never on timing, and so does the result.
template <class Run>
void share_out(const std::vector<Job>& jobs, int threads, Run run) {
    int64_t work = 0;
    for (const Job& job : jobs) work += job.work;
    threads = threads_for(work, threads);
    size_t together = 0;
    for (size_t count = 1; threads > 1 && count <= std::min(jobs.size(), size_t(threads)); ++count)
        if (time_of(jobs, count, threads) < time_of(jobs, together, threads)) together = count;
    for (size_t i = 0; i < together; ++i) run(jobs[i], threads);
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (size_t i = together; i < jobs.size(); ++i) {
        try {
            run(jobs[i], 1);
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace

bool Limits::sparse(int64_t count, int64_t values, int64_t numel) const {
    if (dense_from <= count && count < dense_until) return false;
    size_t above = std::upper_bound(tokens.begin(), tokens.end(), double(count)) - tokens.begin();
    double limit;
    if (above == 0 || above == tokens.size()) {
        limit = densities[above ? above - 1 : 0];
    } else {
        double share = std::log(count / tokens[above - 1]) / std::log(tokens[above] / tokens[above - 1]);
        limit = densities[above - 1] + share * (densities[above] - densities[above - 1]);
    }
    return values <= limit * numel;
}

std::vector<Rows> grouped_forward(const Kernels& kernels, int threads, const Experts& experts, const Limits& limits,
                                  const Array& values, const float* bias, const Array& x, const Array& y) {
    Jobs found(experts, limits, false);
    int64_t in = experts.pattern.in_features, out = experts.out_features();
    clear(y, experts.ends[experts.experts - 1] * out, experts.rows * out);
    auto bias_of = [&](const Job& job) { return bias ? bias + job.rows.expert * out : nullptr; };
    std::vector<Dots> dots;
    std::vector<Job> others;
    for (const Job& job : found.jobs)
        if (job.tokens() <= DOT_TOKENS)
            dots.push_back({job.pattern, bias_of(job), job.tokens(), x.from(job.rows.first * in),
                            y.from(job.rows.first * out)});
        else
            others.push_back(job);
    if (!dots.empty()) forward_dots(kernels, threads, values, dots);
    share_out(others, threads, [&](const Job& job, int threads) {
        masked_forward(kernels, threads, job.pattern, values, bias_of(job), job.tokens(), x.from(job.rows.first * in),
                    y.from(job.rows.first * out));
    });
    return found.dense;
}

std::vector<Rows> grouped_grad_input(const Kernels& kernels, int threads, const Experts& experts, const Limits& limits,
                                     const Array& values, const Array& dy, const Array& dx) {
    Jobs found(experts, limits, false);
    int64_t in = experts.pattern.in_features, out = experts.out_features();
    clear(dx, experts.ends[experts.experts - 1] * in, experts.rows * in);
    share_out(found.jobs, threads, [&](const Job& job, int threads) {
        masked_grad_input(kernels, threads, job.pattern, values, job.tokens(), dy.from(job.rows.first * out),
                       dx.from(job.rows.first * in));
    });
    return found.dense;
}

std::vector<Rows> grouped_grad_values(const Kernels& kernels, int threads, const Experts& experts,
                                      const Limits& limits, const Array& dy, const Array& x, const Array& gradient) {
    Jobs found(experts, limits, true);
    int64_t in = experts.pattern.in_features, out = experts.out_features(), first = 0;
    int64_t block = experts.pattern.height * experts.pattern.width;
    for (int64_t expert = 0; expert < experts.experts; first = experts.ends[expert++]) {
        if (experts.ends[expert] > first) continue;
        Pattern pattern = experts.pattern.part(expert * out, out);
        for (int64_t row : {int64_t(0), pattern.exploring(0)})  // of A, and of B\A
            clear(gradient, pattern.begin(row) * block, pattern.begin(row + pattern.rows()) * block);
    }
    share_out(found.jobs, threads, [&](const Job& job, int threads) {
        masked_grad_values(kernels, threads, job.pattern, job.tokens(), dy.from(job.rows.first * out),
                        x.from(job.rows.first * in), gradient);
    });
    return found.dense;
}

void ExpertsOfOneToken::multiply(int threads, const int64_t* chosen, int64_t count, const float* bias, const float* x,
                                 int64_t apart, float* y) const {
    int64_t out = pattern.out_features / experts;
    std::vector<Dots> dots;
    for (int64_t i = 0; i < count; ++i) {
        int64_t expert = chosen[i];
        Array to = {uintptr_t(y + i * out), sizeof(float)};
        if (expert < 0 || expert >= experts)
            clear(to, 0, out);
        else
            dots.push_back({pattern.part(expert * out, out), bias ? bias + expert * out : nullptr, 1,
                            {uintptr_t(x + i * apart), sizeof(float)}, to});
    }
    forward_dots(kernels, threads, values, dots);
}

}  // namespace hf_topkast
