// What the tasks of a linear prefetch, whatever their weights are: while one is computed, memory must not be idle.
#pragma once
#include "gemm_tasks.h"

namespace quire::QUIRE_NS {

// Memory that comes next: `lines` cache lines at `at`.
struct Coming {
    const char* at;
    int64_t lines;
};

// How a tile prefetches, which is a compilation of its own for each: so many lines with every first, second or fourth of its steps; again:
// and once more kTwice bytes later, since with many lines on their way some are forgotten.
struct Fetch { int lines, every; bool again; };
constexpr int64_t kTwice = 12 * 1024;

// And what: the steps of a turn, which are four, prefetch in places that are `apart` bytes from each other; then each place moves on by
// `turn` bytes.
struct Ahead {
    const char* at;
    int32_t apart, turn;
};

// At step 0, 1, 2 or 3 of a turn.
template <Fetch F> QUIRE_INLINE void prefetch_lines(const Ahead& ahead, int step) {
    if (step % F.every != 0) return;
    const char* line = ahead.at + step / F.every * ahead.apart;
#pragma GCC unroll 4
    for (int i = 0; i < F.lines; ++i) {
        prefetch_l2(line + i * 64);
        if constexpr (F.again) prefetch_l1(line + i * 64 - kTwice);
    }
}

// What comes next, prefetched evenly over all steps of all tiles of a slice, be it a quarter of a line with each: lines on their way from
// memory hold buffers that those from L2 need, and so many at once that a tile stalls would only move the waiting.
//
// It is done in as many places as prefetches there are in a turn. A core of Emerald Rapids has 16 buffers for lines that were asked for, and
// each waits 185 ns for memory: 5.5 GB/s. What L2 fetches by itself, up to 20 lines ahead of those, holds none of them; but it does so
// for each page of 4 KiB. So one place gives 12 GB/s, and four the 16 that a core can read. With `again` it is one place.
class Spread {
public:
    // steps: of all tiles together.
    Spread(const Coming& next, int64_t steps, bool again) {
        const int64_t bytes = (next.lines * 64 + steps - 1) / steps;   // with each step
        fetch = {next.lines <= 0 ? 0 : bytes <= 64 ? 1 : bytes <= 128 ? 2 : 4, bytes > 32 ? 1 : bytes > 16 ? 2 : 4, again && bytes > 64};
        const int64_t places = fetch.again ? 1 : 4 / fetch.every, turn = 4 * bytes / places;
        const int64_t apart = fetch.again ? bytes : (next.lines + places - 1) / places * 64;
        ahead_ = {next.at, static_cast<int32_t>(apart), static_cast<int32_t>(turn)};
    }

    Fetch fetch;

    // Of the next tile.
    Ahead ahead(int64_t steps) {
        const Ahead now = ahead_;
        ahead_.at += steps / 4 * now.turn;
        return now;
    }

private:
    Ahead ahead_;
};

// Calls work.operator()<fetch>().
template <class Work> QUIRE_INLINE void with_fetch(const Fetch& fetch, Work work) {
    if (fetch.again) return fetch.lines > 2 ? work.template operator()<Fetch{4, 1, true}>() : work.template operator()<Fetch{2, 1, true}>();
    switch (fetch.lines) {
        case 0: return work.template operator()<Fetch{0, 1, false}>();
        case 1: break;
        case 2: return work.template operator()<Fetch{2, 1, false}>();
        default: return work.template operator()<Fetch{4, 1, false}>();
    }
    switch (fetch.every) {
        case 1: return work.template operator()<Fetch{1, 1, false}>();
        case 2: return work.template operator()<Fetch{1, 2, false}>();
        default: return work.template operator()<Fetch{1, 4, false}>();
    }
}

// The panel that the thread of this task will probably want afterwards: another one, or of the linear that follows one of the
// first, which the threads take first. Of a panel, no more than `most` bytes.
QUIRE_INLINE Coming panel_after(const LinearArgs& a, const TaskGrid& grid, const Task& now, int64_t task, int64_t next, int64_t most) {
    const char* at = nullptr;
    int64_t bytes = 0;
    if (next >= 0) {
        bytes = grid.panel_bytes;
        at = task_of(grid, next).data;
        if (at == now.data) return {nullptr, 0};
    } else if (const int64_t panel = grid.tasks - 1 - task; panel < a.then_panels) {
        bytes = a.then_panel_bytes;
        at = static_cast<const char*>(a.then) + panel * bytes;
    }
    return {at, ((bytes < most ? bytes : most) + 63) / 64};
}

}  // namespace quire::QUIRE_NS
