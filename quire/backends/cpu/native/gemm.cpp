// out = x W^T (+ bias) (+ out), with one chain of accumulation for each element of out: acc = 0, then
// acc = fma(x[k], w[k], acc) for k ascending. Rows and columns are dealt to threads and tiles in any way; no sum is ever
// divided, and a partial sum that is put aside between two blocks of K is a float32 either way. So a row comes out the
// same alone, among 512, and on any number of threads.
//
// A task is a block of rows against one panel of columns. The panel goes by in slices that fit L2 with room for the
// slice after it, which is prefetched meanwhile: at few rows the product is bound by how fast weights arrive. The last
// tasks prefetch the first panels of the linear that follows.
//
// Machines differ in how they read while they compute, so there are other ways for few rows, which give the same bytes (kernels.h):
// short slices, which come from L2 once, and of which every line is prefetched: a core of Emerald Rapids has 16 buffers for lines on
// their way to L1, and with whole slices those from L2 and those from memory, 185 ns each, want the same ones. And a handful of rows
// against three panels at once: a core of Zen 3 reads 28 GB/s in three places and 20 in one.
#include "epilogue.h"
#include "gemm_prefetch.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kMostRows = 6;                                            // rows in a register tile
constexpr int64_t kSlice = 1024;                                        // K positions in a slice
constexpr int64_t kShortSlice = 64;
constexpr int64_t kRowBlock = 192;

// 16-bit weights are widened as a tile reads them, or, from so many rows on, a slice at a time. On AVX2 that never pays.
constexpr int64_t kWidenRows = kWidth == 8 ? INT64_MAX : 24;

// A tile over weights of type T has up to kRows rows. 32 registers hold their sums for a whole panel. 16 hold those of 3 rows, or of
// 6 rows and half a panel, which takes more tiles but widens half as often.
template <class T> constexpr bool kNarrow = sizeof(T) < sizeof(float);
template <class T> constexpr int kRows = kWidth == 16 || kNarrow<T> ? kMostRows : 3;
template <class T> constexpr int tile_vecs(int rows) { return kWidth == 16 || rows <= (kNarrow<T> ? 2 : 3) ? kVecs : kVecs / 2; }

struct Target {
    Output to;
    float* part;           // where sums are put aside, rows kPanel apart
    bool first;            // sums begin here
    bool last;             // they end here, and go from registers to out
    bool finishes;         // they end here, and go to `part` and from there to out, since an activation or a gate awaits them
};

// What a tile prefetches, as a compilation of its own for each: so many lines with every first, second or fourth step; again: and once
// more kTwice bytes later, since with many lines on their way some are forgotten.
struct Fetch { int lines, every; bool again; };
constexpr int64_t kTwice = 12 * 1024;

// Step k of the chains of MT rows x NV vectors of columns.
template <int MT, int NV, class T> QUIRE_INLINE void step(const float* x, int64_t x_stride, const T* w, int64_t k, vf (&acc)[MT][NV]) {
    vf wv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) wv[j] = load(w + k * kPanel + j * kWidth);
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        const vf xv = set1(x[m * x_stride + k]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[m][j] = fma(xv, wv[j], acc[m][j]);
    }
}

// kn steps, four at a time: what counts loops and prefetches is a tenth of the instructions otherwise, and on a core that is shared with
// another thread (hyper-threading) instructions are what binds.
template <int MT, int NV, class T, Fetch F>
QUIRE_INLINE void chain(const float* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, vf (&acc)[MT][NV]) {
    int64_t k = 0;
    for (; k + 4 <= kn; k += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
            if (u % F.every == 0) {
                const char* line = ahead.at + u * ahead.step;
#pragma GCC unroll 4
                for (int j = 0; j < F.lines; ++j) {
                    prefetch_l2(line + j * 64);
                    if constexpr (F.again) prefetch_l1(line + j * 64 - kTwice);
                }
            }
            step(x, x_stride, w, k + u, acc);
        }
        ahead.at += 4 * ahead.step;
    }
    for (; k < kn; ++k) step(x, x_stride, w, k, acc);
}

