// Packing: reads the file's mapping where it lies (maybe unaligned, maybe transposed) and writes panels, many threads
// at once, so that loading a model runs at the speed of the disk or of the memory.
#include "pack.h"

#include <cstring>

#include "threads.h"

namespace quire {
namespace {

struct Job {
    const std::vector<Matrix>* parts;
    char* out;
    int64_t n, k, panel, k_block, k_blocks;
};

// Panels are packed a few K positions at a time, so that each line of a row-major source is read once.
template <class T> void pack_task(const void* context, int64_t task, int64_t) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t p = task / job.k_blocks, k0 = task % job.k_blocks * job.k_block;
    const int64_t k1 = k0 + job.k_block < job.k ? k0 + job.k_block : job.k;
    T* out = reinterpret_cast<T*>(job.out) + p * job.k * job.panel;
    constexpr int64_t kRun = 64 / sizeof(T);
    for (int64_t k = k0; k < k1; k += kRun) {
        const int64_t end = k + kRun < k1 ? k + kRun : k1;
        size_t at = 0;
        int64_t begin = 0;
        for (int64_t j = 0; j < job.panel; ++j) {
            const int64_t n = p * job.panel + j;
            if (n >= job.n) break;   // the memory is zero already
            while (n - begin >= (*job.parts)[at].n) begin += (*job.parts)[at++].n;
            const Matrix& m = (*job.parts)[at];
            const char* from = m.data + (n - begin) * m.n_stride + k * m.k_stride;
            for (int64_t i = k; i < end; ++i, from += m.k_stride) std::memcpy(out + i * job.panel + j, from, sizeof(T));
        }
    }
}

}  // namespace

PackedLinear::PackedLinear(const Kernels& kernels_, const std::vector<Matrix>& parts, DType dtype)
    : kernels(kernels_), panels{nullptr, dtype, 0, parts[0].k, kernels_.panel} {
    for (const Matrix& part : parts) panels.n += part.n;
    const int64_t count = (panels.n + panels.panel - 1) / panels.panel;
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    nbytes = count * panels.panel * panels.k * size;
    void* memory = allocate_large(static_cast<size_t>(nbytes));
    panels.data = memory;
    Job job{&parts, static_cast<char*>(memory), panels.n, panels.k, panels.panel, 2048, (panels.k + 2047) / 2048};
    run_tasks(count * job.k_blocks, size == 4 ? pack_task<uint32_t> : pack_task<uint16_t>, &job);
}

PackedLinear::~PackedLinear() { free_large(const_cast<void*>(panels.data), static_cast<size_t>(nbytes)); }

}  // namespace quire
