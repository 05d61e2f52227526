// Bindings of what measures the machine.
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "dispatch.h"
#include "limits.h"

namespace quire {
namespace {

double read_bandwidth(int64_t bytes, double seconds) {
    require(bytes >= 4096, "bytes must be at least 4096, not " + std::to_string(bytes));
    require(seconds >= 0 && seconds <= 60, "seconds must be 0 to 60");
    nb::gil_scoped_release release;
    return measure_read_bandwidth(active_kernels(), bytes, seconds);
}

std::string arithmetic(const std::string& dtype) {
    const Kernels& kernels = active_kernels();
    if (dtype == "int8" || dtype == "int4") return "int8";
    if (dtype == "bfloat16" && kernels.bf16_loop != kernels.fma_loop) return dtype;
    require(dtype == "float32" || dtype == "float16" || dtype == "bfloat16",
            "dtype '" + dtype + "' is unknown: choose float32, float16, bfloat16, int8 or int4");
    return "float32";
}

double peak(const std::string& kind) {
    const Kernels& kernels = active_kernels();
    const auto loop = kind == "float32" ? kernels.fma_loop : kind == "bfloat16" ? kernels.bf16_loop : kind == "int8" ? kernels.int8_loop : nullptr;
    require(loop != nullptr, "arithmetic '" + kind + "' is unknown: choose float32, bfloat16 or int8");
    nb::gil_scoped_release release;
    return measure_peak(loop);
}

}  // namespace

void bind_limits(nb::module_& m) {
    const nb::call_guard<nb::gil_scoped_release> released;
    m.def("measure_read_bandwidth", read_bandwidth, nb::arg("bytes") = int64_t{512} << 20, nb::arg("seconds") = 0.2);
    m.def("arithmetic", arithmetic, nb::arg("dtype"));
    m.def("measure_peak", peak, nb::arg("arithmetic"));
    m.def("measure_region", measure_region, nb::arg("together") = false, nb::arg("asleep") = false, released);
}

}  // namespace quire
