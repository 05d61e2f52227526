// Packing: reads the file's mapping where it lies (maybe unaligned, maybe transposed) and writes panels, many threads
// at once, so that loading a model runs at the speed of the disk or of the memory.
#include "pack.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "quantized.h"
#include "threads.h"

namespace quire {
namespace {

struct Job {
    const std::vector<Matrix>* parts;
    char* out;
    int64_t n, k, panel, k_block, k_blocks;
    bool turns, pairs;   // the columns of two vectors take turns, or two positions of K lie together, as in Panels
};

constexpr int64_t kMaxPanel = 64;

// A panel is packed a cache line of each column at a time, turned in a buffer. Columns that lie side by side in memory
// (a transposed view) are copied as they are.
template <class T> void pack_task(const void* context, int64_t task, int64_t) {
    const Job& job = *static_cast<const Job*>(context);
    constexpr int64_t kRun = 64 / sizeof(T);
    const int64_t panel = job.panel, p = task / job.k_blocks, k0 = task % job.k_blocks * job.k_block;
    const int64_t k1 = std::min(k0 + job.k_block, job.k), columns = std::min(panel, job.n - p * panel);
    const int64_t positions = job.pairs ? job.k + job.k % 2 : job.k;
    T* const out = reinterpret_cast<T*>(job.out) + p * positions * panel;   // columns and positions that don't exist stay 0

    const char* column[kMaxPanel];
    int64_t k_stride[kMaxPanel], place[kMaxPanel];
    bool side_by_side = !job.turns && !job.pairs;
    size_t part = 0;
    for (int64_t j = 0, begin = 0; j < columns; ++j) {
        const int64_t n = p * panel + j;
        while (n - begin >= (*job.parts)[part].n) begin += (*job.parts)[part++].n;
        const Matrix& m = (*job.parts)[part];
        column[j] = m.data + (n - begin) * m.n_stride;
        k_stride[j] = m.k_stride;
        const int64_t vector = panel / 4, pair = j / (2 * vector) * 2 * vector;
        place[j] = job.pairs ? 2 * j : job.turns ? pair + (j - pair) % vector * 2 + (j - pair) / vector : j;
        side_by_side &= column[j] == column[0] + j * static_cast<int64_t>(sizeof(T)) && k_stride[j] == k_stride[0];
    }
    if (side_by_side) {
        for (int64_t k = k0; k < k1; ++k)
            std::memcpy(out + k * panel, column[0] + k * k_stride[0], static_cast<size_t>(columns) * sizeof(T));
        return;
    }
    T buffer[kMaxPanel][kRun];
    for (int64_t k = k0; k < k1; k += kRun) {
        const int64_t run = std::min(kRun, k1 - k);
        for (int64_t j = 0; j < columns; ++j) {
            const char* from = column[j] + k * k_stride[j];
            if (run == kRun && k_stride[j] == sizeof(T)) {
                std::memcpy(buffer[j], from, 64);
            } else {
                for (int64_t i = 0; i < run; ++i) std::memcpy(&buffer[j][i], from + i * k_stride[j], sizeof(T));
            }
        }
        for (int64_t i = 0; i < run; ++i) {
            T* row = out + (job.pairs ? (k + i) / 2 * 2 * panel + i % 2 : (k + i) * panel);
            for (int64_t j = 0; j < columns; ++j) row[place[j]] = buffer[j][i];
        }
    }
}

// Gate and up as the parts of a linear that is not gated: half a panel of each in turn, and zeros for what the last halves lack.
std::vector<Matrix> interleaved(const Matrix& gate, const Matrix& up, int64_t half) {
    static constexpr char kZero[sizeof(float)] = {};
    std::vector<Matrix> parts;
    for (int64_t at = 0; at < gate.n; at += half) {
        const int64_t n = std::min(half, gate.n - at);
        for (const Matrix& m : {gate, up}) {
            parts.push_back({m.data + at * m.n_stride, n, m.k, m.n_stride, m.k_stride});
            if (n < half) parts.push_back({kZero, half - n, m.k, 0, 0});
        }
    }
    return parts;
}

// Memory on huge pages, given back with its last user.
std::shared_ptr<void> shared_memory(int64_t bytes) {
    const auto size = static_cast<size_t>(bytes);
    return {allocate_large(size), [size](void* p) { free_large(p, size); }};
}

Panels of_parts(const Kernels& kernels, const std::vector<Matrix>& parts, DType dtype, int64_t bits, int64_t group, bool gated,
                Coding coding = Coding::integers) {
    Panels p{nullptr, dtype, parts[0].n, parts[0].k, kernels.panel, bits, group, gated, coding};
    if (!gated)
        for (size_t i = 1; i < parts.size(); ++i) p.n += parts[i].n;
    return p;
}

// The columns of all panels, and how they are to lie: as of a linear that is not gated.
std::vector<Matrix> columns_of(const Panels& p, const std::vector<Matrix>& parts) {
    return p.gated ? interleaved(parts[0], parts[1], panel_outputs(p)) : parts;
}
Panels ungated(const Panels& p) {
    Panels all = p;
    if (p.gated) all.n = panel_count(p) * p.panel, all.gated = false;
    return all;
}

}  // namespace

Readings& readings_of(const Kernels& kernels, const Panels& p, bool grouped) {   // a kilobyte for each shape
    static std::mutex mutex;
    static std::map<std::tuple<const Kernels*, DType, int64_t, int64_t, int64_t, int64_t, bool, Coding, bool>, Readings> all;
    const std::lock_guard lock(mutex);
    return all[{&kernels, p.dtype, p.bits, p.group, p.n, p.k, p.gated, p.coding, grouped}];
}

int64_t packed_bytes(const Panels& p) {
    return panel_count(p) * (p.bits ? quant_layout(p).panel_bytes : p.panel * panel_positions(p) * (p.dtype == DType::f32 ? 4 : 2));
}

PackedLinear::PackedLinear(const Kernels& kernels_, const Panels& panels_)
    : kernels(kernels_), panels(panels_), nbytes(packed_bytes(panels_)), readings(readings_of(kernels, panels, false)) {}

PackedLinear::PackedLinear(const Kernels& kernels_, const std::vector<Matrix>& parts, DType dtype, int64_t bits, int64_t group, bool gated)
    : kernels(kernels_), panels(of_parts(kernels_, parts, dtype, bits, group, gated)), nbytes(packed_bytes(panels)),
      readings(readings_of(kernels, panels, false)) {
    void* memory = allocate();
    const std::vector<Matrix> columns = columns_of(panels, parts);
    const Panels whole = ungated(panels);
    if (bits) {
        kernels.pack_quantized({columns.data(), dtype, whole, memory});
        return;
    }
    Job job{&columns, static_cast<char*>(memory), whole.n, panels.k, panels.panel, 2048, (panels.k + 2047) / 2048,
            dtype == DType::bf16 && !pairs_positions(panels), pairs_positions(panels)};
    run_tasks(count() * job.k_blocks, dtype == DType::f32 ? pack_task<uint32_t> : pack_task<uint16_t>, &job);
}

PackedLinear::PackedLinear(const Kernels& kernels_, const std::vector<Matrix>& parts, Format format, int64_t group, Coding coding,
                           bool gated)
    : kernels(kernels_), panels(of_parts(kernels_, parts, DType::f32, 4, group, gated, coding)), nbytes(packed_bytes(panels)),
      readings(readings_of(kernels, panels, false)) {
    void* memory = allocate();
    kernels.repack({columns_of(panels, parts).data(), format, ungated(panels), memory});
}

void* PackedLinear::allocate() {
    memory_ = shared_memory(nbytes);
    panels.data = memory_.get();
    return memory_.get();
}

void PackedLinear::gather(const std::vector<PackedLinear*>& linears) {
    const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    int64_t size = 0;
    for (const PackedLinear* each : linears) size += each->memory_ ? lines(each->nbytes) : 0;
    if (!size) return;
    const std::shared_ptr<void> all = shared_memory(size);
    char* at = static_cast<char*>(all.get());
    for (PackedLinear* each : linears) {
        if (!each->memory_) continue;
        std::memcpy(at, each->panels.data, static_cast<size_t>(each->nbytes));
        each->panels.data = at;
        each->memory_ = all;
        at += lines(each->nbytes);
    }
}

}  // namespace quire
