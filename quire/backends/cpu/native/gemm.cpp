// out = x W^T (+ bias) (+ out), with one chain of accumulation for each element of out: acc = 0, then
// acc = fma(x[k], w[k], acc) for k ascending. With AVX-512 BF16, where weights are bfloat16, x is rounded to that and a step adds the
// products of two positions: twice as many a second. Rows and columns are dealt to threads and tiles in any way; no sum is ever
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
#include "round_rows.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kMostRows = 6;                                            // rows in a register tile
constexpr int64_t kSlice = 1024;                                        // K positions in a slice
template <class T> constexpr int64_t kShortSlice = 256 / sizeof(T);     // 16 KiB: four pages for Spread, a third of L1
constexpr int64_t kRowBlock = 192;

// 16-bit weights are widened as a tile reads them, or, from four tiles of rows on, a slice at a time. On AVX2 that never pays.
constexpr int64_t kWidenRows = kWidth == 8 || kDots ? INT64_MAX : 3 * kMostRows + 1;

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

// One position of the chains of MT rows x NV vectors of columns.
template <int MT, int NV> QUIRE_INLINE void add_products(const float* x, int64_t x_stride, const vf (&w)[NV], vf (&acc)[MT][NV]) {
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        const vf xv = set1(x[m * x_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[m][j] = fma(xv, w[j], acc[m][j]);
    }
}

// One step of them: as many positions as lie together in a panel (Panels in kernels.h), of `left` that there are.
template <class T> constexpr int kTogether = 1;

template <int MT, int NV, class T> QUIRE_INLINE void step(const float* x, int64_t x_stride, const T* w, int64_t, vf (&acc)[MT][NV]) {
    vf wv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) wv[j] = load(w + j * kWidth);
    add_products(x, x_stride, wv, acc);
}
#if defined(QUIRE_ISA_avx512)
template <> constexpr int kTogether<bf16> = 2;

template <int MT, int NV> QUIRE_INLINE void step(const float* x, int64_t x_stride, const bf16* w, int64_t left, vf (&acc)[MT][NV]) {
    vf wv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) wv[j] = load_even(w + 2 * j * kWidth);
    add_products(x, x_stride, wv, acc);
    if (left == 1) return;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) wv[j] = load_odd(w + 2 * j * kWidth);
    add_products(x + 1, x_stride, wv, acc);
}
#else
template <int MT, int NV> QUIRE_INLINE void step(const float* x, int64_t x_stride, const bf16* w, int64_t, vf (&acc)[MT][NV]) {
    vf wv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j += 2) load_two(w + j * kWidth, wv[j], wv[j + 1]);
    add_products(x, x_stride, wv, acc);
}
#endif
#if defined(QUIRE_ISA_avx512bf16)
template <int MT, int NV> QUIRE_INLINE void step(const bf16* x, int64_t x_stride, const bf16* w, int64_t, vf (&acc)[MT][NV]) {
    vp wv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) wv[j] = load_pairs(w + 2 * j * kWidth);
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        const vp xv = set1_pair(x + m * x_stride);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[m][j] = add_dot(acc[m][j], xv, wv[j]);
    }
}
#endif

