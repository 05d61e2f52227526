// Bindings of what measures the machine.
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

}  // namespace

void bind_limits(nb::module_& m) {
    const nb::call_guard<nb::gil_scoped_release> released;
    m.def("measure_read_bandwidth", read_bandwidth, nb::arg("bytes") = int64_t{512} << 20, nb::arg("seconds") = 0.2);
    m.def("measure_fma_peak", [] { return measure_fma_peak(active_kernels()); }, released);
    m.def("measure_int8_peak", [] { return measure_int8_peak(active_kernels()); }, released);
    m.def("measure_region", measure_region, nb::arg("together") = false, nb::arg("asleep") = false, released);
}

}  // namespace quire
