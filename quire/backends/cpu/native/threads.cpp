// The pool: workers spin for a moment after a region, because the next one usually follows within microseconds, and
// then sleep. The caller waits only for workers that have joined: one that never woke up can't hold it back. The same
// rule makes a forked child safe, which has no workers at all.
//
// A core that another process wants as well is taken from a worker when its time slice ends, most likely in the middle
// of a task, and then everybody waits for that task until the other's slice has ended too: milliseconds, when a region
// takes a tenth of one. So a worker offers its core now and then while it holds nothing (see Turn). If nobody wants it,
// that costs less than a microsecond; if somebody does, the rest goes on with the threads that are left.
#include "threads.h"

#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace quire {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

thread_local bool inside_region = false;

// The floating-point mode in which a process starts, for the time of a task: a library may have told the calling thread to flush subnormals
// to 0, and results would hang on which thread computes them.
class PlainFloats {
#if defined(__x86_64__)
public:
    PlainFloats() { _mm_setcsr(0x1f80); }
    ~PlainFloats() { _mm_setcsr(before_); }
    PlainFloats(const PlainFloats&) = delete;
    PlainFloats& operator=(const PlainFloats&) = delete;

private:
    const unsigned before_ = _mm_getcsr();
#endif
};

// How long a worker has had its core. Linux takes it away at a tick, 4 ms apart or more often, once the slice of 2 to 4 ms
// is used up: an offer after 2 ms comes first.
class Turn {
public:
    bool over() const { return Clock::now() - since_ > kLength; }

    // To be called where the worker holds no task.
    void offer() {
        if (!over()) return;
        sched_yield();
        since_ = Clock::now();
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr auto kLength = std::chrono::milliseconds(2);
    Clock::time_point since_ = Clock::now();
};

class Pool {
public:
    void resize(int n) {
        std::lock_guard lock(region_);
        stop_.store(true);
        wake();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_.store(false);
        for (int i = 1; i < n; ++i) workers_.emplace_back([this, seen = generation_.load()] { serve(seen); });
        size_.store(n);
    }

    int size() const { return size_.load(std::memory_order_relaxed); }

    void run(int64_t n, TaskFn fn, const void* context) {
        std::lock_guard lock(region_);
        n_ = n, fn_ = fn, context_ = context, failure_ = nullptr;
        counter_.store(0, std::memory_order_relaxed);
        gate_.store(0, std::memory_order_release);
        wake();
        inside_region = true;
        work(nullptr);
        inside_region = false;
        // From here on nobody joins; who has joined is in its last task.
        gate_.fetch_or(kClosed, std::memory_order_acq_rel);
        for (int spins = 0; gate_.load(std::memory_order_acquire) != kClosed; ++spins)
            spins < 4096 ? pause() : static_cast<void>(sched_yield());
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

private:
    static constexpr uint32_t kClosed = 1u << 31;
    static constexpr auto kSpin = std::chrono::microseconds(50);

    void wake() {
        generation_.fetch_add(1, std::memory_order_acq_rel);
        generation_.notify_all();
    }

    bool join() {
        uint32_t gate = gate_.load(std::memory_order_acquire);
        while (!(gate & kClosed))
            if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void serve(uint32_t seen) {
        [[maybe_unused]] const PlainFloats plain;
        Turn turn;
        inside_region = true;   // a task that opens a region runs it by itself
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kSpin;
            while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
                for (int i = 0; i < 16; ++i) pause();
            generation_.wait(seen, std::memory_order_acquire);
            seen = generation_.load(std::memory_order_acquire);
            if (stop_.load()) return;
            for (bool more = true; more && join();) {
                more = work(&turn);
                gate_.fetch_sub(1, std::memory_order_acq_rel);
                turn.offer();
            }
        }
    }

    // Takes tasks until none is left, or until the turn is over: true then. A thread claims a task ahead, to prefetch for
    // it, except near the end, where that would take work from others, and in its last task. turn: null for the caller,
    // which nobody can do without.
    bool work(const Turn* turn) {
        try {
            return take_tasks(turn);
        } catch (...) {
            std::lock_guard lock(failing_);
            if (!failure_) failure_ = std::current_exception();
            counter_.store(n_, std::memory_order_relaxed);   // nobody takes another
            return false;
        }
    }

    bool take_tasks(const Turn* turn) {
        const int64_t n = n_, threads = size(), ahead = n - 4 * threads;
        int64_t task = counter_.fetch_add(1, std::memory_order_relaxed);
        while (task < n) {
            const bool last = turn && turn->over();
            if (task < ahead && !last) {
                const int64_t next = counter_.fetch_add(1, std::memory_order_relaxed);
                fn_(context_, task, next < n ? next : -1);
                task = next;
            } else {
                fn_(context_, task, task + threads < n ? task + threads : -1);
                if (last) return true;
                task = counter_.fetch_add(1, std::memory_order_relaxed);
            }
        }
        return false;
    }

    std::mutex region_;                          // one region at a time
    std::mutex failing_;
    std::exception_ptr failure_;                 // what the first task threw that threw anything
    std::vector<std::thread> workers_;
    std::atomic<int> size_{1};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<uint32_t> gate_{kClosed};   // kClosed, or the number of workers inside the region
    alignas(64) std::atomic<int64_t> counter_{0};
    int64_t n_ = 0;
    TaskFn fn_ = nullptr;
    const void* context_ = nullptr;
};

// Never destroyed: at exit the workers are asleep or die with the process, and nothing waits for them.
Pool& pool() {
    static Pool* instance = [] {
        auto* p = new Pool;
        p->resize(default_num_threads());
        return p;
    }();
    return *instance;
}

struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer scratch[kScratchSlots];

constexpr size_t kHugePage = size_t{2} << 20;

size_t whole_pages(size_t bytes) { return (bytes + 4095) & ~size_t{4095}; }

}  // namespace

void run_tasks(int64_t n, TaskFn fn, const void* context) {
    if (n <= 0) return;
    [[maybe_unused]] const PlainFloats plain;
    if (n == 1 || inside_region || pool().size() == 1) {
        for (int64_t task = 0; task < n; ++task) fn(context, task, task + 1 < n ? task + 1 : -1);
        return;
    }
    pool().run(n, fn, context);
}

int num_threads() { return pool().size(); }
void set_num_threads(int n) { pool().resize(n); }

void* thread_scratch(Scratch slot, size_t bytes) {
    Buffer& buffer = scratch[slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.bytes = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(4096, buffer.bytes);
        if (!buffer.data) {
            buffer.bytes = 0;
            throw std::bad_alloc();
        }
        std::memset(buffer.data, 0, buffer.bytes);
    }
    return buffer.data;
}

// Only the pages that are written cost memory, so the alignment is free. What lies around it is unmapped, to the last page: a process may
// have 65,530 mappings, and a mixture has tens of thousands of linears.
void* allocate_large(size_t bytes) {
    const size_t size = whole_pages(bytes), mapped = size + kHugePage;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(base);
    const uintptr_t aligned = (address + kHugePage - 1) & ~(kHugePage - 1), end = aligned + size;
    if (aligned > address) munmap(base, aligned - address);
    if (address + mapped > end) munmap(reinterpret_cast<void*>(end), address + mapped - end);
    madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    return reinterpret_cast<void*>(aligned);
}

void free_large(void* p, size_t bytes) {
    if (p) munmap(p, whole_pages(bytes));
}

}  // namespace quire
