// Weights of a linear layer, packed once into the order in which the inner loop reads them: Panels in kernels.h for floats,
// quantized.h for 8 and 4 bits. The bytes depend on the width of a panel, which the instruction set decides, and on nothing
// else of the machine: they may be kept in a file and mapped where the width is the same.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"
#include "trial.h"

namespace quire {

// Which Reading is fastest for linears of one shape: of the layers of a model each finds out a part.
struct Readings {
    // For each number of rows up to kRowsBeside, from there on for each number of tiles of so many.
    Trial trials[kRowsBeside - 1 + kRowsShort / kRowsBeside];

    // Calls work(Reading) with the one that is fastest for so many rows, which is found out meanwhile. matrices: that are read.
    template <class Work> void read(int64_t rows, int64_t matrices, const Work& work) {
        if (rows > kRowsShort) return work(Reading::slices);
        const bool few = rows <= kRowsBeside;
        Trial& trial = trials[few ? rows - 1 : kRowsBeside - 1 + (rows - 1) / kRowsBeside];
        trial.run(few ? kReadings : kReadings - 1, [&](int way) { work(static_cast<Reading>(way)); }, static_cast<float>(matrices));
    }
};

class PackedLinear {
public:
    // Packs parts of one dtype, concatenated along n, or two of one shape, gate and up, where gated; bits and group as in Panels.
    PackedLinear(const Kernels& kernels, const std::vector<Matrix>& parts, DType dtype, int64_t bits, int64_t group, bool gated);
    // Likewise, parts that are rows of 4-bit blocks (RepackArgs).
    PackedLinear(const Kernels& kernels, const std::vector<Matrix>& parts, Format format, int64_t group, Coding coding, bool gated);
    // Uses packed bytes where they are: panels.data must stay, and hold packed_bytes(panels).
    PackedLinear(const Kernels& kernels, const Panels& panels);
    PackedLinear(const PackedLinear&) = delete;
    PackedLinear& operator=(const PackedLinear&) = delete;

    const Kernels& kernels;   // the packing is made for one instruction set, and runs on that one
    Panels panels;
    int64_t nbytes;
    const PackedLinear* then = nullptr;   // what is read after it; must outlive it
    int64_t count() const { return panel_count(panels); }

    Readings& readings;

    void run(LinearArgs args, Reading reading) const {
        args.reading = reading;
        (panels.bits ? kernels.linear_quantized : kernels.linear)(args);
    }
    // Is what comes after `args`, at `data`: its own bytes, or those of one that is like it.
    void follow(LinearArgs& args, const void* data) const {
        args.then = data, args.then_panels = count(), args.then_panel_bytes = nbytes / count();
    }

    // Moves the bytes of linears side by side, where they own them: each alone would leave a huge page partly empty, or have none.
    static void gather(const std::vector<PackedLinear*>& linears);

private:
    void* allocate();

    std::shared_ptr<void> memory_;        // null where the bytes are somebody else's
};

int64_t packed_bytes(const Panels& panels);

// Those of all linears that are packed alike; kept to the end of the process. grouped: where groups of rows meet weights of their own.
Readings& readings_of(const Kernels& kernels, const Panels& panels, bool grouped);

}  // namespace quire