// kn positions, four at a time: what counts loops and prefetches is a tenth of the instructions otherwise, and on a core that is shared with
// another thread (hyper-threading) instructions are what binds.
template <int MT, int NV, class T, Fetch F>
QUIRE_INLINE void chain(const Input* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, vf (&acc)[MT][NV]) {
    int64_t k = 0;
    for (; k + 4 <= kn; k += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
            prefetch_lines<F>(ahead, u);
            if (u % kTogether<T> == 0) step(x + k + u, x_stride, w + (k + u) * kPanel, 2, acc);
        }
        ahead.at += ahead.turn;
    }
    for (; k < kn; k += kTogether<T>) step(x + k, x_stride, w + k * kPanel, kn - k, acc);
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
void tile(const Input* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, const Target& t, int first) {
    constexpr int NV = tile_vecs<T>(MT);
    vf acc[MT][NV];
    float* const part = t.part + first;
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[m][j] = t.first ? zero() : load(part + m * kPanel + j * kWidth);
    chain<MT, NV, T, F>(x, x_stride, w + kTogether<T> * first, kn, ahead, acc);
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
void tile_rows(int rows, const Input* x, int64_t x_stride, const T* w, int64_t kn, Ahead ahead, const Target& t, int first) {
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

// What a tile that is alone in a whole slice prefetches.
//
// It waits for its own weights, and they should arrive on the hardware's streams, which fetch more at a time than prefetches can. But these
// streams end with every 4 KiB: one line for each K position starts those of the next slice, or (16 bits wide) of this one a little
// later. All lines, prefetched, would take 20 % longer.
// On AVX2, 2 or 3 rows alone are slower than their weights arrive, and the streams fall behind: all of their own lines, a little ahead.
struct Alone {
    Fetch fetch;
    Ahead ahead;
};
template <class T> QUIRE_INLINE Alone alone_with(int64_t rows, const T* w, const Coming& next) {
    constexpr int kStep = kPanel * static_cast<int>(sizeof(T)), kSoon = 4096;
    const char* own = reinterpret_cast<const char*>(w);
    if (kWidth == 8 && rows > 1) return {{2, 1, false}, {own + kSoon / 2, kStep, 4 * kStep}};
    return {{1, 1, false}, {sizeof(T) < sizeof(float) || next.lines <= 0 ? own + kSoon : next.at, kStep, 4 * kStep}};
}

// All tiles of a block of rows against one slice of a panel. Alone, a tile of a whole slice prefetches as alone_with says. Several read the
// slice once from memory and then from L2, and the hardware's streams sleep meanwhile: all lines of the next slice are prefetched, since
// at 10 to 30 rows reading takes nearly as long as multiplying. One that is alone in a short slice prefetches them as well, each twice.
template <class T>
void slice(const Input* x, int64_t x_stride, int64_t rows, const T* w, int64_t kn, bool whole, const Coming& next, const Target& t) {
    const int64_t tiles = (rows + kRows<T> - 1) / kRows<T>;
    const int64_t most = (rows + tiles - 1) / tiles, halves = kVecs / tile_vecs<T>(static_cast<int>(most));
    const bool alone = whole && tiles * halves == 1;
    const Alone own = alone_with(rows, w, next);
    Spread spread(next, kn * tiles * halves, tiles * halves == 1);
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
        const int mt = static_cast<int>((rows - row + (tiles - i) - 1) / (tiles - i));   // as even as it goes
        const int vecs = tile_vecs<T>(mt);
        Target u = t;
        u.to.out += row * t.to.stride;
        u.part += row * kPanel;
        for (int j = 0; j < kVecs; j += vecs) {
            const Ahead ahead = alone ? own.ahead : spread.ahead(kn);
            with_fetch(alone ? own.fetch : spread.fetch, [&]<Fetch F>() QUIRE_LAMBDA {
                tile_rows<T, F>(mt, x + row * x_stride, x_stride, w, kn, ahead, u, j * kWidth);
            });
        }
        if (t.finishes) finish_rows(u.to, u.part, 0, mt);
        row += mt;
    }
}

struct Plan {
    LinearArgs args;
    TaskGrid grid;
    const Input* x;
    int64_t x_stride, positions;   // of K: all that are in a panel, where x has as many
};

// kn positions of a panel as float32. With an odd one at the end, the 0 beside it too.
template <class T> QUIRE_INLINE void widen_positions(const T* w, int64_t kn, float* wide) {
    for (int64_t i = 0; i < kn * kPanel; i += kWidth) store(wide + i, load(w + i));
}
#if defined(QUIRE_ISA_avx512)
QUIRE_INLINE void widen_positions(const bf16* w, int64_t kn, float* wide) {
    for (int64_t k = 0; k < kn; k += 2, w += 2 * kPanel, wide += 2 * kPanel)
        for (int j = 0; j < kPanel; j += kWidth) store(wide + j, load_even(w + 2 * j)), store(wide + kPanel + j, load_odd(w + 2 * j));
}
#else
QUIRE_INLINE void widen_positions(const bf16* w, int64_t kn, float* wide) {
    for (int64_t i = 0; i < kn * kPanel; i += 2 * kWidth) {
        vf a, b;
        load_two(w + i, a, b);
        store(wide + i, a), store(wide + i + kWidth, b);
    }
}
#endif

template <class T> void task(const void* context, int64_t task, int64_t next) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const TaskGrid& grid = plan.grid;
    const Task now = task_of(grid, task);
    const int64_t row = now.row, rows = now.rows;
    const T* w = reinterpret_cast<const T*>(now.data);
    const bool whole = a.reading != Reading::short_slices, widen = kNarrow<T> && rows >= kWidenRows;
    const int64_t most = whole ? kSlice : widen ? kShortSlice<float> : kShortSlice<T>;
    const bool plain = !a.w.gated && a.activation == Activation::none;
    const size_t part_floats = plan.positions > most || !plain ? rows * kPanel : 0, wide_floats = widen ? most * kPanel : 0;
    float* part = static_cast<float*>(thread_scratch(kScratchGemm, (part_floats + wide_floats + 1) * sizeof(float)));
    float* wide = part + part_floats;

    Target t{output_of(a, now.bias, now.panel, row), part, false, false, false};
    const Input* x = plan.x + row * plan.x_stride;
    for (int64_t k = 0; k == 0 || k < plan.positions; k += most) {
        const int64_t kn = plan.positions - k < most ? plan.positions - k : most;
        const int64_t left = plan.positions - k - kn;
        t.first = k == 0;
        t.last = left == 0 && plain;
        t.finishes = left == 0 && !plain;
        const Coming rest{reinterpret_cast<const char*>(w + (k + kn) * kPanel),
                          (left < most ? left : most) * kPanel * static_cast<int64_t>(sizeof(T)) / 64};
        const Coming coming = left == 0 ? panel_after(a, grid, now, task, next, most * kPanel * static_cast<int64_t>(sizeof(float))) : rest;
        if constexpr (!kDots)
            if (widen) {
                widen_positions(w + k * kPanel, kn, wide);
                slice<float>(x + k, plan.x_stride, rows, wide, kn, whole, coming, t);
                continue;
            }
        slice<T>(x + k, plan.x_stride, rows, w + k * kPanel, kn, whole, coming, t);
    }
}

