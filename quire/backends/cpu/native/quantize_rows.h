// Rows of activations to 8 bits, each range of each (quantized.h) by itself: a = round(x * (127 / max|x|)), to nearest even, and x is a *
// (max|x| / 127). A range that holds a NaN or an infinity becomes zeros with the scale NaN; one with no magnitude from 2^-100 up, zeros.
#pragma once
#include "quantized.h"
#include "simd_int.h"
#include "threads.h"

namespace quire::QUIRE_NS {

#if defined(QUIRE_ISA_avx512vnni)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif
// In which form the inner loop wants activations (segment_sums.h): bytes, or for four positions their magnitudes and then
// what the bytes of stored weights are flipped with: 0x80, which makes w of w + 128, and 0x7f where the activation is negative.
template <int Bits> constexpr bool kFlips = Bits == 8 && !kVnni;
template <int Bits> constexpr int64_t kActivationBytes = kFlips<Bits> ? 2 : 1;

// Positions that share a start of the sums, at most: what 16 bits hold, or a whole segment.
template <int Bits> constexpr int64_t kSpan = Bits == 4 && !kVnni ? 64 : kSegment;

// Where the sums of a span begin: minus what its activations, summed by lanes of four positions, add too much: each its product
// with the zero of stored weights, or with the 1 of -w - 1. Two numbers of 16 bits where the sums are those.
template <int Bits> QUIRE_INLINE vi excess(vi a) { return kFlips<Bits> ? min_i(a, set1_i(0)) : a; }
template <int Bits> QUIRE_INLINE int32_t start_of(const int32_t (&four)[4], int32_t zero) {
    const int32_t low = four[0] + four[1], high = four[2] + four[3];
    if constexpr (kFlips<Bits>) return -(low + high);
    else if constexpr (kVnni) return -zero * (low + high);
    else return static_cast<int32_t>((static_cast<uint32_t>(-zero * low) & 0xffff) | static_cast<uint32_t>(-zero * high) << 16);
}

struct QuantRows {
    int8_t* a;           // rows `stride` bytes apart
    int64_t stride;
    int32_t* start;      // [m][spans]: where the integer sums start
    float* sum;          // [m][segments], for weights with offsets, else null: the sum of a segment's activations
    float* scale;        // [m][ranges]
    const float* x;
    int64_t m, k, x_stride, span, spans, segment, segments, range, ranges;
    int32_t zero;        // of the weights
};

template <int Bits, class V> QUIRE_INLINE void store_activations(int8_t* p, const V& a) {   // a vector, or four
    if constexpr (kFlips<Bits>) store_flips(p, a);
    else store_bytes(p, a);
}

// A span; returns the sum of its activations.
template <int Bits> int32_t quantize_span(const QuantRows& rows, const float* x, int8_t* a, int64_t begin, int64_t end, vf inverse,
                                          int32_t* start) {
    vi sum = set1_i(0);
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
        vi v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            v[j] = to_int(mul(load(x + i + j * kWidth), inverse));
            sum = add_i(sum, excess<Bits>(v[j]));
        }
        store_activations<Bits>(a + i * kActivationBytes<Bits>, v);
    }
    for (; i + kWidth <= end; i += kWidth) {
        const vi v = to_int(mul(load(x + i), inverse));
        sum = add_i(sum, excess<Bits>(v));
        store_activations<Bits>(a + i * kActivationBytes<Bits>, v);
    }
    if (i < end) {
        const vi v = to_int(mul(load_n(x + i, static_cast<int>(end - i)), inverse));
        sum = add_i(sum, excess<Bits>(v));
        store_activations<Bits>(a + i * kActivationBytes<Bits>, v);
    }
    int32_t four[4];
    reduce_fours(sum, four);
    *start = start_of<Bits>(four, rows.zero);
    return four[0] + four[1] + four[2] + four[3];
}

template <int Bits> void quantize_row(const QuantRows& rows, int64_t row) {
    const float* x = rows.x + row * rows.x_stride;
    int8_t* a = rows.a + row * rows.stride;
    int32_t* start = rows.start + row * rows.spans;
    float *scale = rows.scale + row * rows.ranges, *sum = rows.sum ? rows.sum + row * rows.segments : nullptr;
    if (sum) std::memset(sum, 0, static_cast<size_t>(rows.segments) * sizeof *sum);
    for (int64_t first = 0; first < rows.k; first += rows.range, ++scale) {
        const int64_t last = first + rows.range < rows.k ? first + rows.range : rows.k;
        const int32_t most_bits = greatest_magnitude(x + first, last - first);
        const float most = from_bits(static_cast<uint32_t>(most_bits));
        if (most_bits >= kInfinityBits || most < kTiny) {
            *scale = most_bits < kInfinityBits ? 0.0f : __builtin_nanf("");
            std::memset(a + first * kActivationBytes<Bits>, 0, static_cast<size_t>((last - first + 15) / 16 * 16 * kActivationBytes<Bits>));
            for (int64_t begin = first; begin < last; begin += rows.span) *start++ = 0;
            continue;
        }
        *scale = most / 127.0f;
        const vf inverse = set1(127.0f / most);
        for (int64_t begin = first; begin < last; begin += rows.span, ++start) {
            const int32_t total = quantize_span<Bits>(rows, x, a, begin, begin + rows.span < last ? begin + rows.span : last, inverse, start);
            if (sum) sum[begin / rows.segment] += static_cast<float>(total);
        }
    }
}

// All rows, into this thread's scratch: alone where that is faster than to wake the others.
template <int Bits> QuantRows quantize_rows(const LinearArgs& args, const QuantLayout& layout) {
    QuantRows rows{};
    rows.x = args.x, rows.x_stride = args.x_stride;
    rows.m = args.m, rows.k = args.w.k;
    rows.span = layout.segment < kSpan<Bits> ? layout.segment : kSpan<Bits>;
    rows.spans = (rows.k + rows.span - 1) / rows.span;
    const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    rows.stride = lines((rows.k + 15) / 16 * 16 * kActivationBytes<Bits>);
    if (rows.stride % 1024 == 0) rows.stride += 64;   // else the rows of a tile would share few sets of the cache
    rows.segment = layout.segment, rows.segments = layout.segments;
    rows.range = layout.range, rows.ranges = (rows.k + layout.range - 1) / layout.range;
    rows.zero = zero_of(args.w);
    const bool sums = args.w.coding == Coding::offsets;
    const int64_t start_at = lines(rows.m * rows.stride), scale_at = start_at + lines(rows.m * rows.spans * 4);
    const int64_t sum_at = scale_at + lines(rows.m * rows.ranges * 4), size = sum_at + (sums ? lines(rows.m * rows.segments * 4) : 0);
    char* memory = static_cast<char*>(thread_scratch(kScratchQuantized, static_cast<size_t>(size)));
    rows.a = reinterpret_cast<int8_t*>(memory);
    rows.start = reinterpret_cast<int32_t*>(memory + start_at);
    rows.scale = reinterpret_cast<float*>(memory + scale_at);
    rows.sum = sums ? reinterpret_cast<float*>(memory + sum_at) : nullptr;
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
