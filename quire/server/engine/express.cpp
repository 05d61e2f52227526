// quire.server.engine._express: the way of a token with nothing else to it, from the step's message to its client's socket. What
// each name promises is written in _express.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <sys/socket.h>

#include <charconv>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace {

struct Express {
    nb::list emitted;
    nb::object texts;
    std::string before, after;
    int fd = -1;
    bool waits = false, between = false;
    double last = 0;
    int64_t taken = 0;

    bool open() const { return waits && between && fd >= 0; }
};

std::string_view bytes_of(nb::handle object) {
    return {PyBytes_AS_STRING(object.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(object.ptr()))};
}

// A part of a chunked body (RFC 9112, section 7.1).
void add_chunk(std::string& to, std::string_view before, std::string_view text, std::string_view after) {
    char size[16];
    const auto end = std::to_chars(size, size + sizeof size, before.size() + text.size() + after.size(), 16).ptr;
    to.append(size, end).append("\r\n").append(before).append(text).append(after).append("\r\n");
}

// One sequence's event in the buffer of all events.
struct Event {
    Express* way;
    PyObject* request_id;   // the message holds it
    size_t from, to, sent = 0;
};

// When the tokens before were made, and of how many sequences: most go in step.
class Intervals {
public:
    void add(double last) {
        for (auto& [since, count] : counts_)
            if (since == last) return void(++count);
        counts_.emplace_back(last, 1);
    }
    nb::list list() const {
        nb::list made;
        for (const auto& [since, count] : counts_) made.append(nb::make_tuple(since, count));
        return made;
    }

private:
    std::vector<std::pair<double, int64_t>> counts_;
};

// The text of a token as the table has it. Not bytes: there is none. A table that fails has none either: who reads it next will say so.
nb::object text_of(const Express& way, PyObject* token) {
    PyObject* text = PyObject_GetItem(way.texts.ptr(), token);
    if (!text) PyErr_Clear();
    return nb::steal(text);
}

nb::tuple carry(nb::list tokens, nb::dict ways, double now) {
    thread_local std::string buffer;
    std::vector<Event> events;
    Intervals intervals;
    nb::list left, unsent;
    buffer.clear();
    for (nb::handle item : tokens) {
        PyObject* request_id = PyTuple_GET_ITEM(item.ptr(), 0);
        PyObject* found = PyDict_GetItemWithError(ways.ptr(), request_id);
        Express* way = found ? nb::inst_ptr<Express>(found) : nullptr;
        PyObject* token = PyTuple_GET_ITEM(item.ptr(), 2);
        const nb::object text = way && way->open() ? text_of(*way, token) : nb::object();
        if (!text.is_valid() || !PyBytes_Check(text.ptr())) {
            left.append(item);
            continue;
        }
        way->emitted.append(nb::handle(token));
        intervals.add(std::exchange(way->last, now));
        ++way->taken;
        const size_t from = buffer.size();
        add_chunk(buffer, way->before, bytes_of(text), way->after);
        events.push_back({way, request_id, from, buffer.size()});
    }
    {
        nb::gil_scoped_release release;
        for (Event& event : events) {
            const ssize_t sent = ::send(event.way->fd, buffer.data() + event.from, event.to - event.from, MSG_DONTWAIT);
            event.sent = sent > 0 ? static_cast<size_t>(sent) : 0;
        }
    }
    for (const Event& event : events) {
        const size_t from = event.from + event.sent;
        if (from == event.to) continue;
        event.way->fd = -1;
        unsent.append(nb::make_tuple(nb::borrow(event.request_id), nb::bytes(buffer.data() + from, event.to - from)));
    }
    return nb::make_tuple(left, intervals.list(), unsent);
}

}  // namespace

NB_MODULE(_express, m) {
    nb::class_<Express>(m, "Express")
        .def("__init__", [](Express* self, nb::list emitted, nb::object texts, nb::bytes before, nb::bytes after) {
            new (self) Express{std::move(emitted), std::move(texts), std::string(bytes_of(before)), std::string(bytes_of(after))};
        }, nb::arg("emitted"), nb::arg("texts"), nb::arg("before"), nb::arg("after"))
        .def_rw("fd", &Express::fd)
        .def_rw("waits", &Express::waits)
        .def_rw("between", &Express::between)
        .def_rw("last", &Express::last)
        .def_rw("taken", &Express::taken);
    m.def("carry", carry, nb::arg("tokens"), nb::arg("ways"), nb::arg("now"));
}
