// Which of two ways of doing the same work is faster on this machine, for the very data: they take turns a few times, and the
// one with the best time stays. Only for work that gives the same bytes both ways.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>

namespace quire {

class Trial {
public:
    // work(other): other says which way.
    template <class Work> void run(const Work& work) {
        const int turn = turns_.load(std::memory_order_relaxed);
        if (turn >= kTurns) return work(best_[1].load(std::memory_order_relaxed) < best_[0].load(std::memory_order_relaxed));
        turns_.store(turn + 1, std::memory_order_relaxed);
        std::atomic<float>& best = best_[turn % 2];
        const auto start = std::chrono::steady_clock::now();
        work(turn % 2 == 1);
        const std::chrono::duration<float> time = std::chrono::steady_clock::now() - start;
        best.store(std::min(best.load(std::memory_order_relaxed), time.count()), std::memory_order_relaxed);
    }

private:
    static constexpr int kTurns = 12;
    std::atomic<int> turns_{0};
    std::atomic<float> best_[2] = {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
};

}  // namespace quire
