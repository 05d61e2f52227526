// Rows of activations to 8 bits, each by itself: a = round(x * (127 / max|x|)), to nearest even, and x is a * (max|x| / 127).
// A row that holds a NaN or an infinity becomes zeros with the scale NaN; one with no magnitude from 2^-100 up, zeros.
#pragma once
#include "quantized.h"
#include "simd_int.h"
#include "threads.h"

namespace quire::QUIRE_NS {

// In which form the inner loop wants activations: bytes, or for four positions the 16-bit pairs (k, k + 2), (k + 1, k + 3),
// which meet the even and the odd bytes of a weight vector.
#if defined(QUIRE_ISA_avx512vnni)
template <int Bits> constexpr bool kPairs = false;
#else
template <int Bits> constexpr bool kPairs = Bits == 8;
#endif
template <int Bits> constexpr int64_t kActivationBytes = kPairs<Bits> ? 2 : 1;
template <int Bits> constexpr int32_t kZero = Bits == 8 ? 128 : 8;

struct QuantRows {
    int8_t* a;           // rows `stride` bytes apart
    int64_t stride;
    int32_t* start;      // [m][segments]: -zero * (the sum of the segment's a), where the integer sums start
    float* scale;        // [m]
    const float* x;
    int64_t m, k, x_stride, segment, segments;
};

template <int Bits> QUIRE_INLINE void store_activations(int8_t* p, vi a) {
    if constexpr (kPairs<Bits>) {
        uint64_t lane[kWidth / 2];   // (k, k + 1), (k + 2, k + 3) in 32 bits each
        std::memcpy(lane, &a, sizeof a);
        constexpr uint64_t kLow = 0x0000ffff0000ffff;
        for (int i = 0; i < kWidth / 4; ++i) {
            const uint64_t four = (lane[2 * i] & kLow) | (lane[2 * i + 1] & kLow) << 16;
            std::memcpy(p + 8 * i, &four, 8);
        }
    } else {
        store_bytes(p, a);
    }
}

template <int Bits> void quantize_row(const QuantRows& rows, int64_t row) {
    const float* x = rows.x + row * rows.x_stride;
    int8_t* a = rows.a + row * rows.stride;
    int32_t* start = rows.start + row * rows.segments;
    const int32_t most_bits = greatest_magnitude(x, rows.k);
    const float most = from_bits(static_cast<uint32_t>(most_bits));
    const bool finite = most_bits < kInfinityBits;
    if (!finite || most < kTiny) {
        rows.scale[row] = finite ? 0.0f : __builtin_nanf("");
        std::memset(a, 0, static_cast<size_t>(rows.stride));
        std::memset(start, 0, static_cast<size_t>(rows.segments) * sizeof *start);
        return;
    }
    rows.scale[row] = most / 127.0f;
    const vf inverse = set1(127.0f / most);
    for (int64_t s = 0; s < rows.segments; ++s) {
        const int64_t begin = s * rows.segment, end = begin + rows.segment < rows.k ? begin + rows.segment : rows.k;
        vi sum = set1_i(0);
        int64_t i = begin;
        for (; i + kWidth <= end; i += kWidth) {
            const vi v = to_int(mul(load(x + i), inverse));
            sum = add_i(sum, v);
            store_activations<Bits>(a + i * kActivationBytes<Bits>, v);
        }
        if (i < end) {
            const vi v = to_int(mul(load_n(x + i, static_cast<int>(end - i)), inverse));
            sum = add_i(sum, v);
            store_activations<Bits>(a + i * kActivationBytes<Bits>, v);
        }
        start[s] = -kZero<Bits> * reduce_add_i(sum);
    }
}

// All rows, into this thread's scratch: alone where that is faster than to wake the others.
template <int Bits> QuantRows quantize_rows(const LinearArgs& args, const QuantLayout& layout) {
    QuantRows rows{};
    rows.x = args.x, rows.x_stride = args.x_stride;
    rows.m = args.m, rows.k = args.w.k;
    rows.segment = layout.segment, rows.segments = layout.segments;
    const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    rows.stride = lines((rows.k + 15) / 16 * 16 * kActivationBytes<Bits>);
    if (rows.stride % 1024 == 0) rows.stride += 64;   // else the rows of a tile would share few sets of the cache
    const int64_t start_at = lines(rows.m * rows.stride), scale_at = start_at + lines(rows.m * rows.segments * 4);
    char* memory = static_cast<char*>(thread_scratch(kScratchQuantized, static_cast<size_t>(scale_at + lines(rows.m * 4))));
    rows.a = reinterpret_cast<int8_t*>(memory);
    rows.start = reinterpret_cast<int32_t*>(memory + start_at);
    rows.scale = reinterpret_cast<float*>(memory + scale_at);
    constexpr int64_t kAlone = 32768;
    if (rows.m * rows.k <= kAlone) {
        for (int64_t row = 0; row < rows.m; ++row) quantize_row<Bits>(rows, row);
    } else {
        run_tasks(rows.m, [](const void* context, int64_t row, int64_t) {
            quantize_row<Bits>(*static_cast<const QuantRows*>(context), row);
        }, &rows);
    }
    return rows;
}

}  // namespace quire::QUIRE_NS
