// out = x W^T (+ bias) (+ out) for weights of 8 and 4 bits. Each row of x is first rounded to 8 bits (quantize_rows.h).
//
// An element of out is one chain, whatever the rows, tiles and threads around it: for the segments of K in ascending order
// (quantized.h), the exact integer sum of (q - zero) * a, as a float32, is fused into sum = fma(integer, scale, sum); at the
// end what epilogue.h does. The integers start at -zero * (the sum of a), so that the products take q as it is stored. Integers
// have no order of summation: instruction sets differ only where fma does.
//
// As in gemm.cpp a task is a block of rows against one panel, which goes by in slices that fit L2 with room for the next.
#include "epilogue.h"
#include "quantize_rows.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kRows = kWidth == 16 ? 6 : 3;            // rows in a register tile
constexpr int64_t kSlicePositions = 1024;
constexpr int kRegisters = kWidth == 16 ? 32 : 16;
constexpr int64_t kRowBlock = 192;
constexpr int64_t kStepBytes = kPanel * 4;             // of weights; 4 positions of 8 bits or 8 of 4
template <int Bits> constexpr int64_t kStepK = 32 / Bits;

#define QUIRE_LAMBDA __attribute__((always_inline))

struct Slice {
    const uint8_t* weights;   // of the first segment
    const uint8_t* scales;
    int64_t stride, scale_stride, segment, positions;
};

struct Tile {
    const int8_t* a;
    int64_t a_stride;
    const int32_t* start;
    int64_t start_stride;
    float* sums;              // rows kPanel apart
    int64_t column;           // of the panel, where the tile begins
};

QUIRE_INLINE vi broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return set1_i(four);
}
QUIRE_INLINE vi low_nibbles(vi a) { return and_i(a, set1_i(0x0f0f0f0f)); }
QUIRE_INLINE vi even_bytes(vi a) { return and_i(a, set1_i(0x00ff00ff)); }
QUIRE_INLINE vi odd_bytes(vi a) { return even_bytes(shift_right16<8>(a)); }
// Half 0 or 1 of a vector of weights: bytes of 8 bits have only the first.
template <int Bits> QUIRE_INLINE vi unpack(vi w, int half) {
    if constexpr (Bits == 8) return w;
    return low_nibbles(half ? shift_right16<4>(w) : w);
}

// A step of the weights against MT rows, in the form that the instruction set has: bytes at once (VNNI), ...
#if defined(QUIRE_ISA_avx512vnni)
template <int Bits, int MT, int NV>
QUIRE_INLINE void step(const uint8_t* w, const int8_t* a, int64_t stride, vi (&acc)[MT][NV]) {
#pragma GCC unroll 2
    for (int half = 0; half < 8 / Bits; ++half) {
        vi v[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) v[j] = unpack<Bits>(load_i(w + j * 64), half);
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vi x = broadcast4(a + m * stride + 4 * half);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[m][j] = dot(acc[m][j], v[j], x);
        }
    }
}
#else
// ... small bytes (int4), or pairs of 16 bits.
template <int Bits, int MT, int NV>
QUIRE_INLINE void step(const uint8_t* w, const int8_t* a, int64_t stride, vi (&acc)[MT][NV]) {
    constexpr int kBytes = 4 * kWidth;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
        const vi v = load_i(w + j * kBytes);
        if constexpr (!kPairs<Bits>) {
            const vi low = unpack<Bits>(v, 0), high = unpack<Bits>(v, 1);
#pragma GCC unroll 6
            for (int m = 0; m < MT; ++m)
                acc[m][j] = add_i(acc[m][j], dot_small(low, broadcast4(a + m * stride), high, broadcast4(a + m * stride + 4)));
        } else {
            const vi even = even_bytes(v), odd = odd_bytes(v);
#pragma GCC unroll 6
            for (int m = 0; m < MT; ++m) {
                const int8_t* x = a + m * stride;
                acc[m][j] = add_i(acc[m][j], add_i(madd16(even, broadcast4(x)), madd16(odd, broadcast4(x + 4))));
            }
        }
    }
}
#endif

