// What the machine can do at most: the two numbers that the benchmark compares a run with.
#pragma once
#include "kernels.h"

namespace quire {
double measure_read_bandwidth(const Kernels& kernels);   // GB/s
double measure_fma_peak(const Kernels& kernels);         // GFLOP/s, float32
}
