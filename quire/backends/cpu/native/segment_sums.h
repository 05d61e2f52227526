// The exact part of the quantized linear: a segment of weights against the rows of a register tile, as 32-bit sums. How depends on
// what the instruction set multiplies quickly.
//
//   8 bits with VNNI   stored weights (unsigned) times activations, four products added to each sum
//   8 bits without     magnitudes of activations times weights that take the sign: with a < 0 the bits of w are flipped, which
//                      makes it -w - 1. A sum of two products fits 16 bits (2 * 127 * 128), as of stored weights it would not
//   4 bits with VNNI   as 8 bits; floats of 4 bits become numbers in a register that is a table of them
//   4 bits without     stored weights times activations, 32 products and the start that makes up for their zero summed in 16
//                      bits: they wrap around on the way, but the sum of (q - 8) * a is at most 32 * 8 * 127, and of floats, which
//                      have groups of 32 positions in two lanes, 16 * 12 * 127
//
// What products come out too large by (quantize_rows.h), sums start below zero.
#pragma once
#include "gemm_prefetch.h"
#include "quantize_rows.h"

namespace quire::QUIRE_NS {

struct Int8 { static constexpr int bits = 8; static constexpr Coding coding = Coding::integers; };
template <Coding C> struct Bits4 { static constexpr int bits = 4; static constexpr Coding coding = C; };

template <int Bits> constexpr int64_t kStepK = 32 / Bits;   // positions of a step, 4 bytes of every column
constexpr int64_t kStepBytes = 4 * 4 * kWidth;              // of a panel

struct Rows {
    const int8_t* a;
    int64_t stride;
    const int32_t* start;
    int64_t start_stride;
    const float* sum;        // null without offsets
    int64_t sum_stride;
    const float* scale;
    int64_t scale_stride;
};

QUIRE_INLINE vi broadcast4(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return set1_i(four);
}
alignas(16) constexpr uint8_t kMxfp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};   // 12 + twice the float

template <class Kind> QUIRE_INLINE vi low_nibbles(vi w) {
    const vi q = and_i(w, set1_i(0x0f0f0f0f));
    if constexpr (Kind::coding == Coding::mxfp4) return look_up(kMxfp4, q);
    else return q;
}
template <class Kind> QUIRE_INLINE vi high_nibbles(vi w) { return low_nibbles<Kind>(shift_right16<4>(w)); }

constexpr int kUnrolled = kWidth == 16 ? 4 : 1;   // of the steps of a turn; with 16 registers four at a time take 5 to 15 % longer

template <int MT, int NV, class Work> QUIRE_INLINE void each(Work work) {
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) work(m, j);
}

// Where the vector j of a panel is, or of the panel beside it, which is `beside` bytes further; a vector takes `size` bytes.
template <int NV> QUIRE_INLINE int64_t vector_at(int j, int64_t size, int64_t beside) {
    constexpr int kVecs = kStepBytes / (4 * kWidth);
    if constexpr (NV > kVecs) return j / kVecs * beside + j % kVecs * size;
    return j * size;
}

// The compiler no longer knows where p points: it loads again what it would else keep, in registers that the sums need.
template <class T> QUIRE_INLINE void reload(T*& p) { asm volatile("" : "+r"(p)); }

#if defined(QUIRE_ISA_avx512vnni)
template <class Kind, int MT, int NV>
QUIRE_INLINE void step(const uint8_t* w, int64_t beside, const int8_t* a, int64_t stride, vi (&acc)[MT][NV]) {
#pragma GCC unroll 2
    for (int half = 0; half < 8 / Kind::bits; ++half) {
        vi v[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            v[j] = load_i(w + vector_at<NV>(j, 64, beside));
            if constexpr (Kind::bits == 4) v[j] = half ? high_nibbles<Kind>(v[j]) : low_nibbles<Kind>(v[j]);
        }
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vi x = broadcast4(a + m * stride + 4 * half);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[m][j] = dot(acc[m][j], v[j], x);
        }
    }
}
#else
template <class Kind, int MT, int NV>
QUIRE_INLINE void step(const uint8_t* w, int64_t beside, const int8_t* a, int64_t stride, vi (&acc)[MT][NV]) {
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m) {
        const vi magnitude = broadcast4(a + m * stride), flip = broadcast4(a + m * stride + 4);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
            const vi v = xor_i(flip, load_i(w + vector_at<NV>(j, 4 * kWidth, beside)));
            acc[m][j] = add_i(acc[m][j], add_pairs(maddubs(magnitude, v)));
        }
        reload(w);
    }
}

