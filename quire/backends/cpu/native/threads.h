// The thread pool. A region is n independent tasks; threads take them from one counter, so that a core that another
// process keeps busy delays its own task and nothing else. Results never depend on who runs a task.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace quire {

// next: the task that this thread will probably run afterwards (to prefetch for), or -1.
using TaskFn = void (*)(const void* context, int64_t task, int64_t next);

// Runs fn for every task in [0, n) and returns when all are done. The caller takes part. What a task throws (there is no memory for its
// scratch) ends the region, and is thrown on. Subnormals are kept in all tasks, whatever the caller's floating-point mode.
void run_tasks(int64_t n, TaskFn fn, const void* context);

int num_threads();
void set_num_threads(int n);      // 1..kMaxThreads
constexpr int kMaxThreads = 256;
int default_num_threads();        // what affinity and the control group's CPU quota allow (cpus.cpp)
// CPUs that the quotas of this process's control group and of those above it are worth, at least 0.01; 0 without a quota.
// root: where /proc and /sys are found.
double cpu_quota(const std::string& root = "/");

// Memory of this thread, 64-byte aligned, at least `bytes`, contents undefined; valid until the next call with the
// same slot on the same thread. Kernels that may be active at the same time on one thread use different slots.
enum Scratch {
    kScratchTasks, kScratchExperts, kScratchGemm, kScratchQuantized, kScratchAttention, kScratchShared, kScratchSampler, kScratchHistory, kScratchSlots
};
void* thread_scratch(Scratch slot, size_t bytes);

// Zeroed memory on huge pages where the system gives them; for weights.
void* allocate_large(size_t bytes);
void free_large(void* p, size_t bytes);

}  // namespace quire
