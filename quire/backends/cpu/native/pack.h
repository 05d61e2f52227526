// Weights of a linear layer, packed once into the order in which the inner loop reads them: Panels in kernels.h for floats,
// quantized.h for 8 and 4 bits. The bytes depend on the width of a panel, which the instruction set decides, and on nothing
// else of the machine: they may be kept in a file and mapped where the width is the same.
#pragma once
#include <vector>

#include "kernels.h"
#include "trial.h"

namespace quire {

// Which Reading is fastest for linears of one shape: of the layers of a model each finds out a part.
struct Readings {
    // For each number of rows up to kRowsBeside, from there on for each number of tiles of so many.
    Trial trials[kRowsBeside - 1 + kRowsShort / kRowsBeside];
};

class PackedLinear {
public:
    // Packs parts of one dtype, concatenated along n, or two of one shape, gate and up, where gated; bits and group as in Panels.
    PackedLinear(const Kernels& kernels, const std::vector<Matrix>& parts, DType dtype, int64_t bits, int64_t group, bool gated);
    // Likewise, parts that are rows of 4-bit blocks (RepackArgs).
    PackedLinear(const Kernels& kernels, const std::vector<Matrix>& parts, Format format, int64_t group, bool offsets, bool gated);
    // Uses packed bytes where they are: panels.data must stay, and hold packed_bytes(panels).
    PackedLinear(const Kernels& kernels, const Panels& panels);
    ~PackedLinear();
    PackedLinear(const PackedLinear&) = delete;
    PackedLinear& operator=(const PackedLinear&) = delete;

    const Kernels& kernels;   // the packing is made for one instruction set, and runs on that one
    Panels panels;
    int64_t nbytes;
    const PackedLinear* then = nullptr;   // what is read after it; must outlive it
    int64_t count() const { return panel_count(panels); }

    // Calls work(Reading) with the one that is fastest for so many rows, which is found out meanwhile.
    template <class Work> void read(int64_t rows, const Work& work) const {
        if (rows > kRowsShort) return work(Reading::slices);
        const bool few = rows <= kRowsBeside;
        Trial& trial = readings_.trials[few ? rows - 1 : kRowsBeside - 1 + (rows - 1) / kRowsBeside];
        trial.run(few ? kReadings : kReadings - 1, [&](int way) { work(static_cast<Reading>(way)); });
    }

private:
    void* allocate();

    bool owned_;
    Readings& readings_;
};

int64_t packed_bytes(const Panels& panels);

}  // namespace quire
