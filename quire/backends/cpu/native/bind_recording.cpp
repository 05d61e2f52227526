// Binding of recordings.
#include "recording.h"

namespace quire {

void bind_recording(nb::module_& m) {
    nb::class_<Recording>(m, "Recording")
        .def(nb::init<>())
        .def("__enter__", [](nb::object self) {
            nb::cast<Recording&>(self).start();
            return self;
        })
        .def("__exit__", [](Recording& self, const nb::args&) { self.stop(); })
        .def("__len__", &Recording::size)
        .def("run", [](const Recording& self) {
            require(Recording::open() == nullptr, "a recording is open on this thread: it can't run another");
            nb::gil_scoped_release release;
            self.run();
        });
}

}  // namespace quire
