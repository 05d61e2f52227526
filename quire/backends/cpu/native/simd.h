// One vector type, three instruction sets. A file that includes this is compiled once for each of them, with
// QUIRE_ISA_avx512, QUIRE_ISA_avx2 or QUIRE_ISA_portable defined; QUIRE_NS is the namespace of that compilation.
//
// Everything here is static and forced inline, so no symbol of one instruction set can stand in for another's.
// The portable path has no fused multiply-add: fma(a, b, c) is a product and a sum there, for vectors and scalars
// alike, so that a tail takes the same chain as the lanes before it.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(QUIRE_ISA_avx512bf16)   // avx512, and products of bfloat16
#define QUIRE_ISA_avx512
#define QUIRE_NS avx512bf16
#include <immintrin.h>
#elif defined(QUIRE_ISA_avx512vnni)   // avx512, and the products of bytes in simd_int.h
#define QUIRE_ISA_avx512
#define QUIRE_NS avx512vnni
#include <immintrin.h>
#elif defined(QUIRE_ISA_avx512)
#define QUIRE_NS avx512
#include <immintrin.h>
#elif defined(QUIRE_ISA_avx2)
#define QUIRE_NS avx2
#include <immintrin.h>
#else
#define QUIRE_NS portable
#endif

#define QUIRE_INLINE static inline __attribute__((always_inline))
#define QUIRE_LAMBDA __attribute__((always_inline))

