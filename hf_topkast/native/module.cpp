// The Python module `_native`: addresses and sizes in, no tensor type known. The interpreter is released meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "dense.h"
#include "few_tokens.h"
#include "grouped.h"
#include "isa.h"
#include "moves.h"
#include "norms.h"
#include "passes.h"
#include "selection.h"
#include "ways.h"

namespace nb = nanobind;
using namespace hf_topkast;

namespace {

// The product of one fp32 token, with all that stays the same from token to token.
struct OneToken {
    const Kernels& kernels;
    Pattern pattern;
    Array values;
    const float* bias;

    OneToken(const std::string& isa, Pattern pattern, Array values, uintptr_t bias)
        : kernels(kernels_named(isa)), pattern(pattern), values(values), bias((const float*)bias) {}

    void multiply(int threads, uintptr_t x, uintptr_t y) const {
        forward_dots(kernels, threads, pattern, values, bias, 1, (const float*)x, (float*)y);
    }
};

// The experts left to dense products, as (expert, first row, end of its rows).
std::vector<std::tuple<int64_t, int64_t, int64_t>> as_tuples(const std::vector<Rows>& rows) {
    std::vector<std::tuple<int64_t, int64_t, int64_t>> tuples;
    for (const Rows& each : rows) tuples.emplace_back(each.expert, each.first, each.last);
    return tuples;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Masked products, called by ops/, where handover.py checks every argument, and refreshes, called by storage/ and "
              "sets/.";
    m.attr("GRAIN") = GRAIN;
    auto released = nb::call_guard<nb::gil_scoped_release>();

    nb::class_<Array>(m, "Array").def(nb::init<uintptr_t, int>());
    nb::class_<Pattern>(m, "Pattern")
        .def(nb::init<Array, Array, int64_t, int64_t, int64_t, int64_t>())
        .def("part", &Pattern::part);
    nb::class_<Limits>(m, "Limits").def(nb::init<std::vector<double>, std::vector<double>, int64_t, int64_t>())
        .def("sparse", &Limits::sparse);

    nb::class_<OneToken>(m, "OneToken")
        .def(nb::init<const std::string&, Pattern, Array, uintptr_t>())
        .def("multiply", &OneToken::multiply, released);

    m.def("instruction_sets", [] {
        std::vector<std::pair<std::string, int>> names;
        for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name, kernels->width);
        return names;
    });
    m.def(
        "masked_forward",
        [](const std::string& isa, int threads, Pattern pattern, Array values, uintptr_t bias, int64_t tokens, Array x,
           Array y) {
            masked_forward(kernels_named(isa), threads, pattern, values, (const float*)bias, tokens, x, y);
        },
        released);
    m.def(
        "masked_grad_input",
        [](const std::string& isa, int threads, Pattern pattern, Array values, int64_t tokens, Array dy, Array dx) {
            masked_grad_input(kernels_named(isa), threads, pattern, values, tokens, dy, dx);
        },
        released);
    m.def(
        "masked_grad_values",
        [](const std::string& isa, int threads, Pattern pattern, int64_t tokens, Array dy, Array x, Array gradient) {
            masked_grad_values(kernels_named(isa), threads, pattern, tokens, dy, x, gradient);
        },
        released);

    nb::class_<Experts>(m, "Experts")
        .def("__init__", [](Experts* self, Pattern pattern, uintptr_t ends, int64_t experts, int64_t rows) {
            new (self) Experts{pattern, (const int32_t*)ends, experts, rows};
        });
    m.def(
        "grouped_forward",
        [](const std::string& isa, int threads, Experts experts, const Limits& limits, Array values, uintptr_t bias,
           Array x, Array y) {
            return as_tuples(grouped_forward(kernels_named(isa), threads, experts, limits, values, (const float*)bias,
                                             x, y));
        },
        released);
    m.def(
        "grouped_grad_input",
        [](const std::string& isa, int threads, Experts experts, const Limits& limits, Array values, Array dy,
           Array dx) {
            return as_tuples(grouped_grad_input(kernels_named(isa), threads, experts, limits, values, dy, dx));
        },
        released);
    m.def(
        "grouped_grad_values",
        [](const std::string& isa, int threads, Experts experts, const Limits& limits, Array dy, Array x,
           Array gradient) {
            return as_tuples(grouped_grad_values(kernels_named(isa), threads, experts, limits, dy, x, gradient));
        },
        released);

