// Which of a few ways of doing the same work is fastest on this machine, for data of that size: they take turns a few times, and the
// one with the best time stays. Only for work that gives the same bytes in all ways.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>

namespace quire {

constexpr int kMostWays = 3;

class Trial {
public:
    Trial() { for (std::atomic<float>& best : best_) best.store(std::numeric_limits<float>::infinity(), std::memory_order_relaxed); }

    // work(way): way is from 0 up to `ways`, which is always the same, and at most kMostWays. amount: how much work there is this time.
    template <class Work> void run(int ways, const Work& work, float amount = 1.0f) {
        const int turn = turns_.load(std::memory_order_relaxed);
        if (turn >= kTurns * ways) return work(fastest());
        turns_.store(turn + 1, std::memory_order_relaxed);
        std::atomic<float>& best = best_[turn % ways];
        const auto start = std::chrono::steady_clock::now();
        work(turn % ways);
        const std::chrono::duration<float> time = std::chrono::steady_clock::now() - start;
        best.store(std::min(best.load(std::memory_order_relaxed), time.count() / amount), std::memory_order_relaxed);
    }

private:
    int fastest() const {
        int way = 0;
        for (int i = 1; i < kMostWays; ++i)
            if (best_[i].load(std::memory_order_relaxed) < best_[way].load(std::memory_order_relaxed)) way = i;
        return way;
    }

    static constexpr int kTurns = 6;   // of each way
    std::atomic<int> turns_{0};
    std::atomic<float> best_[kMostWays];
};

}  // namespace quire