template <int MT, int NV> QUIRE_INLINE void finish(const Output& t, int first, vf (&acc)[MT][NV]) {
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        float* out = t.out + m * t.stride;
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            const int at = first + j * kWidth, n = t.columns - at;
            vf a = acc[m][j];
            if (n >= kWidth) {
                if (t.bias) a = add(a, load(t.bias + at));
                if (t.accumulate) a = add(load(out + at), a);
                store(out + at, a);
            } else if (n > 0) {
                if (t.bias) a = add(a, load_n(t.bias + at, n));
                if (t.accumulate) a = add(load_n(out + at, n), a);
                store_n(out + at, a, n);
            }
        }
    }
}

// MT rows against the columns of a panel from `first` on.
template <int MT, class T, Fetch F>
void tile(const float* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, const Target& t, int first) {
    constexpr int NV = tile_vecs<T>(MT);
    vf acc[MT][NV];
    float* const part = t.part + first;
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[m][j] = t.first ? zero() : load(part + m * kPanel + j * kWidth);
    chain<MT, NV, T, F>(x, x_stride, w + first, kn, ahead, acc);
    if (t.last) {
        finish<MT, NV>(t.to, first, acc);
    } else {
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) store(part + m * kPanel + j * kWidth, acc[m][j]);
    }
}

template <class T, Fetch F>
void tile_rows(int rows, const float* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, const Target& t, int first) {
    switch (rows) {
        case 1: return tile<1, T, F>(x, x_stride, w, kn, ahead, t, first);
        case 2: return tile<2, T, F>(x, x_stride, w, kn, ahead, t, first);
        case 3: return tile<3, T, F>(x, x_stride, w, kn, ahead, t, first);
    }
    if constexpr (kRows<T> > 3) switch (rows) {
        case 4: return tile<4, T, F>(x, x_stride, w, kn, ahead, t, first);
        case 5: return tile<5, T, F>(x, x_stride, w, kn, ahead, t, first);
        case 6: return tile<6, T, F>(x, x_stride, w, kn, ahead, t, first);
    }
}

template <class T> auto tiles_that_prefetch(const Prefetch& p, bool whole) {
    if (p.lines > 1 && whole) return tile_rows<T, Fetch{2, 1, false}>;
    if (p.lines > 1) return p.lines == 2 ? tile_rows<T, Fetch{2, 1, true}> : tile_rows<T, Fetch{4, 1, true}>;
    if (p.ahead.step <= 32) return p.ahead.step <= 16 ? tile_rows<T, Fetch{1, 4, false}> : tile_rows<T, Fetch{1, 2, false}>;
    return tile_rows<T, Fetch{1, 1, false}>;
}

// How many lines a tile prefetches with each step, and which, when `passes` of kn steps are left to do it in.
//
// Alone in a whole slice, a tile waits for its own weights, and they should arrive on the hardware's streams, which fetch more at a time than
// prefetches can. But these streams end with every 4 KiB: one line for each K position starts those of the next slice, or
// (16 bits wide) of this one a little later. All lines, prefetched, would take 20 % longer.
// Several tiles read the slice once from memory and then from L2, and the streams sleep meanwhile: all lines of the next slice
// are prefetched, since at 10 to 30 rows reading takes nearly as long as multiplying. Spread evenly over all steps, be it a
// quarter of a line with each: lines on their way from memory hold buffers that those from L2 need, and so many at once that
// the tile stalls would only move the waiting.
// On AVX2, 2 or 3 rows alone are slower than their weights arrive, and the streams fall behind: all of their own lines, a little ahead.
template <class T>
QUIRE_INLINE Prefetch prefetch_with(bool alone, int64_t rows, const T* w, int64_t kn, int64_t passes, const Coming& next) {
    constexpr int64_t kStep = kPanel * static_cast<int64_t>(sizeof(T)), kSoon = 4096;
    const char* own = reinterpret_cast<const char*>(w);
    if (alone && kWidth == 8 && rows > 1) return {2, {own + kSoon / 2, kStep}};
    if (alone) return {1, {sizeof(T) < sizeof(float) || next.lines <= 0 ? own + kSoon : next.at, kStep}};
    if (next.lines <= 0) return {1, {own, 0}};
    const int64_t step = (next.lines * 64 + kn * passes - 1) / (kn * passes);
    return {step <= 64 ? 1 : step <= 128 ? 2 : 4, {next.at, step}};
}