constexpr int kBeside = 3;           // panels that are read at once
constexpr int64_t kQuarter = 16;     // of a line

// kn positions of the chains of one row and the columns of S panels, `stride` weights apart. ahead: to prefetch a quarter of a line with each.
template <int S, class T> QUIRE_INLINE void beside(const Input* x, const T* w, int64_t stride, int64_t kn, const char* ahead, float* sums) {
    vf acc[S][1][kVecs];
#pragma GCC unroll 3
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[s][0][j] = load(sums + s * kPanel + j * kWidth);
    for (int64_t k = 0; k < kn; k += kTogether<T>) {
        if (ahead) prefetch_l2(ahead + k * kQuarter);
#pragma GCC unroll 3
        for (int s = 0; s < S; ++s) step(x + k, 0, w + s * stride + k * kPanel, kn - k, acc[s]);
    }
#pragma GCC unroll 3
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) store(sums + s * kPanel + j * kWidth, acc[s][0][j]);
}

// All rows against kBeside panels. The first row waits for the weights, on as many of the hardware's streams as there are panels;
// the others find them in L1, and prefetch a quarter of a line of what comes next with each step, so that memory is not idle.
template <class T> void task_beside(const void* context, int64_t task, int64_t) {
    constexpr int64_t kPart = 128 / sizeof(T);
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const Task now = task_of(plan.grid, task);
    const int64_t left = panel_count(a.w) - now.panel, stride = panel_positions(a.w) * kPanel;
    const int panels = static_cast<int>(left < kBeside ? left : kBeside);
    const T* w = reinterpret_cast<const T*>(now.data);
    alignas(64) float sums[kRowsBeside][kBeside * kPanel];
    std::memset(sums, 0, static_cast<size_t>(now.rows) * sizeof(sums[0]));
    const int64_t part = now.rows == 1 ? plan.positions : kPart;
    for (int64_t k = 0; k < plan.positions; k += part, w += part * kPanel) {
        const int64_t kn = plan.positions - k < part ? plan.positions - k : part;
        for (int m = 0; m < now.rows; ++m) {
            const Input* x = plan.x + (now.row + m) * plan.x_stride + k;
            const char* next = reinterpret_cast<const char*>(w + kn * kPanel + m % kBeside * stride) + m / kBeside * kn * kQuarter;
            if (m == 0) next = nullptr;
            if (panels == kBeside) beside<kBeside>(x, w, stride, kn, next, sums[m]);
            else
                for (int i = 0; i < panels; ++i) beside<1>(x, w + i * stride, stride, kn, next, sums[m] + i * kPanel);
        }
    }
    for (int i = 0; i < panels; ++i) {
        const Output out = output_of(a, now.bias, now.panel + i, now.row);
        for (int m = 0; m < now.rows; ++m) finish_rows(out, sums[m] + i * kPanel, m, 1);
    }
}

template <class T> void run(Plan plan) {
    const LinearArgs& a = plan.args;
    const int64_t panel_bytes = panel_positions(a.w) * kPanel * static_cast<int64_t>(sizeof(T));
    const int64_t panels = panel_count(a.w) * (a.groups ? a.num_groups : 1);
    const bool beside = a.reading == Reading::beside && most_rows(a) <= kRowsBeside && panels >= 8 * num_threads();   // or too few tasks
    plan.grid = grid_of(a, {kMostRows, kRowBlock, 4, panel_bytes, beside ? kBeside : 1});
    run_tasks(plan.grid.tasks, beside ? task_beside<T> : task<T>, &plan);
}

}  // namespace

void linear(const LinearArgs& args) {
    if (args.m == 0 || args.w.n == 0) return;
#if defined(QUIRE_ISA_avx512bf16)
    if (args.w.dtype != DType::bf16) return avx512::linear(args);
#endif
#if defined(QUIRE_ISA_avx512bf16)
    const RoundRows rounded = round_rows(args);
    run<bf16>({args, {}, rounded.out, rounded.stride, panel_positions(args.w)});
#else
    const Plan plan{args, {}, args.x, args.x_stride, args.w.k};
    switch (args.w.dtype) {
        case DType::f32: return run<float>(plan);
        case DType::f16: return run<f16>(plan);
        case DType::bf16: return run<bf16>(plan);
    }
#endif
}

}  // namespace quire::QUIRE_NS
