// Measures with the threads of the pool, so that the limits are those of the threads that will run a model. What is wanted is
// what the machine can do, so the best of many short tries counts: another process, or another guest of the same host, only
// ever takes away.
#include "limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "threads.h"

namespace quire {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int64_t kIterations = 20000;                // of a task; about 0.1 ms
constexpr int kRounds = 100;
constexpr int kRegions = 501;                         // odd, for the median; asleep a tenth of it
constexpr auto kAlone = std::chrono::milliseconds(2);
constexpr auto kUntilAsleep = std::chrono::milliseconds(1);   // far longer than a thread waits awake for the next region

struct ReadJob { const Kernels& kernels; float* data; int64_t floats, chunk; bool apart; };

int64_t chunks(const ReadJob& job) { return (job.floats + job.chunk - 1) / job.chunk; }

void fill_task(const void* context, int64_t task, int64_t) {
    const auto& job = *static_cast<const ReadJob*>(context);
    const int64_t begin = task * job.chunk;
    std::fill_n(job.data + begin, std::min(job.chunk, job.floats - begin), 1.0f);
}

std::atomic<double> sink;  // several threads write it, and nobody reads it

void read_task(const void* context, int64_t task, int64_t) {
    const auto& job = *static_cast<const ReadJob*>(context);
    const int64_t begin = task * job.chunk;
    sink.store(job.kernels.read_sum(job.data + begin, std::min(job.chunk, job.floats - begin), job.apart), std::memory_order_relaxed);
}

}  // namespace

double measure_read_bandwidth(const Kernels& kernels, int64_t bytes, double seconds) {
    ReadJob job{kernels, nullptr, bytes / static_cast<int64_t>(sizeof(float)), 0, false};
    // A megabyte at a time, or less where that would leave threads without work.
    job.chunk = std::clamp<int64_t>(job.floats / (8 * num_threads()) / 1024 * 1024, 1024, int64_t{1} << 18);
    job.data = static_cast<float*>(allocate_large(static_cast<size_t>(bytes)));
    run_tasks(chunks(job), fill_task, &job);
    double best = 0;
    const auto begin = Clock::now();
    for (int pass = 0; pass < 4 || seconds_since(begin) < seconds; ++pass) {
        job.apart = pass % 2;
        const auto start = Clock::now();
        run_tasks(chunks(job), read_task, &job);
        best = std::max(best, static_cast<double>(bytes) / seconds_since(start) / 1e9);
    }
    free_large(job.data, static_cast<size_t>(bytes));
    return best;
}

double measure_peak(int64_t (*loop)(int64_t)) {
    struct Job { int64_t (*loop)(int64_t); std::atomic<int64_t> operations; };
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
        Job job{loop, 0};
        const auto start = Clock::now();
        run_tasks(4 * num_threads(), [](const void* context, int64_t, int64_t) {
            auto& j = *static_cast<Job*>(const_cast<void*>(context));
            j.operations.fetch_add(j.loop(kIterations), std::memory_order_relaxed);
        }, &job);
        best = std::max(best, static_cast<double>(job.operations) / seconds_since(start) / 1e9);
    }
    return best;
}

double measure_region(bool together, bool asleep) {
    struct Job { int threads; std::atomic<int> here; };
    std::vector<double> times(asleep ? kRegions / 10 : kRegions);
    for (double& time : times) {
        Job job{together ? num_threads() : 1, 0};
        if (asleep) std::this_thread::sleep_for(kUntilAsleep);
        const auto start = Clock::now();
        run_tasks(num_threads(), [](const void* context, int64_t, int64_t) {
            auto& j = *static_cast<Job*>(const_cast<void*>(context));
            if (j.threads == 1) return;
            j.here.fetch_add(1);
            // A thread that does not come at all (its core is busy) must not hang the measurement.
            for (const auto until = Clock::now() + kAlone; j.here.load() < j.threads && Clock::now() < until;) {}
        }, &job);
        time = seconds_since(start);
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

}  // namespace quire
