// What the machine can do at most with the pool's threads: what `quire doctor` prints and benchmarks compare with.
#pragma once
#include "kernels.h"

namespace quire {
// GB/s of reading `bytes` again and again: the fastest pass within `seconds`, of at least 3.
double measure_read_bandwidth(const Kernels& kernels, int64_t bytes, double seconds);
// G operations/s of a loop of the kernels', which returns how many it did: two for a multiply-add.
double measure_peak(int64_t (*loop)(int64_t iterations));
// Seconds of a region with nothing to do, median; `together`: it ends when every thread of the pool has taken a task, which an
// empty region does not wait for; `asleep`: the threads have gone to sleep before it.
double measure_region(bool together, bool asleep);
}
