// The Python module `_native`: addresses and sizes in, no tensor type known. The interpreter is released meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dense.h"
#include "few_tokens.h"
#include "isa.h"
#include "products.h"

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

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Masked products on CPUs; called by cpu.py and expanded.py; handover.py checks every argument.";
    auto released = nb::call_guard<nb::gil_scoped_release>();

    nb::class_<Array>(m, "Array").def(nb::init<uintptr_t, int>());
    nb::class_<Pattern>(m, "Pattern").def(nb::init<Array, Array, int64_t, int64_t, int64_t, int64_t>());
    nb::class_<Schedule>(m, "Schedule").def(nb::init<int, int, int, int>());

    nb::class_<OneToken>(m, "OneToken")
        .def(nb::init<const std::string&, Pattern, Array, uintptr_t>())
        .def("multiply", &OneToken::multiply, released);

    m.def("instruction_sets", [] {
        std::vector<std::pair<std::string, int>> names;
        for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name, kernels->width);
        return names;
    });
    m.def(
        "forward",
        [](const std::string& isa, Schedule schedule, Pattern pattern, Array values, uintptr_t bias, int64_t tokens,
           Array x, Array y) {
            forward(kernels_named(isa), schedule, pattern, values, (const float*)bias, tokens, x, y);
        },
        released);
    m.def(
        "forward_few",
        [](const std::string& isa, Schedule schedule, Pattern pattern, Array values, uintptr_t bias, int64_t tokens,
           Array x, Array y) {
            forward_few(kernels_named(isa), schedule, pattern, values, (const float*)bias, tokens, x, y);
        },
        released);
    m.def(
        "forward_dots",
        [](const std::string& isa, int threads, Pattern pattern, Array values, uintptr_t bias, int64_t tokens,
           uintptr_t x, uintptr_t y) {
            forward_dots(kernels_named(isa), threads, pattern, values, (const float*)bias, tokens, (const float*)x,
                         (float*)y);
        },
        released);
    m.def(
        "grad_input_few",
        [](const std::string& isa, Schedule schedule, Pattern pattern, Array values, int64_t tokens, Array dy,
           Array dx) { grad_input_few(kernels_named(isa), schedule, pattern, values, tokens, dy, dx); },
        released);
    m.def(
        "grad_values_few",
        [](const std::string& isa, Schedule schedule, Pattern pattern, int64_t tokens, Array dy, Array x,
           Array gradient) { grad_values_few(kernels_named(isa), schedule, pattern, tokens, dy, x, gradient); },
        released);
    m.def(
        "grad_input",
        [](const std::string& isa, Schedule schedule, Pattern pattern, Array values, int64_t tokens, Array dy,
           Array dx) { grad_input(kernels_named(isa), schedule, pattern, values, tokens, dy, dx); },
        released);
    m.def(
        "grad_values",
        [](const std::string& isa, Schedule schedule, Pattern pattern, int64_t tokens, Array dy, Array x,
           Array gradient) { grad_values(kernels_named(isa), schedule, pattern, tokens, dy, x, gradient); },
        released);
    m.def("expand", &expand, released);
    m.def("gather", &gather, released);
}