namespace quire::QUIRE_NS {

// 16-bit types, one at a time.
QUIRE_INLINE float from_bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
QUIRE_INLINE uint32_t to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
QUIRE_INLINE float to_float(float x) { return x; }
QUIRE_INLINE float to_float(bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
QUIRE_INLINE float to_float(f16 x) {
    // The product is exact, subnormals included; infinities and NaNs get their exponent back afterwards.
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
    uint32_t u = to_bits(from_bits(magnitude) * 0x1p112f) | sign;
    if (magnitude >= 0x0f800000u) u |= 0x7f800000u;
    return from_bits(u);
}
QUIRE_INLINE void from_float(float x, float& out) { out = x; }
QUIRE_INLINE void from_float(float x, bf16& out) {
    const uint32_t u = to_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) out.bits = static_cast<uint16_t>((u >> 16) | 0x40u);
    else out.bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
QUIRE_INLINE void from_float(float x, f16& out) {
    // Adding a power of two 2^13 times the unit in the last place of the result rounds to nearest even at that bit.
    const uint32_t u = to_bits(x), twice = u + u, sign = (u & 0x80000000u) >> 16;
    float base = (from_bits(u & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
    uint32_t bias = twice & 0xff000000u;
    if (bias < 0x71000000u) bias = 0x71000000u;
    base = from_bits((bias >> 1) + 0x07800000u) + base;
    const uint32_t bits = to_bits(base), half = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
    out.bits = static_cast<uint16_t>(sign | (twice > 0xff000000u ? 0x7e00u : half));
}

#if defined(QUIRE_ISA_avx512)
using vf = __m512;
using vm = __mmask16;
constexpr int kWidth = 16;
QUIRE_INLINE vm first_lanes(int n) { return static_cast<vm>((1u << n) - 1); }
QUIRE_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
QUIRE_INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
QUIRE_INLINE vf widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
QUIRE_INLINE vf load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
// The first, and the second, of kWidth pairs.
QUIRE_INLINE vf load_even(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
QUIRE_INLINE vf load_odd(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(INT32_MIN >> 15)));
}
QUIRE_INLINE vf widen_i8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
QUIRE_INLINE vf load(const i8* p) { return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
QUIRE_INLINE vf widen(__m256i x, f16) { return _mm512_cvtph_ps(x); }
QUIRE_INLINE vf widen(__m256i x, bf16) { return widen_bf16(x); }
QUIRE_INLINE vf load_halves(const float* a, const float* b) {
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(_mm256_loadu_ps(a))),
                                               _mm256_castps_pd(_mm256_loadu_ps(b)), 1));
}
template <class T> QUIRE_INLINE vf load_halves(const T* a, const T* b) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a)), y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    return widen(_mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1), T{});
}
QUIRE_INLINE vf load_quarters(const float* a, const float* b, const float* c, const float* d) {
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(c)), _mm_loadu_ps(d), 1);
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(low)), _mm256_castps_pd(high), 1));
}
template <class T> QUIRE_INLINE vf load_quarters(const T* a, const T* b, const T* c, const T* d) {
    const auto four = [](const T* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); };
    const __m128i low = _mm_unpacklo_epi64(four(a), four(b)), high = _mm_unpacklo_epi64(four(c), four(d));
    return widen(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), T{});
}
QUIRE_INLINE __m128i bytes4(const i8* p) { int32_t x; std::memcpy(&x, p, 4); return _mm_cvtsi32_si128(x); }
QUIRE_INLINE vf load_halves(const i8* a, const i8* b) {
    return widen_i8(_mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)),
                                       _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b))));
}
QUIRE_INLINE vf load_quarters(const i8* a, const i8* b, const i8* c, const i8* d) {
    return widen_i8(_mm_unpacklo_epi64(_mm_unpacklo_epi32(bytes4(a), bytes4(b)), _mm_unpacklo_epi32(bytes4(c), bytes4(d))));
}
QUIRE_INLINE vf load_n(const i8* p, int n) { return widen_i8(_mm_maskz_loadu_epi8(first_lanes(n), p)); }
QUIRE_INLINE vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
QUIRE_INLINE vf load_n(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
QUIRE_INLINE vf load_n(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
QUIRE_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
QUIRE_INLINE void store_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
QUIRE_INLINE __m256i narrow_f16(vf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QUIRE_INLINE void store(f16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }
QUIRE_INLINE void store_n(f16* p, vf a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_f16(a)); }
QUIRE_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
QUIRE_INLINE vf zero() { return _mm512_setzero_ps(); }
QUIRE_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
QUIRE_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
QUIRE_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
QUIRE_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
QUIRE_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
QUIRE_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }   // b where either is NaN
QUIRE_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }   // b where either is NaN
QUIRE_INLINE vf abs(vf a) { return _mm512_abs_ps(a); }
QUIRE_INLINE vf neg(vf a) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN))); }
QUIRE_INLINE vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QUIRE_INLINE vf scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }   // a * 2^n, n whole
constexpr float kNoPower = -150;   // 2^kNoPower is 0
QUIRE_INLINE vf round_power(vf a) { return round_even(a); }
QUIRE_INLINE vf whole_power(vf n) { return n; }
QUIRE_INLINE vf times_power(vf a, vf n) { return scale2(a, n); }
QUIRE_INLINE vm greater(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
QUIRE_INLINE vm at_least(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
QUIRE_INLINE vm equal(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
QUIRE_INLINE vm below_inf(vf a) { return _mm512_cmp_ps_mask(a, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ); }
QUIRE_INLINE uint32_t bits(vm m) { return m; }
QUIRE_INLINE vf select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
QUIRE_INLINE vm lanes_between(int lo, int hi) {   // lanes i with lo <= i < hi, any lo and hi
    lo = lo < 0 ? 0 : lo > 16 ? 16 : lo, hi = hi < lo ? lo : hi > 16 ? 16 : hi;
    return static_cast<vm>(((1u << hi) - 1) & ~((1u << lo) - 1));
}
QUIRE_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#if defined(QUIRE_ISA_avx512bf16)
using vp = __m512bh;   // kWidth pairs
QUIRE_INLINE vp load_pairs(const bf16* p) { return reinterpret_cast<vp>(_mm512_loadu_si512(p)); }
QUIRE_INLINE vp set1_pair(const bf16* p) { int32_t x; std::memcpy(&x, p, 4); return reinterpret_cast<vp>(_mm512_set1_epi32(x)); }
QUIRE_INLINE vp narrow_pairs(vf first, vf second) { return _mm512_cvtne2ps_pbh(second, first); }   // to nearest even; subnormals to 0
QUIRE_INLINE void store_pairs(bf16* p, vp a) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(a)); }
QUIRE_INLINE vf add_dot(vf sum, vp a, vp b) { return _mm512_dpbf16_ps(sum, a, b); }   // of both numbers of each pair
#endif

#elif defined(QUIRE_ISA_avx2)
using vf = __m256;
using vm = __m256;
constexpr int kWidth = 8;
QUIRE_INLINE vf iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
QUIRE_INLINE __m256i first_lanes(int n) {
    return _mm256_castps_si256(_mm256_cmp_ps(iota(), _mm256_set1_ps(static_cast<float>(n)), _CMP_LT_OQ));
}
QUIRE_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
QUIRE_INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
QUIRE_INLINE vf widen(__m128i x, f16) { return _mm256_cvtph_ps(x); }
QUIRE_INLINE vf widen(__m128i x, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
QUIRE_INLINE vf load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), bf16{}); }
// Two vectors whose lanes take turns.
QUIRE_INLINE void load_two(const bf16* p, vf& a, vf& b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(INT32_MIN >> 15)));
}
QUIRE_INLINE vf widen_i8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
QUIRE_INLINE vf load(const i8* p) { return widen_i8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
QUIRE_INLINE vf load_halves(const i8* a, const i8* b) {
    const auto four = [](const i8* p) { int32_t x; std::memcpy(&x, p, 4); return _mm_cvtsi32_si128(x); };
    return widen_i8(_mm_unpacklo_epi32(four(a), four(b)));
}
QUIRE_INLINE vf load_halves(const float* a, const float* b) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
}
template <class T> QUIRE_INLINE vf load_halves(const T* a, const T* b) {
    const auto four = [](const T* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); };
    return widen(_mm_unpacklo_epi64(four(a), four(b)), T{});
}
QUIRE_INLINE vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
QUIRE_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
QUIRE_INLINE void store_n(float* p, vf a, int n) {
    if (n == kWidth) return store(p, a);   // a masked store takes some twenty cycles on some machines
    _mm256_maskstore_ps(p, first_lanes(n), a);
}
QUIRE_INLINE void store(f16* p, vf a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QUIRE_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
QUIRE_INLINE vf zero() { return _mm256_setzero_ps(); }
QUIRE_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
QUIRE_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
QUIRE_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
QUIRE_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
QUIRE_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
QUIRE_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
QUIRE_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
QUIRE_INLINE vf abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
QUIRE_INLINE vf neg(vf a) { return _mm256_xor_ps(_mm256_set1_ps(-0.0f), a); }
QUIRE_INLINE vf round_even(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QUIRE_INLINE vf scale2(vf a, vf n) {   // in two steps, so that a subnormal result is rounded once
    const __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1), rest = _mm256_sub_epi32(e, half);
    const __m256i bias = _mm256_set1_epi32(127);
    const vf p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const vf q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(a, p), q);
}
QUIRE_INLINE vf exponent_bits(vf a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
QUIRE_INLINE vm greater(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
QUIRE_INLINE vm at_least(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
QUIRE_INLINE vm equal(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
QUIRE_INLINE vm below_inf(vf a) { return _mm256_cmp_ps(a, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ); }
QUIRE_INLINE uint32_t bits(vm m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
QUIRE_INLINE vf select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
QUIRE_INLINE vm lanes_between(int lo, int hi) {
    const vf i = iota();
    return _mm256_and_ps(_mm256_cmp_ps(i, _mm256_set1_ps(static_cast<float>(lo)), _CMP_GE_OQ),
                         _mm256_cmp_ps(i, _mm256_set1_ps(static_cast<float>(hi)), _CMP_LT_OQ));
}
QUIRE_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

#else
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));
constexpr int kWidth = 4;
QUIRE_INLINE vm iota() { return vm{0, 1, 2, 3}; }
QUIRE_INLINE vf as_float(vm a) { return reinterpret_cast<vf>(a); }
QUIRE_INLINE vm as_int(vf a) { return reinterpret_cast<vm>(a); }
QUIRE_INLINE vm set1i(int32_t x) { return vm{x, x, x, x}; }
QUIRE_INLINE vf set1(float x) { return vf{x, x, x, x}; }
QUIRE_INLINE vf zero() { return vf{0, 0, 0, 0}; }
QUIRE_INLINE vf load(const float* p) { vf a; std::memcpy(&a, p, sizeof a); return a; }
QUIRE_INLINE vf load(const bf16* p) {
    return as_float(vm{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
QUIRE_INLINE void load_two(const bf16* p, vf& a, vf& b) {
    vm x;
    std::memcpy(&x, p, sizeof x);
    a = as_float(x << 16), b = as_float(x & (INT32_MIN >> 15));
}
QUIRE_INLINE vf load(const f16* p) {
    const vm u{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    const vm magnitude = (u & 0x7fff) << 13, sign = (u & 0x8000) << 16, special = magnitude >= 0x0f800000;
    return as_float(as_int(as_float(magnitude) * 0x1p112f) | sign | (special & 0x7f800000));
}
QUIRE_INLINE vf load(const i8* p) {
    return vf{static_cast<float>(p[0].value), static_cast<float>(p[1].value), static_cast<float>(p[2].value),
              static_cast<float>(p[3].value)};
}
QUIRE_INLINE void store(float* p, vf a) { std::memcpy(p, &a, sizeof a); }
QUIRE_INLINE void store_n(float* p, vf a, int n) { for (int i = 0; i < n; ++i) p[i] = a[i]; }
QUIRE_INLINE void store(f16* p, vf a) { for (int i = 0; i < kWidth; ++i) from_float(a[i], p[i]); }
QUIRE_INLINE vf add(vf a, vf b) { return a + b; }
QUIRE_INLINE vf sub(vf a, vf b) { return a - b; }
QUIRE_INLINE vf mul(vf a, vf b) { return a * b; }
QUIRE_INLINE vf div(vf a, vf b) { return a / b; }
QUIRE_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
QUIRE_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
QUIRE_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
QUIRE_INLINE vf abs(vf a) { return as_float(as_int(a) & 0x7fffffff); }
QUIRE_INLINE vf neg(vf a) { return -a; }
QUIRE_INLINE vf round_even(vf a) { return (a + 12582912.0f) - 12582912.0f; }   // for |a| < 2^22
QUIRE_INLINE vf scale2(vf a, vf n) {
    const vm e = __builtin_convertvector(n, vm), half = e >> 1, rest = e - half;
    return a * as_float((half + 127) << 23) * as_float((rest + 127) << 23);
}
QUIRE_INLINE vf exponent_bits(vf a) { return as_float(as_int(a) << 23); }
QUIRE_INLINE vm greater(vf a, vf b) { return a > b; }
QUIRE_INLINE vm at_least(vf a, vf b) { return a >= b; }
QUIRE_INLINE vm equal(vf a, vf b) { return a == b; }
QUIRE_INLINE vm below_inf(vf a) { return a < set1(__builtin_inff()); }
QUIRE_INLINE uint32_t bits(vm m) { return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u); }
QUIRE_INLINE vf select(vm m, vf a, vf b) { return as_float((as_int(a) & m) | (as_int(b) & ~m)); }
QUIRE_INLINE vm lanes_between(int lo, int hi) { return (iota() >= set1i(lo)) & (iota() < set1i(hi)); }
QUIRE_INLINE float fma1(float a, float b, float c) { return a * b + c; }
#endif

#if !defined(QUIRE_ISA_avx512)
// A power of 2 with an exponent n in [-127, 0], rounded from a float: adding 1.5 * 2^23 rounds, and the 127 leaves the biased
// exponent in the lowest bits. There is no 2^-127: it is 0.
constexpr float kNoPower = -127, kPowerBias = 12582912.0f + 127.0f;
QUIRE_INLINE vf round_power(vf a) { return add(a, set1(kPowerBias)); }
QUIRE_INLINE vf whole_power(vf n) { return sub(n, set1(kPowerBias)); }
QUIRE_INLINE vf times_power(vf a, vf n) { return mul(a, exponent_bits(n)); }
#endif

// What the instruction set has no instruction for goes through a small buffer.
#if !defined(QUIRE_ISA_avx512)
template <class T> QUIRE_INLINE vf load_n(const T* p, int n) {
    if (n == kWidth) return load(p);
    T buffer[kWidth] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
}
QUIRE_INLINE void store_n(f16* p, vf a, int n) {
    f16 buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif
QUIRE_INLINE void store_n(bf16* p, vf a, int n) {
    float buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) from_float(buffer[i], p[i]);
}
QUIRE_INLINE void store(bf16* p, vf a) { store_n(p, a, kWidth); }

// A vector whose halves, or quarters, lie at at[0] + i, at[1] + i and so on.
template <int Parts, class T> QUIRE_INLINE vf load_parts(const T* const* at, int64_t i) {
    static_assert(Parts == 1 || kWidth / Parts >= 4);
    if constexpr (Parts == 1) return load(at[0] + i);
#if !defined(QUIRE_ISA_portable)
    if constexpr (Parts == 2) return load_halves(at[0] + i, at[1] + i);
#endif
#if defined(QUIRE_ISA_avx512)
    if constexpr (Parts == 4) return load_quarters(at[0] + i, at[1] + i, at[2] + i, at[3] + i);
#endif
}

// Across lanes, halves first, always in the same order.
#if defined(QUIRE_ISA_portable)
QUIRE_INLINE float reduce_add(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
QUIRE_INLINE float reduce_max(vf a) {
    const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}
#else
#if defined(QUIRE_ISA_avx512)
QUIRE_INLINE __m256 upper(vf a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
QUIRE_INLINE float reduce_add(vf v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), upper(v));
#else
QUIRE_INLINE float reduce_add(vf a) {
#endif
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
#if defined(QUIRE_ISA_avx512)
QUIRE_INLINE float reduce_max(vf v) {
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), upper(v));
#else
QUIRE_INLINE float reduce_max(vf a) {
#endif
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#endif
QUIRE_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
QUIRE_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r (Cephes, expf). Infinities, overflow and
// gradual underflow come out as in IEEE arithmetic; NaN stays NaN.
QUIRE_INLINE vf exp(vf x) {
    x = max(set1(-104.0f), min(set1(89.0f), x));
    const vf n = round_even(mul(x, set1(1.44269504088896341f)));
    vf r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return scale2(p, n);
}
QUIRE_INLINE float exp1(float x) {
    float lane[kWidth];
    store(lane, exp(set1(x)));
    return lane[0];
}

}  // namespace quire::QUIRE_NS
