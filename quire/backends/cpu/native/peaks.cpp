// The loops that measure the machine: reading, and arithmetic of each width, as one instruction set can do them.
#include "simd.h"

namespace quire::QUIRE_NS {

namespace {

// Nothing happens to the value, but the compiler believes that it is used, or that it changed.
#if defined(__AVX512F__)
template <class T> QUIRE_INLINE void keep(T& v) { asm volatile("" : "+v"(v)); }
#elif defined(QUIRE_ISA_avx2)
template <class T> QUIRE_INLINE void keep(T& v) { asm volatile("" : "+x"(v)); }
#else
template <class T> QUIRE_INLINE void keep(T& v) { asm volatile("" : "+m"(v)); }
#endif

}  // namespace

// In one place with prefetches 4 KiB ahead, or in four places at once as the hardware prefetches by itself. Which is faster depends
// on the machine: the first by 2 to 4 % on Zen 4, the second by 20 to 50 % on Zen 3. Other distances and non-temporal hints read less.
double read_sum(const float* p, int64_t n, bool apart) {
    constexpr int64_t kAhead = 1024, kStep = 4 * kWidth;
    const int64_t part = n / 4 / kStep * kStep;
    vf sum[4];
    for (vf& s : sum) s = zero();
    const auto take = [&](const float* from) QUIRE_LAMBDA {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], load(from + j * kWidth));
    };
    if (apart) {
        for (int64_t i = 0; i < part; i += kStep)
#pragma GCC unroll 4
            for (int s = 0; s < 4; ++s) take(p + s * part + i);
    } else {
        for (int64_t i = 0; i < 4 * part; i += kStep) {
            for (int j = 0; j < kStep; j += 16) prefetch_l2(p + i + j + kAhead);
            take(p + i);
        }
    }
    double total = 0;
    for (vf& s : sum) total += reduce_add(s);
    return total;
}

constexpr int kChains = 12;   // enough to hide the latency of an FMA, few enough for 16 registers

int64_t fma_loop(int64_t iterations) {
    vf c[kChains];
    for (int i = 0; i < kChains; ++i) c[i] = set1(0.1f * static_cast<float>(i));
    const vf a = set1(0.999f), b = set1(1e-6f);
    for (int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) c[i] = fma(c[i], a, b);
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) keep(c[i]);
    return 2 * kWidth * kChains * iterations;
}

#if defined(QUIRE_ISA_avx512bf16)
int64_t bf16_loop(int64_t iterations) {
    vf c[kChains];
    for (vf& v : c) v = zero();
    vp a = {}, b = {};
    keep(a), keep(b);
    for (int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) c[i] = add_dot(c[i], a, b);
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) keep(c[i]);
    return 4 * kWidth * kChains * iterations;
}
#endif

// Multiply-adds of int8 with sums of int32, as a tile of a product keeps them in registers: rows of activations times
// vectors of weights. With VNNI an instruction takes every byte; without it bytes are widened to 16 bits first (which a
// product does once for many rows, so it is not counted), since vpmaddubsw saturates and the sums must be exact.
namespace {

#if defined(QUIRE_ISA_avx512vnni)
constexpr int kRows = 4, kVecs = 4, kMacs = 64;
using vi = __m512i;
using Operand = vi;
QUIRE_INLINE void multiply_add(vi& sum, vi x, vi w) { sum = _mm512_dpbusd_epi32(sum, x, w); }
#elif defined(QUIRE_ISA_avx512)
constexpr int kRows = 4, kVecs = 4, kMacs = 32;
using vi = __m512i;
using Operand = vi;
QUIRE_INLINE void multiply_add(vi& sum, vi x, vi w) { sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, w)); }
#elif defined(QUIRE_ISA_avx2)
constexpr int kRows = 4, kVecs = 2, kMacs = 16;
using vi = __m256i;
using Operand = vi;
QUIRE_INLINE void multiply_add(vi& sum, vi x, vi w) { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
#else
constexpr int kRows = 4, kVecs = 2, kMacs = 8;   // plain C, as fast as the compiler makes it
struct vi { int32_t lane[kMacs]; };
struct Operand { int16_t lane[kMacs]; };
QUIRE_INLINE void multiply_add(vi& sum, const Operand& x, const Operand& w) {
    for (int i = 0; i < kMacs; ++i) sum.lane[i] += x.lane[i] * w.lane[i];
}
#endif

}  // namespace

int64_t int8_loop(int64_t iterations) {
    vi sum[kRows][kVecs] = {};
    Operand x[kRows] = {}, w[kVecs] = {};
    for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 4
        for (Operand& v : x) keep(v);   // or the compiler would multiply once and only add from then on
#pragma GCC unroll 4
        for (Operand& v : w) keep(v);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) multiply_add(sum[m][j], x[m], w[j]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) keep(sum[m][j]);
    return int64_t{2} * kRows * kVecs * kMacs * iterations;
}

}  // namespace quire::QUIRE_NS
