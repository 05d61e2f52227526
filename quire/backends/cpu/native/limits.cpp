// Measures with the threads of the pool, so that the limits are those of the threads that will run a model.
#include "limits.h"

#include <algorithm>
#include <chrono>

#include "threads.h"

namespace quire {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int64_t kFloats = int64_t{512} << 18;        // 512 MiB, far more than any cache holds
constexpr int64_t kChunk = int64_t{1} << 18;
constexpr int64_t kIterations = 20000;                // of a task; about 0.1 ms
constexpr int kRounds = 100;                           // short ones, so that a busy machine shows its peak in some

struct Job { const Kernels& kernels; float* data; };

volatile double sink;

}  // namespace

double measure_read_bandwidth(const Kernels& kernels) {
    const size_t bytes = static_cast<size_t>(kFloats) * sizeof(float);
    const Job job{kernels, static_cast<float*>(allocate_large(bytes))};
    run_tasks(kFloats / kChunk, [](const void* context, int64_t task, int64_t) {
        float* data = static_cast<const Job*>(context)->data;
        std::fill_n(data + task * kChunk, kChunk, 1.0f);
    }, &job);
    double best = 0;
    for (int round = 0; round < 3; ++round) {
        const auto start = Clock::now();
        run_tasks(kFloats / kChunk, [](const void* context, int64_t task, int64_t) {
            const Job& j = *static_cast<const Job*>(context);
            sink = j.kernels.read_sum(j.data + task * kChunk, kChunk);
        }, &job);
        best = std::max(best, static_cast<double>(bytes) / seconds_since(start) / 1e9);
    }
    free_large(job.data, bytes);
    return best;
}

double measure_fma_peak(const Kernels& kernels) {
    const int64_t tasks = 4 * num_threads();
    const Job job{kernels, nullptr};
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
        const auto start = Clock::now();
        run_tasks(tasks, [](const void* context, int64_t, int64_t) {
            sink = static_cast<const Job*>(context)->kernels.fma_loop(kIterations);
        }, &job);
        best = std::max(best, static_cast<double>(tasks * kIterations * kernels.fma_flops) / seconds_since(start) / 1e9);
    }
    return best;
}

}  // namespace quire
