// out = x W^T (+ bias) (+ out), with one chain of accumulation for each element of out: acc = 0, then
// acc = fma(x[k], w[k], acc) for k ascending. Rows and columns are dealt to threads and tiles in any way; no sum is ever
// divided, and a partial sum that is put aside between two blocks of K is a float32 either way. So a row comes out the
// same alone, among 512, and on any number of threads.
//
// A task is a block of rows against one panel of columns. The panel goes by in slices that fit L2 with room for the
// slice after it, which is prefetched meanwhile: at few rows the product is bound by how fast weights arrive. The last
// tasks prefetch the first panels of the linear that follows.
#include "epilogue.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kRows = kWidth == 16 ? 6 : 3;                             // rows in a register tile
constexpr int64_t kSlice = 1024;                                        // K positions in a slice
constexpr int64_t kRowBlock = 192;
constexpr int64_t kWidenRows = 4 * kRows;                               // from here on 16-bit slices are widened first

struct Target {
    Output to;
    float* part;           // where sums are put aside, rows kPanel apart
    bool first;            // sums begin here
    bool last;             // they end here, and go from registers to out
    bool finishes;         // they end here, and go to `part` and from there to out, since an activation or a gate awaits them
};

// What to prefetch while a tile is computed: each K position PF lines at `at`, which then moves on by `step` bytes.
struct Ahead {
    const char* at;
    int64_t step;
};

// kn steps of the chains of `MT` rows x one panel.
template <int MT, class T, int PF>
QUIRE_INLINE void chain(const float* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, vf (&acc)[MT][kVecs]) {
    for (int64_t k = 0; k < kn; ++k) {
        vf wv[kVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) wv[j] = load(w + k * kPanel + j * kWidth);
#pragma GCC unroll 2
        for (int j = 0; j < PF; ++j) prefetch_l2(ahead.at + j * 64);
        ahead.at += ahead.step;
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vf xv = set1(x[m * x_stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) acc[m][j] = fma(xv, wv[j], acc[m][j]);
        }
    }
}

template <int MT> QUIRE_INLINE void finish(const Output& t, vf (&acc)[MT][kVecs]) {
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        float* out = t.out + m * t.stride;
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
            const int n = t.columns - j * kWidth;
            vf a = acc[m][j];
            if (n >= kWidth) {
                if (t.bias) a = add(a, load(t.bias + j * kWidth));
                if (t.accumulate) a = add(load(out + j * kWidth), a);
                store(out + j * kWidth, a);
            } else if (n > 0) {
                if (t.bias) a = add(a, load_n(t.bias + j * kWidth, n));
                if (t.accumulate) a = add(load_n(out + j * kWidth, n), a);
                store_n(out + j * kWidth, a, n);
            }
        }
    }
}

template <int MT, class T, int PF>
void tile(const float* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, const Target& t) {
    vf acc[MT][kVecs];
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[m][j] = t.first ? zero() : load(t.part + m * kPanel + j * kWidth);
    chain<MT, T, PF>(x, x_stride, w, kn, ahead, acc);
    if (t.last) {
        finish<MT>(t.to, acc);
    } else {
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) store(t.part + m * kPanel + j * kWidth, acc[m][j]);
    }
}

template <class T, int PF>
void tile_rows(int rows, const float* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, const Target& t) {
    switch (rows) {
        case 1: return tile<1, T, PF>(x, x_stride, w, kn, ahead, t);
        case 2: return tile<2, T, PF>(x, x_stride, w, kn, ahead, t);
        case 3: return tile<3, T, PF>(x, x_stride, w, kn, ahead, t);
#if defined(QUIRE_ISA_avx512)
        case 4: return tile<4, T, PF>(x, x_stride, w, kn, ahead, t);
        case 5: return tile<5, T, PF>(x, x_stride, w, kn, ahead, t);
        case 6: return tile<6, T, PF>(x, x_stride, w, kn, ahead, t);
#endif
    }
}

// Memory that comes next: `lines` cache lines at `at`.
struct Coming {
    const char* at;
    int64_t lines;
};

// How a tile prefetches, when `tiles` of kn steps are left to do it in.
//
// Alone, a tile waits for its own weights, and they should arrive on the hardware's streams, which fetch more at a time than
// prefetches can. But these streams end with every 4 KiB: one line for each K position starts those of the next slice, or
// (16 bits wide) of this one a little later. All lines, prefetched, would take 20 % longer.
// Several tiles read the slice once from memory and then from L2, and the streams sleep meanwhile: all lines of the next slice
// are prefetched, spread evenly, since at 10 to 30 rows reading takes nearly as long as multiplying.
template <class T> QUIRE_INLINE Ahead prefetch_with(bool alone, const T* w, int64_t kn, int64_t tiles, const Coming& next) {
    constexpr int64_t kStep = kPanel * static_cast<int64_t>(sizeof(T)), kSoon = 4096;
    const char* own = reinterpret_cast<const char*>(w);
    if (alone) return {sizeof(T) < sizeof(float) || next.lines <= 0 ? own + kSoon : next.at, kStep};
    if (next.lines <= 0) return {own, 0};
    return {next.at, next.lines > kn * tiles ? 128 : 64};
}

