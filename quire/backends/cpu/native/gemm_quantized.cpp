// out = x W^T (+ bias) (+ out) for weights of 8 and 4 bits. Each row of x is first rounded to 8 bits, range by range (quantize_rows.h).
//
// An element of out is one chain, whatever the rows, tiles and threads around it: for the segments of K in ascending order
// (quantized.h) of a range of activations, from 0, the exact integer sum of (q - zero) * a, as a float32, is fused into part = fma(integer,
// scale, part), and with offsets that of a into part = fma(integer, offset, part); for the ranges in ascending order sum = fma(part, scale of
// the range, sum); at the end what epilogue.h does. Integers have no order of summation:
// instruction sets, which sum them in their own ways (segment_sums.h), differ only where fma does.
//
// As in gemm.cpp a task is a block of rows against one panel, which goes by in slices that fit L2 with room for the next.
#include "epilogue.h"
#include "segment_sums.h"

namespace quire::QUIRE_NS {
namespace {

template <class Kind> constexpr bool kOffsets = Kind::coding == Coding::offsets;

template <int Bits> constexpr int kRows = kWidth == 16 ? 6 : Bits == 8 ? 3 : 4;   // rows in a register tile
constexpr int64_t kSlicePositions = 1024;
constexpr int kRegisters = kWidth == 16 ? 32 : 16;
constexpr int64_t kRowBlock = 192;

struct Slice {
    const uint8_t* weights;   // of the first segment
    const uint8_t* scales;
    int64_t stride, scale_stride, segment, range, positions;
    int64_t beside;           // bytes from a panel to the next
};

struct Tile {
    Rows rows;
    float* sums;              // rows kPanel apart
    int64_t column;           // of the panel, where the tile begins
};

// The segments of a slice for MT rows and NV vectors of columns; F: what they prefetch.
// The floats of a range stay in registers if there is room for them beside the integers. A function of its own for each, or the compiler
// would allocate registers for all of them at once.
template <class Kind, int MT, int NV, Fetch F, int Spans>
__attribute__((noinline)) void tile(const Slice& s, const Tile& t, Ahead ahead) {
    constexpr bool kKeep = MT * NV * 2 <= kRegisters - 8;
    const bool several = s.range > s.segment;   // segments in a range
    vf kept[MT][NV];
    alignas(64) float parts[kKeep ? 1 : MT * NV * kWidth];
    float *sums = t.sums, *part = parts;
    Rows rows = t.rows;
    const auto clear = [&] QUIRE_LAMBDA {
        if constexpr (kKeep) each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { kept[m][j] = zero(); });
        else each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { store(part + (m * NV + j) * kWidth, zero()); });
    };
    const auto add_part = [&](int m, int j, vf f) QUIRE_LAMBDA {
        float* const sum = sums + m * kPanel + j * kWidth;
        store(sum, fma(f, set1(rows.scale[m * rows.scale_stride]), load(sum)));
    };
    constexpr int64_t kScaleBytes = kOffsets<Kind> ? 4 : 2;
    const uint8_t *weights = s.weights + t.column * 4, *scales = s.scales + t.column * kScaleBytes;
    if (kKeep || several) clear();
    for (int64_t left = s.positions, until = s.range; left > 0; left -= s.segment) {
        vi acc[MT][NV];
        segment_sums<Kind, MT, NV, F, Spans>(weights, s.beside, rows, left < s.segment ? left : s.segment, ahead, acc);
        reload(sums);
        if constexpr (!kKeep) reload(part);
        vf scale[NV], offset[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
            const uint8_t* at = scales + vector_at<NV>(j, kScaleBytes * kWidth, s.beside);
            if constexpr (kOffsets<Kind>) load_pairs(at, offset[j], scale[j]);
            else scale[j] = load(reinterpret_cast<const bf16*>(at));
        }
        const auto add_segment = [&](int m, int j, vf before) QUIRE_LAMBDA {
            vf f = fma(to_float_v(acc[m][j]), scale[j], before);
            if constexpr (kOffsets<Kind>) f = fma(set1(rows.sum[m * rows.sum_stride]), offset[j], f);
            return f;
        };
        if constexpr (kKeep) {
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { kept[m][j] = add_segment(m, j, kept[m][j]); });
        } else if (several) {
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA {
                float* const at = part + (m * NV + j) * kWidth;
                store(at, add_segment(m, j, load(at)));
            });
        } else {
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { add_part(m, j, add_segment(m, j, zero())); });
        }
        weights += s.stride;
        scales += s.scale_stride;
        rows.a += s.segment * kActivationBytes<Kind::bits>;
        rows.start += Spans;
        if constexpr (kOffsets<Kind>) ++rows.sum;
        until -= s.segment;
        if (until > 0 && left > s.segment) continue;
        if constexpr (kKeep) each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { add_part(m, j, kept[m][j]); });
        else if (several) each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { add_part(m, j, load(part + (m * NV + j) * kWidth)); });
        if (kKeep || several) clear();
        ++rows.scale;
        until = s.range;
    }
}

