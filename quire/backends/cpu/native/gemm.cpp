// out = x W^T (+ bias) (+ out), with one chain of accumulation for each element of out: acc = 0, then
// acc = fma(x[k], w[k], acc) for k ascending. Rows and columns are dealt to threads and tiles in any way; no sum is ever
// divided, and a partial sum that is put aside between two blocks of K is a float32 either way. So a row comes out the
// same alone, among 512, and on any number of threads.
//
// A task is a block of rows against one panel of columns. The panel goes by in slices that fit L2 with room for the
// slice after it, which is prefetched meanwhile: at few rows the product is bound by how fast weights arrive.
#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kVecs = 4;                                                // vectors in a panel row
constexpr int kPanel = kVecs * kWidth;
constexpr int kRows = kWidth == 16 ? 6 : 3;                             // rows in a register tile
constexpr int64_t kSlice = 1024;                                        // K positions in a slice
constexpr int64_t kRowBlock = 192;
constexpr int64_t kWidenRows = 4 * kRows;                               // from here on 16-bit slices are widened first

struct Target {
    float* out;            // the tile's corner
    int64_t out_stride;
    float* part;           // partial sums, rows kPanel apart
    const float* bias;     // the panel's, or null
    int columns;           // of the panel that exist
    bool first, last, accumulate;
};

// kn steps of the chains of `MT` rows x one panel; PF cache lines at `ahead` are prefetched with each step.
template <int MT, class T, int PF>
QUIRE_INLINE void chain(const float* x, int64_t x_stride, const T* w, int64_t kn, const char* ahead, vf (&acc)[MT][kVecs]) {
    for (int64_t k = 0; k < kn; ++k) {
        vf wv[kVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) wv[j] = load(w + k * kPanel + j * kWidth);
#pragma GCC unroll 4
        for (int j = 0; j < PF; ++j) prefetch_l2(ahead + (k * PF + j) * 64);
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vf xv = set1(x[m * x_stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) acc[m][j] = fma(xv, wv[j], acc[m][j]);
        }
    }
}

template <int MT> QUIRE_INLINE void finish(const Target& t, vf (&acc)[MT][kVecs]) {
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        float* out = t.out + m * t.out_stride;
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
void tile(const float* x, int64_t x_stride, const T* w, int64_t kn, const char* ahead, const Target& t) {
    vf acc[MT][kVecs];
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[m][j] = t.first ? zero() : load(t.part + m * kPanel + j * kWidth);
    chain<MT, T, PF>(x, x_stride, w, kn, ahead, acc);
    if (t.last) {
        finish<MT>(t, acc);
    } else {
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) store(t.part + m * kPanel + j * kWidth, acc[m][j]);
    }
}

template <int MT, class T>
void tile_ahead(int pf, const float* x, int64_t x_stride, const T* w, int64_t kn, const char* ahead, const Target& t) {
    switch (pf) {
        case 0: return tile<MT, T, 0>(x, x_stride, w, kn, ahead, t);
        case 1: return tile<MT, T, 1>(x, x_stride, w, kn, ahead, t);
        case 2: return tile<MT, T, 2>(x, x_stride, w, kn, ahead, t);
        default: return tile<MT, T, 4>(x, x_stride, w, kn, ahead, t);
    }
}

template <class T>
void tile_rows(int rows, int pf, const float* x, int64_t x_stride, const T* w, int64_t kn, const char* ahead, const Target& t) {
    switch (rows) {
        case 1: return tile_ahead<1, T>(pf, x, x_stride, w, kn, ahead, t);
        case 2: return tile_ahead<2, T>(pf, x, x_stride, w, kn, ahead, t);
        case 3: return tile_ahead<3, T>(pf, x, x_stride, w, kn, ahead, t);
#if defined(QUIRE_ISA_avx512)
        case 4: return tile_ahead<4, T>(pf, x, x_stride, w, kn, ahead, t);
        case 5: return tile_ahead<5, T>(pf, x, x_stride, w, kn, ahead, t);
        case 6: return tile_ahead<6, T>(pf, x, x_stride, w, kn, ahead, t);
#endif
    }
}

