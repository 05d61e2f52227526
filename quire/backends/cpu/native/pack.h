// Weights of a linear layer, packed once into the order in which the inner loop reads them.
#pragma once
#include <vector>

#include "kernels.h"

namespace quire {

// A matrix somewhere in memory, at any address and with any strides (in bytes).
struct Matrix {
    const char* data;
    int64_t n, k, n_stride, k_stride;
};

class PackedLinear {
public:
    PackedLinear(const Kernels& kernels, const std::vector<Matrix>& parts, DType dtype);
    ~PackedLinear();
    PackedLinear(const PackedLinear&) = delete;
    PackedLinear& operator=(const PackedLinear&) = delete;

    const Kernels& kernels;   // the packing is made for one instruction set, and runs on that one
    Panels panels;
    int64_t nbytes;
    const PackedLinear* then = nullptr;   // what is read after it; must outlive it
    int64_t count() const { return (panels.n + panels.panel - 1) / panels.panel; }
};

}  // namespace quire