    nb::class_<ExpertsOfOneToken>(m, "ExpertsOfOneToken")
        .def("__init__",
             [](ExpertsOfOneToken* self, const std::string& isa, Pattern pattern, int64_t experts, Array values) {
                 new (self) ExpertsOfOneToken{kernels_named(isa), pattern, experts, values};
             })
        .def(
            "multiply",
            [](const ExpertsOfOneToken& self, int threads, uintptr_t chosen, int64_t count, uintptr_t bias, uintptr_t x,
               int64_t apart, uintptr_t y) {
                self.multiply(threads, (const int64_t*)chosen, count, (const float*)bias, (const float*)x, apart,
                              (float*)y);
            },
            released);

    m.def("expand", &expand, released);
    m.def("gather", &gather, released);

    m.def(
        "mark_largest",
        [](Array scores, bool magnitudes, int64_t rows, int64_t columns,
           const std::vector<std::pair<int64_t, uintptr_t>>& sets, int threads) {
            std::vector<Marking> markings;
            for (auto [count, mask] : sets) markings.push_back({count, (uint8_t*)mask});
            mark_largest(scores, magnitudes, rows, columns, markings.data(), int(markings.size()), threads);
        },
        released);
    m.def(
        "block_norms",
        [](uintptr_t theta, int64_t rows, int64_t columns, int64_t height, int64_t width, uintptr_t norms, int threads) {
            block_norms((const float*)theta, rows, columns, height, width, (float*)norms, threads);
        },
        released);
    m.def(
        "count_rows",
        [](uintptr_t active, uintptr_t backward, Pattern pattern, int threads) {
            return count_rows((const uint8_t*)active, (const uint8_t*)backward, pattern, threads);
        },
        released);
    m.def(
        "fill_columns",
        [](uintptr_t active, uintptr_t backward, Pattern pattern, int threads) {
            fill_columns((const uint8_t*)active, (const uint8_t*)backward, pattern, threads);
        },
        released);
    m.def("is_sound", &is_sound, released);
    m.def(
        "mark_members",
        [](Pattern pattern, bool all, uintptr_t mask, int threads) {
            mark_members(pattern, all, (uint8_t*)mask, threads);
        },
        released);
    m.def("assemble", &assemble, released);
    m.def(
        "leave_out",
        [](Array numbers, uintptr_t mask, int64_t numel, int64_t marked, Array rest, int threads) {
            leave_out(numbers, (const uint8_t*)mask, numel, marked, rest, threads);
        },
        released);
    m.def(
        "rearrange",
        [](Pattern before, Pattern now, Array theta, uintptr_t backward, Array sources, Array values,
           Array reservoir, int threads) {
            rearrange(before, now, theta, (const uint8_t*)backward, sources, values, reservoir, threads);
        },
        released);
    m.def("count_from", &count_from, released);
    m.def("carry", &carry, released);
    m.def(
        "set_sizes",
        [](uintptr_t active, uintptr_t backward, int64_t numel, int threads) {
            SetSizes sizes = set_sizes((const uint8_t*)active, (const uint8_t*)backward, numel, threads);
            return std::vector<int64_t>{sizes.active, sizes.backward, sizes.torn};
        },
        released);
    m.def(
        "pack_bits",
        [](uintptr_t mask, int64_t numel, uintptr_t packed, int threads) {
            pack_bits((const uint8_t*)mask, numel, (uint8_t*)packed, threads);
        },
        released);
    m.def(
        "unpack_bits",
        [](uintptr_t packed, int64_t numel, uintptr_t mask, int threads) {
            unpack_bits((const uint8_t*)packed, numel, (uint8_t*)mask, threads);
        },
        released);
    m.def("set_digest", &set_digest, released);
}