// The segments of a slice for MT rows and NV vectors of columns; PF cache lines at `ahead` are prefetched with each step.
// The floats stay in registers if there is room for them beside the integers.
template <int Bits, int MT, int NV, int PF> void tile(const Slice& s, const Tile& t, const char* ahead) {
    constexpr bool kKeep = MT * NV * 2 <= kRegisters - 8;
    vf kept[MT][NV];
    const auto each = [](auto work) QUIRE_LAMBDA {
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) work(m, j);
    };
    float* const sums = t.sums;
    if constexpr (kKeep) each([&](int m, int j) QUIRE_LAMBDA { kept[m][j] = load(sums + m * kPanel + j * kWidth); });
    const int8_t* a = t.a;
    const uint8_t *weights = s.weights + t.column * 4, *scales = s.scales + t.column * 2;
    const int32_t* start = t.start;
    for (int64_t left = s.positions; left > 0; left -= s.segment) {
        vi acc[MT][NV];
        each([&](int m, int j) QUIRE_LAMBDA { acc[m][j] = set1_i(start[m * t.start_stride]); });
        const int64_t steps = ((left < s.segment ? left : s.segment) + kStepK<Bits> - 1) / kStepK<Bits>;
        for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < PF; ++j) prefetch_l2(ahead + j * 64);
            step<Bits, MT, NV>(weights + i * kStepBytes, a, t.a_stride, acc);
            a += kStepK<Bits> * kActivationBytes<Bits>;
            ahead += PF * 64;
        }
        vf scale[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) scale[j] = load(reinterpret_cast<const bf16*>(scales) + j * kWidth);
        each([&](int m, int j) QUIRE_LAMBDA {
            float* const sum = sums + m * kPanel + j * kWidth;
            const vf f = to_float_v(acc[m][j]);
            if constexpr (kKeep) kept[m][j] = fma(f, scale[j], kept[m][j]);
            else store(sum, fma(f, scale[j], load(sum)));
        });
        weights += s.stride;
        scales += s.scale_stride;
        ++start;
    }
    if constexpr (kKeep) each([&](int m, int j) QUIRE_LAMBDA { store(sums + m * kPanel + j * kWidth, kept[m][j]); });
}

template <int Bits, int MT, int NV> void tile_ahead(int pf, const Slice& s, const Tile& t, const char* ahead) {
    switch (pf) {
        case 0: return tile<Bits, MT, NV, 0>(s, t, ahead);
        case 1: return tile<Bits, MT, NV, 1>(s, t, ahead);
        case 2: return tile<Bits, MT, NV, 2>(s, t, ahead);
        default: return tile<Bits, MT, NV, 4>(s, t, ahead);
    }
}

template <int Bits> void tile_rows(int rows, bool half, int pf, const Slice& s, const Tile& t, const char* ahead) {
    switch (rows) {
        case 1: return tile_ahead<Bits, 1, 4>(pf, s, t, ahead);
        case 2: return tile_ahead<Bits, 2, 4>(pf, s, t, ahead);
        case 3: return tile_ahead<Bits, 3, 4>(pf, s, t, ahead);
#if defined(QUIRE_ISA_avx512)
        case 4: return half ? tile_ahead<Bits, 4, 2>(pf, s, t, ahead) : tile_ahead<Bits, 4, 4>(pf, s, t, ahead);
        case 5: return half ? tile_ahead<Bits, 5, 2>(pf, s, t, ahead) : tile_ahead<Bits, 5, 4>(pf, s, t, ahead);
        case 6: return half ? tile_ahead<Bits, 6, 2>(pf, s, t, ahead) : tile_ahead<Bits, 6, 4>(pf, s, t, ahead);
#endif
    }
}

struct Plan {
    LinearArgs args;
    QuantLayout layout;
    QuantRows rows;
    int64_t row_blocks, rows_per_block;
};

