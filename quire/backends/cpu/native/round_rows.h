// What a linear reads of a row of x: the row itself, or, for products of bfloat16 (AVX-512 BF16), the row rounded to that, to nearest even,
// with subnormals as 0 (so the instructions have it).
#pragma once
#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {

#if defined(QUIRE_ISA_avx512bf16)
using Input = bf16;
constexpr bool kDots = true;

struct RoundRows {
    bf16* out;              // rows `stride` apart, with a 0 behind them where K is odd
    int64_t stride;
    const float* x;
    int64_t x_stride, k;
};

static void round_row(const RoundRows& rows, int64_t row) {
    const float* x = rows.x + row * rows.x_stride;
    bf16* out = rows.out + row * rows.stride;
    for (int64_t k = 0; k < rows.k; k += 2 * kWidth) {
        const int64_t left = rows.k - k;
        const auto some = [&](int64_t from) QUIRE_LAMBDA {
            return left >= from + kWidth ? load(x + k + from) : left > from ? load_n(x + k + from, static_cast<int>(left - from)) : zero();
        };
        store_pairs(out + k, narrow_pairs(some(0), some(kWidth)));
    }
}

// All rows of x, into this thread's scratch: alone where that is faster than to wake the others.
static RoundRows round_rows(const LinearArgs& args) {
    constexpr int64_t kLine = 32, kAlone = 65536;
    RoundRows rows{nullptr, (args.w.k + kLine - 1) / kLine * kLine, args.x, args.x_stride, args.w.k};
    if (rows.stride % 512 == 0) rows.stride += kLine;   // else the rows of a tile would share few sets of the cache
    rows.out = static_cast<bf16*>(thread_scratch(kScratchQuantized, static_cast<size_t>(args.m * rows.stride) * sizeof(bf16)));
    if (args.m * args.w.k <= kAlone) {
        for (int64_t row = 0; row < args.m; ++row) round_row(rows, row);
    } else {
        run_tasks(args.m, [](const void* context, int64_t row, int64_t) {
            round_row(*static_cast<const RoundRows*>(context), row);
        }, &rows);
    }
    return rows;
}

#else
using Input = float;
constexpr bool kDots = false;
#endif

}  // namespace quire::QUIRE_NS
