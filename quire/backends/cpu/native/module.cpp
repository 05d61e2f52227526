// quire.backends.cpu._native: bindings only. What each function promises is written in _native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>

#include "arrays.h"
#include "dispatch.h"
#include "recording.h"
#include "threads.h"

NB_MODULE(_native, m) {
    using namespace quire;
    if (const char* name = std::getenv("QUIRE_ISA"); name && *name) {
        try {
            select_isa(name);
        } catch (const std::exception& e) {
            throw nb::import_error((std::string("QUIRE_ISA: ") + e.what()).c_str());
        }
    }
    m.def("isa", [] { return active_kernels().name; });
    m.def("available_isas", available_isas);
    m.def("set_isa", select_isa, nb::arg("name"));
    m.def("num_threads", num_threads);
    m.def("set_num_threads", [](int n) {
        require(n >= 1 && n <= kMaxThreads, "the number of threads must be 1 to " + std::to_string(kMaxThreads) +
                                                ", not " + std::to_string(n));
        nb::gil_scoped_release release;
        set_num_threads(n);
    }, nb::arg("n"));
    m.def("default_num_threads", default_num_threads);
    m.def("cpu_quota", [](const std::string& root) -> std::optional<double> {
        const double cpus = cpu_quota(root);
        return cpus > 0 ? std::optional(cpus) : std::nullopt;
    }, nb::arg("root") = "/");
    bind_limits(m);
    bind_layers(m);
    bind_cache(m);
    bind_sampling(m);
    bind_recording(m);
}