// A step of 4-bit weights, two vectors of columns at a time, so that their halves fit beside the sums.
template <class Kind, int MT, int NV>
QUIRE_INLINE void step16(const uint8_t* w, int64_t beside, const int8_t* a, int64_t stride, vh (&sum)[MT][NV]) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j += 2) {
        const vi v = load_i(w + vector_at<NV>(j, 4 * kWidth, beside)), u = load_i(w + vector_at<NV>(j + 1, 4 * kWidth, beside));
        const vi v0 = low_nibbles<Kind>(v), v1 = high_nibbles<Kind>(v), u0 = low_nibbles<Kind>(u), u1 = high_nibbles<Kind>(u);
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vi x0 = broadcast4(a + m * stride), x1 = broadcast4(a + m * stride + 4);
            accumulate(sum[m][j], maddubs(v0, x0));
            accumulate(sum[m][j + 1], maddubs(u0, x0));
            accumulate(sum[m][j], maddubs(v1, x1));
            accumulate(sum[m][j + 1], maddubs(u1, x1));
        }
        reload(a);
    }
}
#endif

// The sums of a segment of `positions`, which are one or two spans; F: what it prefetches.
template <class Kind, int MT, int NV, Fetch F, int Spans>
QUIRE_INLINE void segment_sums(const uint8_t* w, int64_t beside, const Rows& rows, int64_t positions, Ahead& ahead, vi (&acc)[MT][NV]) {
    constexpr int Bits = Kind::bits;
    const int8_t* a = rows.a;
    const int64_t steps = (positions + kStepK<Bits> - 1) / kStepK<Bits>;
#if !defined(QUIRE_ISA_avx512vnni)
    if constexpr (Bits == 4) {
        const int32_t* start = rows.start;
        const auto span = [&](int64_t steps) QUIRE_LAMBDA {
            vh sum[MT][NV];
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { sum[m][j] = as_half(set1_i(start[m * rows.start_stride])); });
            for (int64_t i = 0; i < steps; i += 4) {
#pragma GCC unroll 4
                for (int u = 0; u < 4; ++u) {
                    prefetch_lines<F>(ahead, u);
                    step16<Kind>(w, beside, a, rows.stride, sum);
                    w += kStepBytes;
                    a += kStepK<4>;
                }
                ahead.at += ahead.turn;
            }
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { acc[m][j] = add_pairs(sum[m][j]); });
        };
        span(steps / Spans);
        if constexpr (Spans == 2) {
            vi first[MT][NV];
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { first[m][j] = acc[m][j]; });
            ++start;
            span(steps / 2);
            each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { acc[m][j] = add_i(acc[m][j], first[m][j]); });
        }
        return;
    }
#endif
    each<MT, NV>([&](int m, int j) QUIRE_LAMBDA { acc[m][j] = set1_i(rows.start[m * rows.start_stride]); });
    const auto one = [&] QUIRE_LAMBDA {
        step<Kind>(w, beside, a, rows.stride, acc);
        w += kStepBytes;
        a += kStepK<Bits> * kActivationBytes<Bits>;
    };
    int64_t i = 0;
    for (; i + 4 <= steps; i += 4) {
#pragma GCC unroll kUnrolled
        for (int u = 0; u < 4; ++u) {
            prefetch_lines<F>(ahead, u);
            one();
        }
        ahead.at += ahead.turn;
    }
    for (; i < steps; ++i) one();
}

}  // namespace quire::QUIRE_NS