// All tiles of a block of rows against one slice of a panel. The lines of `ahead` are spread over the first tiles.
template <class T>
void slice(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t kn, const char* ahead, int64_t lines, Target t) {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    int pf = 0;
    if (ahead && lines > 0) {
        const int64_t per_step = (lines + kn * tiles - 1) / (kn * tiles);
        pf = per_step <= 1 ? 1 : per_step <= 2 ? 2 : 4;
    }
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
        const int mt = static_cast<int>((rows - row + (tiles - i) - 1) / (tiles - i));   // as even as it goes
        if (lines <= 0) pf = 0;
        Target u = t;
        u.out += row * t.out_stride;
        u.part += row * kPanel;
        tile_rows<T>(mt, pf, x + row * x_stride, x_stride, w, kn, ahead, u);
        ahead += kn * pf * 64;
        lines -= kn * pf;
        row += mt;
    }
}

struct Plan {
    LinearArgs args;
    int64_t row_blocks, rows_per_block;
};

template <class T> void task(const void* context, int64_t task, int64_t next) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const int64_t panel = task / plan.row_blocks, row = task % plan.row_blocks * plan.rows_per_block;
    const int64_t rows = a.m - row < plan.rows_per_block ? a.m - row : plan.rows_per_block;
    const T* base = static_cast<const T*>(a.w.data);
    const T* w = base + panel * a.w.k * kPanel;
    const T* after = next >= 0 && next / plan.row_blocks != panel ? base + next / plan.row_blocks * a.w.k * kPanel : nullptr;
    constexpr bool kNarrow = sizeof(T) < sizeof(float);
    const bool widen = kNarrow && rows >= kWidenRows, blocked = a.w.k > kSlice;
    const size_t part_floats = blocked ? rows * kPanel : 0, wide_floats = widen ? kSlice * kPanel : 0;
    float* part = static_cast<float*>(thread_scratch(kScratchGemm, (part_floats + wide_floats + 1) * sizeof(float)));
    float* wide = part + part_floats;

    Target t{};
    t.out = a.out + row * a.out_stride + panel * kPanel;
    t.out_stride = a.out_stride;
    t.part = part;
    t.bias = a.bias ? a.bias + panel * kPanel : nullptr;
    t.columns = static_cast<int>(a.w.n - panel * kPanel < kPanel ? a.w.n - panel * kPanel : kPanel);
    t.accumulate = a.accumulate;
    const float* x = a.x + row * a.x_stride;
    for (int64_t k = 0; k == 0 || k < a.w.k; k += kSlice) {
        const int64_t kn = a.w.k - k < kSlice ? a.w.k - k : kSlice;
        t.first = k == 0;
        t.last = k + kn == a.w.k;
        const T* ahead = t.last ? after : w + (k + kn) * kPanel;
        int64_t ahead_k = t.last ? a.w.k : a.w.k - k - kn;
        if (ahead_k > kSlice) ahead_k = kSlice;
        const int64_t lines = ahead ? ahead_k * kPanel * static_cast<int64_t>(sizeof(T)) / 64 : 0;
        const char* bytes = reinterpret_cast<const char*>(ahead);
        if (widen) {
            const T* from = w + k * kPanel;
            for (int64_t i = 0; i < kn * kPanel; i += kWidth) store(wide + i, load(from + i));
            slice<float>(x + k, a.x_stride, rows, wide, kn, bytes, lines, t);
        } else {
            slice<T>(x + k, a.x_stride, rows, w + k * kPanel, kn, bytes, lines, t);
        }
    }
}

}  // namespace

void linear(const LinearArgs& args) {
    if (args.m == 0 || args.w.n == 0) return;
    const int64_t panels = (args.w.n + kPanel - 1) / kPanel;
    Plan plan{args, 1, args.m};
    // Enough tasks for every thread, and row blocks whose partial sums stay in L2.
    const int64_t wanted = (8 * num_threads() + panels - 1) / panels, most = (args.m + 2 * kRows - 1) / (2 * kRows);
    const int64_t fit = (args.m + kRowBlock - 1) / kRowBlock;
    const int64_t blocks = wanted > most ? most : wanted;
    const int64_t count = blocks > fit ? blocks : fit;
    plan.rows_per_block = ((args.m + count - 1) / count + kRows - 1) / kRows * kRows;
    plan.row_blocks = (args.m + plan.rows_per_block - 1) / plan.rows_per_block;
    switch (args.w.dtype) {
        case DType::f32: return run_tasks(panels * plan.row_blocks, task<float>, &plan);
        case DType::f16: return run_tasks(panels * plan.row_blocks, task<f16>, &plan);
        case DType::bf16: return run_tasks(panels * plan.row_blocks, task<bf16>, &plan);
    }
}

}  // namespace quire::QUIRE_NS