// All tiles of a block of rows against one slice of a panel. The lines at `ahead` are spread over the first tiles.
template <int Bits>
void slice(const Plan& plan, const Slice& s, int64_t first_row, int64_t rows, int64_t k, float* sums, const char* ahead,
           int64_t lines, const Output* out) {
    const int64_t tiles = (rows + kRows - 1) / kRows, steps = (s.positions + kStepK<Bits> - 1) / kStepK<Bits>;
    // With groups the floats are added to often: a tile of more than 3 rows takes half a panel at a time, to keep them.
    const bool halves = kWidth == 16 && plan.args.w.group;
    int pf = 0;
    if (lines > 0) {
        const int64_t passes = steps * tiles * (halves && rows > 3 ? 2 : 1), per_step = (lines + passes - 1) / passes;
        pf = per_step <= 1 ? 1 : per_step <= 2 ? 2 : 4;
    }
    const QuantRows& q = plan.rows;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
        const int mt = static_cast<int>((rows - row + (tiles - i) - 1) / (tiles - i));   // as even as it goes
        if (lines <= 0) pf = 0;
        const int64_t at = first_row + row;
        Tile t{q.a + at * q.stride + k * kActivationBytes<Bits>, q.stride, q.start + at * q.segments + k / s.segment,
               q.segments, sums + row * kPanel, 0};
        const bool half = halves && mt > 3;
        tile_rows<Bits>(mt, half, pf, s, t, ahead);
        ahead += steps * pf * 64;
        lines -= steps * pf;
        if (half) {
            if (lines <= 0) pf = 0;
            t.column = kPanel / 2;
            t.sums += kPanel / 2;
            tile_rows<Bits>(mt, true, pf, s, t, ahead);
            ahead += steps * pf * 64;
            lines -= steps * pf;
        }
        if (out) finish_rows(*out, sums + row * kPanel, q.scale + first_row, row, mt);
        row += mt;
    }
}

template <int Bits> void task(const void* context, int64_t task, int64_t next) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const QuantLayout& l = plan.layout;
    const int64_t panel = task / plan.row_blocks, row = task % plan.row_blocks * plan.rows_per_block;
    const int64_t rows = a.m - row < plan.rows_per_block ? a.m - row : plan.rows_per_block;
    const uint8_t* base = static_cast<const uint8_t*>(a.w.data);
    const uint8_t* w = base + panel * l.panel_bytes;
    const uint8_t* after = next >= 0 && next / plan.row_blocks != panel ? base + next / plan.row_blocks * l.panel_bytes : nullptr;
    float* sums = static_cast<float*>(thread_scratch(kScratchGemm, static_cast<size_t>(rows * kPanel) * sizeof(float)));
    std::memset(sums, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));

    const Output out = output_of(a, panel, row);
    const int64_t slice_bytes = kSlicePositions / l.segment * l.stride;
    for (int64_t k = 0, at = 0; k < a.w.k; k += kSlicePositions, at += slice_bytes) {
        const bool last = k + kSlicePositions >= a.w.k;
        const Slice s{w + at + l.scale_bytes, w + (a.w.group ? at : 0), l.stride, l.scale_stride, l.segment,
                      last ? a.w.k - k : kSlicePositions};
        const uint8_t* ahead = last ? after : w + at + slice_bytes;
        int64_t bytes = !ahead ? 0 : last ? l.panel_bytes : l.panel_bytes - at - slice_bytes;
        if (bytes > slice_bytes) bytes = slice_bytes;
        slice<Bits>(plan, s, row, rows, k, sums, reinterpret_cast<const char*>(ahead), (bytes + 63) / 64, last ? &out : nullptr);
    }
}

}  // namespace

void linear_quantized(const LinearArgs& args) {
    if (args.m == 0 || args.w.n == 0) return;
    const QuantLayout layout = quant_layout(args.w);
    const int64_t panels = panel_count(args.w);
    Plan plan{args, layout, args.w.bits == 8 ? quantize_rows<8>(args, layout) : quantize_rows<4>(args, layout), 1, args.m};
    // Enough tasks for every thread, and row blocks that stay in L2.
    const int64_t wanted = (8 * num_threads() + panels - 1) / panels, most = (args.m + 2 * kRows - 1) / (2 * kRows);
    const int64_t fit = (args.m + kRowBlock - 1) / kRowBlock;
    const int64_t blocks = wanted > most ? most : wanted;
    const int64_t count = blocks > fit ? blocks : fit;
    plan.rows_per_block = ((args.m + count - 1) / count + kRows - 1) / kRows * kRows;
    plan.row_blocks = (args.m + plan.rows_per_block - 1) / plan.rows_per_block;
    run_tasks(panels * plan.row_blocks, args.w.bits == 8 ? task<8> : task<4>, &plan);
}

}  // namespace quire::QUIRE_NS
