// Kernel calls that come again: recorded once with their arguments, then run without what comes before a kernel, which is
// checking and Python. Addresses and shapes stay; what the arrays hold may be another thing each time, and is checked again.
#pragma once
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"

namespace quire {

class Recording {
public:
    // From here to stop(), what this thread calls is kept as well.
    void start() {
        require(!open_, "a recording is open on this thread already: only one at a time");
        calls_.clear();
        open_ = this;
    }
    void stop() {
        if (open_ == this) open_ = nullptr;
    }
    void run() const {
        for (const auto& call : calls_) call();
    }
    void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
    size_t size() const { return calls_.size(); }

    static Recording* open() { return open_; }

    Recording() = default;
    ~Recording() { stop(); }
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

private:
    inline static thread_local Recording* open_ = nullptr;
    std::vector<std::function<void()>> calls_;
};

// Runs a kernel's call without the GIL and returns what it returns. A recording keeps it, with the arrays whose memory it
// uses. The call looks at nothing but values and that memory; ids in there are for the call to check.
template <class Call, class... Kept> auto run_kernel(const Call& call, const Kept&... arrays) {
    if (Recording* recording = Recording::open())
        recording->add([call, kept = std::make_tuple(arrays...)] { static_cast<void>(call()); });
    nb::gil_scoped_release release;
    return call();
}

void bind_recording(nb::module_& m);

}  // namespace quire