// All tiles of a block of rows against one slice of a panel.
template <class T>
void slice(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t kn, bool whole, Coming next, const Target& t) {
    const int64_t tiles = (rows + kRows<T> - 1) / kRows<T>;
    const bool alone = whole && tiles == 1 && tile_vecs<T>(static_cast<int>(rows)) == kVecs;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
        const int mt = static_cast<int>((rows - row + (tiles - i) - 1) / (tiles - i));   // as even as it goes
        const int vecs = tile_vecs<T>(mt);
        Target u = t;
        u.to.out += row * t.to.stride;
        u.part += row * kPanel;
        for (int j = 0; j < kVecs; j += vecs) {
            const Prefetch p = prefetch_with(alone, rows, w, kn, (tiles - i) * (kVecs / vecs) - j / vecs, next);
            tiles_that_prefetch<T>(p, whole)(mt, x + row * x_stride, x_stride, w, kn, p.ahead, u, j * kWidth);
            next.at += kn * p.ahead.step;
            next.lines -= kn * p.ahead.step / 64;
        }
        if (t.finishes) finish_rows(u.to, u.part, nullptr, 0, mt);
        row += mt;
    }
}

struct Plan {
    LinearArgs args;
    TaskGrid grid;
};

template <class T> void task(const void* context, int64_t task, int64_t next) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const TaskGrid& grid = plan.grid;
    const int64_t panel = task / grid.row_blocks, row = task % grid.row_blocks * grid.rows_per_block;
    const int64_t rows = a.m - row < grid.rows_per_block ? a.m - row : grid.rows_per_block;
    const T* base = static_cast<const T*>(a.w.data);
    const T* w = base + panel * a.w.k * kPanel;
    const bool whole = a.reading != Reading::short_slices, widen = kNarrow<T> && rows >= kWidenRows;
    const int64_t most = whole ? kSlice : kShortSlice;
    const bool plain = !a.w.gated && a.activation == Activation::none;
    const size_t part_floats = a.w.k > most || !plain ? rows * kPanel : 0, wide_floats = widen ? most * kPanel : 0;
    float* part = static_cast<float*>(thread_scratch(kScratchGemm, (part_floats + wide_floats + 1) * sizeof(float)));
    float* wide = part + part_floats;

    Target t{output_of(a, panel, row), part, false, false, false};
    const float* x = a.x + row * a.x_stride;
    for (int64_t k = 0; k == 0 || k < a.w.k; k += most) {
        const int64_t kn = a.w.k - k < most ? a.w.k - k : most;
        const int64_t left = a.w.k - k - kn;
        t.first = k == 0;
        t.last = left == 0 && plain;
        t.finishes = left == 0 && !plain;
        const Coming rest{reinterpret_cast<const char*>(w + (k + kn) * kPanel),
                          (left < most ? left : most) * kPanel * static_cast<int64_t>(sizeof(T)) / 64};
        const Coming coming = left == 0 ? panel_after(a, grid, task, next, most * kPanel * static_cast<int64_t>(sizeof(float))) : rest;
        if (widen) {
            const T* from = w + k * kPanel;
            for (int64_t i = 0; i < kn * kPanel; i += kWidth) store(wide + i, load(from + i));
            slice<float>(x + k, a.x_stride, rows, wide, kn, whole, coming, t);
        } else {
            slice<T>(x + k, a.x_stride, rows, w + k * kPanel, kn, whole, coming, t);
        }
    }
}

constexpr int kBeside = 3;   // panels that are read at once

// kn steps of the chains of one row and the columns of S panels, `stride` weights apart.
template <int S, class T> QUIRE_INLINE void beside(const float* x, const T* w, int64_t stride, int64_t kn, Ahead ahead, float* sums) {
    vf acc[S][kVecs];
#pragma GCC unroll 3
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[s][j] = load(sums + s * kPanel + j * kWidth);
    for (int64_t k = 0; k < kn; ++k, w += kPanel) {
        const vf xv = set1(x[k]);
        if (ahead.step) prefetch_l2(ahead.at + k * ahead.step);
#pragma GCC unroll 3
        for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) acc[s][j] = fma(xv, load(w + s * stride + j * kWidth), acc[s][j]);
    }