// All tiles of a block of rows against one slice of a panel.
template <class T>
void slice(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t kn, Coming next, const Target& t) {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
        const int mt = static_cast<int>((rows - row + (tiles - i) - 1) / (tiles - i));   // as even as it goes
        const Ahead ahead = prefetch_with(tiles == 1, w, kn, tiles - i, next);
        Target u = t;
        u.to.out += row * t.to.stride;
        u.part += row * kPanel;
        const auto run = ahead.step == 128 && tiles > 1 ? tile_rows<T, 2> : tile_rows<T, 1>;
        run(mt, x + row * x_stride, x_stride, w, kn, ahead, u);
        if (t.finishes) finish_rows(u.to, u.part, nullptr, 0, mt);
        next.at += kn * ahead.step;
        next.lines -= kn * ahead.step / 64;
        row += mt;
    }
}

struct Plan {
    LinearArgs args;
    int64_t row_blocks, rows_per_block, tasks;
};

// The panel that the thread of this task will probably want afterwards: another one, or of the linear that follows one of the
// first, which the threads take first. Of a panel, no more than a slice.
Coming panel_after(const Plan& plan, int64_t task, int64_t next) {
    const LinearArgs& a = plan.args;
    const char* at = nullptr;
    int64_t bytes = 0;
    if (next >= 0) {
        if (next / plan.row_blocks == task / plan.row_blocks) return {nullptr, 0};
        bytes = a.w.k * kPanel * (a.w.dtype == DType::f32 ? 4 : 2);
        at = static_cast<const char*>(a.w.data) + next / plan.row_blocks * bytes;
    } else if (const int64_t panel = plan.tasks - 1 - task; panel < a.then_panels) {
        bytes = a.then_panel_bytes;
        at = static_cast<const char*>(a.then) + panel * bytes;
    }
    constexpr int64_t kMost = kSlice * kPanel * sizeof(float) / 64;
    return {at, bytes / 64 < kMost ? bytes / 64 : kMost};
}

template <class T> void task(const void* context, int64_t task, int64_t next) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const int64_t panel = task / plan.row_blocks, row = task % plan.row_blocks * plan.rows_per_block;
    const int64_t rows = a.m - row < plan.rows_per_block ? a.m - row : plan.rows_per_block;
    const T* base = static_cast<const T*>(a.w.data);
    const T* w = base + panel * a.w.k * kPanel;
    constexpr bool kNarrow = sizeof(T) < sizeof(float);
    const bool widen = kNarrow && rows >= kWidenRows, blocked = a.w.k > kSlice;
    const bool plain = !a.w.gated && a.activation == Activation::none;
    const size_t part_floats = blocked || !plain ? rows * kPanel : 0, wide_floats = widen ? kSlice * kPanel : 0;
    float* part = static_cast<float*>(thread_scratch(kScratchGemm, (part_floats + wide_floats + 1) * sizeof(float)));
    float* wide = part + part_floats;

    Target t{output_of(a, panel, row), part, false, false, false};
    const float* x = a.x + row * a.x_stride;
    for (int64_t k = 0; k == 0 || k < a.w.k; k += kSlice) {
        const int64_t kn = a.w.k - k < kSlice ? a.w.k - k : kSlice;
        const int64_t left = a.w.k - k - kn;
        t.first = k == 0;
        t.last = left == 0 && plain;
        t.finishes = left == 0 && !plain;
        const Coming rest{reinterpret_cast<const char*>(w + (k + kn) * kPanel),
                          (left < kSlice ? left : kSlice) * kPanel * static_cast<int64_t>(sizeof(T)) / 64};
        const Coming coming = left == 0 ? panel_after(plan, task, next) : rest;
        if (widen) {
            const T* from = w + k * kPanel;
            for (int64_t i = 0; i < kn * kPanel; i += kWidth) store(wide + i, load(from + i));
            slice<float>(x + k, a.x_stride, rows, wide, kn, coming, t);
        } else {
            slice<T>(x + k, a.x_stride, rows, w + k * kPanel, kn, coming, t);
        }
    }
}

}  // namespace

void linear(const LinearArgs& args) {
    if (args.m == 0 || args.w.n == 0) return;
    const int64_t panels = panel_count(args.w);
    Plan plan{args, 1, args.m, panels};
    // Enough tasks for every thread, but no more row blocks than that takes, since each reads the weights; and row blocks
    // whose partial sums stay in L2.
    const int64_t wanted = (4 * num_threads() + panels - 1) / panels, most = (args.m + 2 * kRows - 1) / (2 * kRows);
    const int64_t fit = (args.m + kRowBlock - 1) / kRowBlock;
    const int64_t blocks = wanted > most ? most : wanted;
    const int64_t count = blocks > fit ? blocks : fit;
    plan.rows_per_block = ((args.m + count - 1) / count + kRows - 1) / kRows * kRows;
    plan.row_blocks = (args.m + plan.rows_per_block - 1) / plan.rows_per_block;
    plan.tasks = panels * plan.row_blocks;
    switch (args.w.dtype) {
        case DType::f32: return run_tasks(plan.tasks, task<float>, &plan);
        case DType::f16: return run_tasks(plan.tasks, task<f16>, &plan);
        case DType::bf16: return run_tasks(plan.tasks, task<bf16>, &plan);
    }
}

}  // namespace quire::QUIRE_NS