// A tile takes a whole panel or half of one at a time. Without VNNI more rows than kWhole take halves in all groups, since the halves of the
// bytes need registers. With it so do more than 3 rows in groups of 32, where floats are added often, so that they stay in registers; of
// other tiles it is a matter of the machine, and found by trial (Reading::short_slices: halves). Whole panels keep two multipliers
// busier on Emerald Rapids; on Zen 4 halves are up to 1.6 times as fast in 4 bits.
template <int Bits> constexpr int kWhole = Bits == 8 ? 3 : 2;
template <int Bits> bool takes_halves(const LinearArgs& a, int rows) {
    if constexpr (!kVnni) return rows > kWhole<Bits> && a.w.group > 0;
    return (rows > 3 && a.w.group == 32) || a.reading == Reading::short_slices;
}

template <class Kind, int MT, int NV, Fetch F> void tile_spans(const Slice& s, const Tile& t, Ahead ahead) {
    if constexpr (kSpan<Kind::bits> < kSegment)
        if (s.segment > kSpan<Kind::bits>) return tile<Kind, MT, NV, F, 2>(s, t, ahead);
    return tile<Kind, MT, NV, F, 1>(s, t, ahead);
}

template <class Kind, int MT, Fetch F> void tile_of(bool half, const Slice& s, const Tile& t, Ahead ahead) {
    if constexpr (MT > kRows<Kind::bits>) return;
    else if constexpr (!kVnni && MT <= kWhole<Kind::bits>) return tile_spans<Kind, MT, 4, F>(s, t, ahead);
    else if constexpr (Kind::bits == 4 && !kVnni) return tile_spans<Kind, MT, 2, F>(s, t, ahead);
    else return half ? tile_spans<Kind, MT, 2, F>(s, t, ahead) : tile_spans<Kind, MT, 4, F>(s, t, ahead);
}

template <class Kind, Fetch F> void tile_rows(int rows, bool half, const Slice& s, const Tile& t, Ahead ahead) {
    switch (rows) {
        case 1: return tile_of<Kind, 1, F>(half, s, t, ahead);
        case 2: return tile_of<Kind, 2, F>(half, s, t, ahead);
        case 3: return tile_of<Kind, 3, F>(half, s, t, ahead);
        case 4: return tile_of<Kind, 4, F>(half, s, t, ahead);
        case 5: return tile_of<Kind, 5, F>(half, s, t, ahead);
        case 6: return tile_of<Kind, 6, F>(half, s, t, ahead);
    }
}

struct Plan {
    LinearArgs args;
    QuantLayout layout;
    QuantRows rows;
    TaskGrid grid;
};

// All tiles of a block of rows against one slice of a panel. They prefetch the slice that comes next: gemm_prefetch.h. Alone, a tile of AVX2,
// whose slices are small, is 15 % faster if it prefetches its own weights a little ahead, unless what comes next is another linear's
// (then). Not a line in two, as gemm.cpp does: in 4 bits that takes twice as long.
template <class Kind>
void slice(const Plan& plan, const Slice& s, int64_t first_row, int64_t rows, int64_t k, float* sums, const Coming& next, bool then,
           const Output* out) {
    constexpr int Bits = Kind::bits;
    constexpr int64_t kMost = kRows<Bits>, kSoon = 2048;
    const int64_t tiles = (rows + kMost - 1) / kMost, steps = (s.positions + kStepK<Bits> - 1) / kStepK<Bits>;
    const int64_t most = (rows + tiles - 1) / tiles, halves = takes_halves<Bits>(plan.args, static_cast<int>(most)) ? 2 : 1;
    const bool alone = kWidth < 16 && tiles * halves == 1 && !then;
    const QuantRows& q = plan.rows;
    Spread spread(next, steps * tiles * halves, false);
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
        const int mt = static_cast<int>((rows - row + (tiles - i) - 1) / (tiles - i));   // as even as it goes
        const int64_t at = first_row + row;
        Tile t{{q.a + at * q.stride + k * kActivationBytes<Bits>, q.stride, q.start + at * q.spans + k / q.span, q.spans,
                kOffsets<Kind> ? q.sum + at * q.segments + k / s.segment : nullptr, q.segments, q.scale + at * q.ranges + k / s.range, q.ranges},
               sums + row * kPanel, 0};
        const int halves = takes_halves<Bits>(plan.args, mt) ? 2 : 1;
        for (int half = 0; half < halves; ++half) {
            if (alone) {
                const Ahead own{reinterpret_cast<const char*>(s.weights) + kSoon, kStepBytes, 4 * kStepBytes};
                tile_rows<Kind, Fetch{kStepBytes / 64, 1, false}>(mt, halves == 2, s, t, own);
            } else {
                const Ahead ahead = spread.ahead(steps);
                with_fetch(spread.fetch, [&]<Fetch F>() QUIRE_LAMBDA {
                    if constexpr (!F.again) tile_rows<Kind, F>(mt, halves == 2, s, t, ahead);
                });
            }
            t.column += kPanel / 2;
            t.sums += kPanel / 2;
        }
        if (out) finish_rows(*out, sums + row * kPanel, row, mt);
        row += mt;
    }
}