#pragma GCC unroll 3
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) store(sums + s * kPanel + j * kWidth, acc[s][j]);
}

// All rows against kBeside panels. The first row waits for the weights, on as many of the hardware's streams as there are panels;
// the others find them in L1, and prefetch a quarter of a line of what comes next with each step, so that memory is not idle.
template <class T> void task_beside(const void* context, int64_t task, int64_t) {
    constexpr int64_t kPart = 128 / sizeof(T), kQuarter = 16;
    const LinearArgs& a = static_cast<const Plan*>(context)->args;
    const int64_t panel = task * kBeside, left = panel_count(a.w) - panel, stride = a.w.k * kPanel;
    const int panels = static_cast<int>(left < kBeside ? left : kBeside);
    const T* w = static_cast<const T*>(a.w.data) + panel * stride;
    alignas(64) float sums[kRowsBeside][kBeside * kPanel];
    std::memset(sums, 0, static_cast<size_t>(a.m) * sizeof(sums[0]));
    const int64_t part = a.m == 1 ? a.w.k : kPart;
    for (int64_t k = 0; k < a.w.k; k += part, w += part * kPanel) {
        const int64_t kn = a.w.k - k < part ? a.w.k - k : part;
        for (int m = 0; m < a.m; ++m) {
            const float* x = a.x + m * a.x_stride + k;
            const char* next = reinterpret_cast<const char*>(w + kn * kPanel + m % kBeside * stride) + m / kBeside * kn * kQuarter;
            const Ahead ahead{next, m == 0 ? 0 : kQuarter};
            if (panels == kBeside) beside<kBeside>(x, w, stride, kn, ahead, sums[m]);
            else
                for (int i = 0; i < panels; ++i) beside<1>(x, w + i * stride, stride, kn, ahead, sums[m] + i * kPanel);
        }
    }
    for (int i = 0; i < panels; ++i) {
        const Output out = output_of(a, panel + i, 0);
        for (int m = 0; m < a.m; ++m) finish_rows(out, sums[m] + i * kPanel, nullptr, m, 1);
    }
}

template <class T> void run(const Plan& plan) {
    const int64_t panels = panel_count(plan.args.w);
    if (plan.args.reading == Reading::beside && plan.args.m <= kRowsBeside && panels >= 8 * num_threads())   // or there would be too few tasks
        return run_tasks((panels + kBeside - 1) / kBeside, task_beside<T>, &plan);
    run_tasks(plan.grid.tasks, task<T>, &plan);
}

}  // namespace

void linear(const LinearArgs& args) {
    if (args.m == 0 || args.w.n == 0) return;
    const int64_t panels = panel_count(args.w);
    // Enough tasks for every thread, but no more row blocks than that takes, since each reads the weights; and row blocks
    // whose partial sums stay in L2.
    const int64_t wanted = (4 * num_threads() + panels - 1) / panels, most = (args.m + 2 * kMostRows - 1) / (2 * kMostRows);
    const int64_t fit = (args.m + kRowBlock - 1) / kRowBlock;
    const int64_t blocks = wanted > most ? most : wanted;
    const int64_t count = blocks > fit ? blocks : fit;
    const int64_t rows_per_block = ((args.m + count - 1) / count + kMostRows - 1) / kMostRows * kMostRows;
    const int64_t row_blocks = (args.m + rows_per_block - 1) / rows_per_block;
    const int64_t panel_bytes = args.w.k * kPanel * (args.w.dtype == DType::f32 ? 4 : 2);
    const Plan plan{args, {row_blocks, rows_per_block, panels * row_blocks, panel_bytes}};
    switch (args.w.dtype) {
        case DType::f32: return run<float>(plan);
        case DType::f16: return run<f16>(plan);
        case DType::bf16: return run<bf16>(plan);
    }
}

}  // namespace quire::QUIRE_NS
