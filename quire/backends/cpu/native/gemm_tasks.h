// How the tasks of a linear are numbered: group by group of rows, of each panel by panel (or some panels by some), the blocks of rows of a panel
// one after the other.
#pragma once
#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {

struct TaskGroup {
    int64_t first;                       // task
    int64_t row, rows, row_blocks, rows_per_block;
    const char* data;
    const float* bias;
};

struct TaskGrid {
    const TaskGroup* groups;
    int64_t num_groups, tasks, panel_bytes, panels_together;
};

struct Task {
    const char* data;                    // of the panel
    int64_t panel, row, rows;
    const float* bias;                   // of all columns; or null
};

struct TaskShape {
    int64_t tile_rows, most_rows;        // of a register tile; that keep their partial sums in L2
    int64_t each;                        // tasks that there should be for a thread
    int64_t panel_bytes;
    int64_t panels_together = 1;         // then there is one block of rows
};

// Into this thread's scratch. Enough tasks for every thread, but no more blocks of rows than that takes, since each reads the weights.
QUIRE_INLINE TaskGrid grid_of(const LinearArgs& a, const TaskShape& shape) {
    const RowGroup all{0, a.m, a.w.data, a.bias};
    const RowGroup* groups = a.groups ? a.groups : &all;
    const int64_t count = a.groups ? a.num_groups : 1, panels = (panel_count(a.w) + shape.panels_together - 1) / shape.panels_together;
    const int64_t wanted = (shape.each * num_threads() + panels * count - 1) / (panels * count);
    auto* out = static_cast<TaskGroup*>(thread_scratch(kScratchTasks, static_cast<size_t>(count) * sizeof(TaskGroup)));
    int64_t tasks = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t rows = groups[i].rows;
        const int64_t most = (rows + 2 * shape.tile_rows - 1) / (2 * shape.tile_rows), fit = (rows + shape.most_rows - 1) / shape.most_rows;
        const int64_t some = wanted > most ? most : wanted, blocks = shape.panels_together > 1 ? 1 : some > fit ? some : fit;
        const int64_t each = ((rows + blocks - 1) / blocks + shape.tile_rows - 1) / shape.tile_rows * shape.tile_rows;
        const int64_t row_blocks = (rows + each - 1) / each;
        out[i] = {tasks, groups[i].row, rows, row_blocks, each, static_cast<const char*>(groups[i].data), groups[i].bias};
        tasks += panels * row_blocks;
    }
    return {out, count, tasks, shape.panel_bytes, shape.panels_together};
}

QUIRE_INLINE Task task_of(const TaskGrid& grid, int64_t task) {
    int64_t low = 0, high = grid.num_groups;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (grid.groups[middle].first <= task) low = middle;
        else high = middle;
    }
    const TaskGroup& g = grid.groups[low];
    const int64_t panel = (task - g.first) / g.row_blocks * grid.panels_together, row = (task - g.first) % g.row_blocks * g.rows_per_block;
    const int64_t left = g.rows - row;
    return {g.data + panel * grid.panel_bytes, panel, g.row + row, left < g.rows_per_block ? left : g.rows_per_block, g.bias};
}

// Of the largest group.
QUIRE_INLINE int64_t most_rows(const LinearArgs& a) {
    if (!a.groups) return a.m;
    int64_t most = 0;
    for (int64_t i = 0; i < a.num_groups; ++i) most = a.groups[i].rows > most ? a.groups[i].rows : most;
    return most;
}

}  // namespace quire::QUIRE_NS
