// What the tasks of a linear prefetch, whatever their weights are: while one is computed, memory must not be idle.
#pragma once
#include "simd.h"

namespace quire::QUIRE_NS {

// Memory that comes next: `lines` cache lines at `at`.
struct Coming {
    const char* at;
    int64_t lines;
};

// What to prefetch while a tile is computed: with each step of it a few lines at `at`, which then moves on by `step` bytes.
struct Ahead {
    const char* at;
    int64_t step;
};

struct Prefetch {
    int lines;   // with each step
    Ahead ahead;
};

// How the tasks of a linear are numbered: panel by panel, the blocks of rows of a panel one after the other.
struct TaskGrid {
    int64_t row_blocks, rows_per_block, tasks, panel_bytes;
};

// The panel that the thread of this task will probably want afterwards: another one, or of the linear that follows one of the
// first, which the threads take first. Of a panel, no more than `most` bytes.
QUIRE_INLINE Coming panel_after(const LinearArgs& a, const TaskGrid& grid, int64_t task, int64_t next, int64_t most) {
    const char* at = nullptr;
    int64_t bytes = 0;
    if (next >= 0) {
        if (next / grid.row_blocks == task / grid.row_blocks) return {nullptr, 0};
        bytes = grid.panel_bytes;
        at = static_cast<const char*>(a.w.data) + next / grid.row_blocks * bytes;
    } else if (const int64_t panel = grid.tasks - 1 - task; panel < a.then_panels) {
        bytes = a.then_panel_bytes;
        at = static_cast<const char*>(a.then) + panel * bytes;
    }
    return {at, ((bytes < most ? bytes : most) + 63) / 64};
}

}  // namespace quire::QUIRE_NS