template <class Kind> void task(const void* context, int64_t task, int64_t next) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const QuantLayout& l = plan.layout;
    const TaskGrid& grid = plan.grid;
    const Task now = task_of(grid, task);
    const int64_t row = now.row, rows = now.rows;
    const uint8_t* w = reinterpret_cast<const uint8_t*>(now.data);
    float* sums = static_cast<float*>(thread_scratch(kScratchGemm, static_cast<size_t>(rows * kPanel) * sizeof(float)));
    std::memset(sums, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));

    const Output out = output_of(a, now.bias, now.panel, row);
    const int64_t slice_bytes = kSlicePositions / l.segment * l.stride;
    for (int64_t k = 0, at = 0; k < a.w.k; k += kSlicePositions, at += slice_bytes) {
        const bool last = k + kSlicePositions >= a.w.k;
        const Slice s{w + at + l.scale_bytes, w + (a.w.group ? at : 0), l.stride, l.scale_stride, l.segment, l.range,
                      last ? a.w.k - k : kSlicePositions, l.panel_bytes};
        const int64_t rest = l.panel_bytes - at - slice_bytes;
        const Coming coming = last ? panel_after(a, grid, now, task, next, slice_bytes)
                                   : Coming{reinterpret_cast<const char*>(w + at + slice_bytes),
                                            ((rest < slice_bytes ? rest : slice_bytes) + 63) / 64};
        slice<Kind>(plan, s, row, rows, k, sums, coming, last && next < 0 && coming.lines > 0, last ? &out : nullptr);
    }
}

// One row against two panels side by side: gemm.cpp says why.
constexpr int kBeside = 2;

template <class Kind> void task_beside(const void* context, int64_t task, int64_t) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const LinearArgs& a = plan.args;
    const QuantLayout& l = plan.layout;
    const Task now = task_of(plan.grid, task);
    const int64_t left = panel_count(a.w) - now.panel, row = now.row;
    const uint8_t* w = reinterpret_cast<const uint8_t*>(now.data);
    const Slice s{w + l.scale_bytes, w, l.stride, l.scale_stride, l.segment, l.range, a.w.k, l.panel_bytes};
    alignas(64) float sums[kBeside * kPanel] = {};
    const QuantRows& q = plan.rows;
    const Tile t{{q.a + row * q.stride, q.stride, q.start + row * q.spans, q.spans, kOffsets<Kind> ? q.sum + row * q.segments : nullptr,
                  q.segments, q.scale + row * q.ranges, q.ranges}, sums, 0};
    if (left >= kBeside) tile_spans<Kind, 1, kBeside * kVecs, Fetch{0, 1, false}>(s, t, {});
    else tile_spans<Kind, 1, kVecs, Fetch{0, 1, false}>(s, t, {});
    for (int i = 0; i < kBeside && i < left; ++i)
        finish_rows(output_of(a, now.bias, now.panel + i, row), sums + i * kPanel, 0, 1);
}

template <class Kind> void run(Plan plan) {
    const LinearArgs& a = plan.args;
    const int64_t panels = panel_count(a.w) * (a.groups ? a.num_groups : 1);
    const bool beside = a.reading == Reading::beside && most_rows(a) == 1 && panels >= 8 * num_threads();
    plan.grid = grid_of(a, {kRows<Kind::bits>, kRowBlock, 8, plan.layout.panel_bytes, beside ? kBeside : 1});
    run_tasks(plan.grid.tasks, beside ? task_beside<Kind> : task<Kind>, &plan);
}

}  // namespace

void linear_quantized(const LinearArgs& args) {
    if (args.m == 0 || args.w.n == 0) return;
    const QuantLayout layout = quant_layout(args.w);
    const Plan plan{args, layout, args.w.bits == 8 ? quantize_rows<8>(args, layout) : quantize_rows<4>(args, layout), {}};
    if (args.w.bits == 8) return run<Int8>(plan);
    switch (args.w.coding) {
        case Coding::integers: return run<Bits4<Coding::integers>>(plan);
        case Coding::offsets: return run<Bits4<Coding::offsets>>(plan);
        case Coding::mxfp4: return run<Bits4<Coding::mxfp4>>(plan);
    }
}

}  // namespace quire::QUIRE_NS
