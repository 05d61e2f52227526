// The AVX-512, VNNI and BF16 intrinsics that the kernels use, out of AVX2: the kernels of all three run, slowly, and are tested
// on a machine that has none. Only -DQUIRE_EMULATE_AVX512=ON includes this, before all else, in their files.
//
// Functions of namespace quire hide those of <immintrin.h>; an intrinsic that is missing here doesn't compile ("target
// specific option mismatch"): write it here. Results are those of the hardware, bit for bit: a vector is two of AVX2 wherever
// that has the instruction (its FMA, rounding, conversions and treatment of NaN are the same), and otherwise integers are
// exact and a float is rounded once. What the hardware leaves undefined is NaN here. Memory of lanes that a mask leaves
// out is not touched.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define QUIRE_EMULATED static inline __attribute__((always_inline))

namespace quire {

// Halves, through memory: GCC makes shuffles of vectors that the instruction set lacks out of single lanes, a thousandfold.
template <class H, class V> QUIRE_EMULATED H part512(V a, int i) {
    H h;
    std::memcpy(&h, reinterpret_cast<const char*>(&a) + 32 * i, sizeof h);
    return h;
}
template <class V, class H> QUIRE_EMULATED V both512(H a, H b) {
    V v;
    std::memcpy(&v, &a, sizeof a);
    std::memcpy(reinterpret_cast<char*>(&v) + sizeof a, &b, sizeof b);
    return v;
}
QUIRE_EMULATED __m256 low512(__m512 a) { return part512<__m256>(a, 0); }
QUIRE_EMULATED __m256 high512(__m512 a) { return part512<__m256>(a, 1); }
QUIRE_EMULATED __m256d low512(__m512d a) { return part512<__m256d>(a, 0); }
QUIRE_EMULATED __m256d high512(__m512d a) { return part512<__m256d>(a, 1); }
QUIRE_EMULATED __m256i low512(__m512i a) { return part512<__m256i>(a, 0); }
QUIRE_EMULATED __m256i high512(__m512i a) { return part512<__m256i>(a, 1); }
QUIRE_EMULATED __m512 join512(__m256 a, __m256 b) { return both512<__m512>(a, b); }
QUIRE_EMULATED __m512d join512(__m256d a, __m256d b) { return both512<__m512d>(a, b); }
QUIRE_EMULATED __m512i join512(__m256i a, __m256i b) { return both512<__m512i>(a, b); }

// What AVX2 has, twice.
#define QUIRE_TWICE(type, op) \
    QUIRE_EMULATED type _mm512_##op(type a, type b) { \
        return join512(_mm256_##op(low512(a), low512(b)), _mm256_##op(high512(a), high512(b))); \
    }
QUIRE_TWICE(__m512, add_ps)
QUIRE_TWICE(__m512, sub_ps)
QUIRE_TWICE(__m512, mul_ps)
QUIRE_TWICE(__m512, div_ps)
QUIRE_TWICE(__m512, max_ps)
QUIRE_TWICE(__m512, min_ps)
QUIRE_TWICE(__m512i, add_epi16)
QUIRE_TWICE(__m512i, add_epi32)
QUIRE_TWICE(__m512i, max_epi32)
QUIRE_TWICE(__m512i, madd_epi16)
QUIRE_TWICE(__m512i, maddubs_epi16)
QUIRE_TWICE(__m512i, shuffle_epi8)
QUIRE_TWICE(__m512i, max_epi8)
QUIRE_TWICE(__m512i, min_epi8)
QUIRE_TWICE(__m512i, min_epi32)
QUIRE_TWICE(__m512i, packs_epi16)   // of each 128 bits by themselves, as in AVX2
QUIRE_TWICE(__m512i, packs_epi32)
#undef QUIRE_TWICE
QUIRE_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return join512(_mm256_fmadd_ps(low512(a), low512(b), low512(c)), _mm256_fmadd_ps(high512(a), high512(b), high512(c)));
}
QUIRE_EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
QUIRE_EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
QUIRE_EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }

// Bits as another type.
QUIRE_EMULATED __m512 _mm512_castpd_ps(__m512d a) { return reinterpret_cast<__m512>(a); }
QUIRE_EMULATED __m512d _mm512_castps_pd(__m512 a) { return reinterpret_cast<__m512d>(a); }
QUIRE_EMULATED __m512i _mm512_castps_si512(__m512 a) { return reinterpret_cast<__m512i>(a); }
QUIRE_EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return reinterpret_cast<__m512>(a); }
QUIRE_EMULATED __m256 _mm512_castps512_ps256(__m512 a) { return low512(a); }
QUIRE_EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return low512(a); }
QUIRE_EMULATED __m512 _mm512_castps256_ps512(__m256 a) { return join512(a, _mm256_set1_ps(__builtin_nanf(""))); }

// Constants.
QUIRE_EMULATED __m512 _mm512_setzero_ps() { return join512(_mm256_setzero_ps(), _mm256_setzero_ps()); }
QUIRE_EMULATED __m512 _mm512_set1_ps(float x) { return join512(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
QUIRE_EMULATED __m512i _mm512_set1_epi16(int16_t x) { return join512(_mm256_set1_epi16(x), _mm256_set1_epi16(x)); }
QUIRE_EMULATED __m512i _mm512_broadcast_i32x4(__m128i a) { return join512(_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a)); }
QUIRE_EMULATED __m512i _mm512_set1_epi32(int32_t x) { return join512(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
QUIRE_EMULATED __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m,
                                         int n, int o, int p) {
    return join512(_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p));
}

// Memory.
template <class V, class T, class Mask> static inline V load_lanes(Mask k, const T* p) {
    T lane[sizeof(V) / sizeof(T)] = {};
    for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
        if (k >> i & 1) lane[i] = p[i];
    V a;
    std::memcpy(&a, lane, sizeof a);
    return a;
}
template <class V, class T, class Mask> static inline void store_lanes(T* p, Mask k, V a) {
    T lane[sizeof(V) / sizeof(T)];
    std::memcpy(lane, &a, sizeof a);
    for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
        if (k >> i & 1) p[i] = lane[i];
}
QUIRE_EMULATED __m512 _mm512_loadu_ps(const void* p) { __m512 a; std::memcpy(&a, p, sizeof a); return a; }
QUIRE_EMULATED __m512i _mm512_loadu_si512(const void* p) { __m512i a; std::memcpy(&a, p, sizeof a); return a; }
QUIRE_EMULATED void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof a); }
QUIRE_EMULATED void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof a); }
QUIRE_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) { return load_lanes<__m512>(k, static_cast<const float*>(p)); }
QUIRE_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
    struct __attribute__((may_alias)) Lane { int16_t bits; };
    return load_lanes<__m256i>(k, static_cast<const Lane*>(p));
}
QUIRE_EMULATED __m128i _mm_maskz_loadu_epi8(__mmask16 k, const void* p) { return load_lanes<__m128i>(k, static_cast<const char*>(p)); }
QUIRE_EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 a) { store_lanes(static_cast<float*>(p), k, a); }
QUIRE_EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i a) {
    struct __attribute__((may_alias)) Lane { int16_t bits; };
    store_lanes(static_cast<Lane*>(p), k, a);
}

// Masks.
QUIRE_EMULATED __m256i lanes_of_mask(unsigned k) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(k)), bit), bit);
}
QUIRE_EMULATED __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
    return join512(_mm256_blendv_ps(low512(a), low512(b), _mm256_castsi256_ps(lanes_of_mask(k & 255u))),
                   _mm256_blendv_ps(high512(a), high512(b), _mm256_castsi256_ps(lanes_of_mask(k >> 8))));
}
QUIRE_EMULATED __m512i _mm512_maskz_compress_epi32(__mmask16 k, __m512i a) {
    int32_t lane[16], kept[16] = {}, count = 0;
    std::memcpy(lane, &a, sizeof a);
    for (int i = 0; i < 16; ++i)
        if (k >> i & 1) kept[count++] = lane[i];
    std::memcpy(&a, kept, sizeof a);
    return a;
}
template <int Predicate> QUIRE_EMULATED __mmask16 compare_ps(__m512 a, __m512 b) {
    return static_cast<__mmask16>(_mm256_movemask_ps(_mm256_cmp_ps(low512(a), low512(b), Predicate)) |
                                  _mm256_movemask_ps(_mm256_cmp_ps(high512(a), high512(b), Predicate)) << 8);
}

// Conversions.
QUIRE_EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
    return join512(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int Rounding> QUIRE_EMULATED __m256i ps_to_ph(__m512 a) {
    return _mm256_setr_m128i(_mm256_cvtps_ph(low512(a), Rounding), _mm256_cvtps_ph(high512(a), Rounding));
}
QUIRE_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return join512(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
QUIRE_EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return join512(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(a, a)));
}
QUIRE_EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) {
    const __m256i low_byte = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(low512(a), low_byte), _mm256_and_si256(high512(a), low_byte));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
}
QUIRE_EMULATED __m256i _mm512_cvtepi64_epi32(__m512i a) {
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    return _mm256_blend_epi32(_mm256_permutevar8x32_epi32(low512(a), even), _mm256_permutevar8x32_epi32(high512(a), even), 0xf0);
}
QUIRE_EMULATED __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
    int32_t at[16], from[16], to[16];
    std::memcpy(at, &index, sizeof at);
    std::memcpy(from, &a, sizeof from);
    for (int i = 0; i < 16; ++i) to[i] = from[at[i] & 15];
    std::memcpy(&a, to, sizeof to);
    return a;
}
QUIRE_EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) { return join512(_mm256_cvtepi32_ps(low512(a)), _mm256_cvtepi32_ps(high512(a))); }
QUIRE_EMULATED __m512i _mm512_cvtps_epi32(__m512 a) { return join512(_mm256_cvtps_epi32(low512(a)), _mm256_cvtps_epi32(high512(a))); }

// The rest of floats.
QUIRE_EMULATED __m512 _mm512_abs_ps(__m512 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return join512(_mm256_andnot_ps(sign, low512(a)), _mm256_andnot_ps(sign, high512(a)));
}
template <int Rounding> QUIRE_EMULATED __m512 round_ps(__m512 a) {
    static_assert(Rounding < 16, "whole numbers only");
    return join512(_mm256_round_ps(low512(a), Rounding), _mm256_round_ps(high512(a), Rounding));
}
// a * 2^floor(b), rounded once: the product is exact in doubles. (A NaN a with an infinite b is NaN here, b or 0 there.)
QUIRE_EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
    constexpr float kEnough = 400;   // zero or infinity for every a
    __m512 r = a;
    for (int i = 0; i < 16; ++i) {
        const float n = __builtin_floorf(b[i]);
        const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(n > kEnough ? kEnough : n > -kEnough ? n : -kEnough) + 1023) << 52;
        double power;
        std::memcpy(&power, &bits, sizeof power);
        if (n != n || n == __builtin_inff()) power = n;
        if (n == -__builtin_inff()) power = 0;
        r[i] = static_cast<float>(static_cast<double>(a[i]) * power);
    }
    return r;
}

// The rest of integers.
template <int N> QUIRE_EMULATED __m512i shift_left32(__m512i a) {
    return join512(_mm256_slli_epi32(low512(a), N), _mm256_slli_epi32(high512(a), N));
}
template <int N> QUIRE_EMULATED __m512i shift_right_of_16(__m512i a) {
    return join512(_mm256_srli_epi16(low512(a), N), _mm256_srli_epi16(high512(a), N));
}
template <int N> QUIRE_EMULATED __m512i shift_right64(__m512i a) {
    return join512(_mm256_srli_epi64(low512(a), N), _mm256_srli_epi64(high512(a), N));
}
QUIRE_EMULATED int32_t _mm512_reduce_add_epi32(__m512i a) {
    uint32_t lane[16], sum = 0;
    std::memcpy(lane, &a, sizeof a);
    for (uint32_t x : lane) sum += x;
    return static_cast<int32_t>(sum);
}
QUIRE_EMULATED int32_t _mm512_reduce_max_epi32(__m512i a) {
    int32_t lane[16], most = INT32_MIN;
    std::memcpy(lane, &a, sizeof a);
    for (int32_t x : lane) most = x > most ? x : most;
    return most;
}
// Even and odd bytes apart: their products fit 16 bits, and madd sums them in 32.
QUIRE_EMULATED __m256i dpbusd256(__m256i sum, __m256i u, __m256i s) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
QUIRE_EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i u, __m512i s) {
    return join512(dpbusd256(low512(sum), low512(u), low512(s)), dpbusd256(high512(sum), high512(u), high512(s)));
}

// BF16. Of a pair, the second product is added first; either sum is rounded once, and what is subnormal is 0 throughout.
QUIRE_EMULATED __m256 flush256(__m256 a) {
    const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7f800000));
    const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srli_epi32(small, 1)), a);   // the sign stays
}
QUIRE_EMULATED __m256 dpbf16_256(__m256 sum, __m256i a, __m256i b) {
    const auto odd = [](__m256i x) { return flush256(_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(INT32_MIN >> 15)))); };
    const auto even = [](__m256i x) { return flush256(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))); };
    sum = flush256(_mm256_fmadd_ps(odd(a), odd(b), flush256(sum)));
    return flush256(_mm256_fmadd_ps(even(a), even(b), sum));
}
QUIRE_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
    return join512(dpbf16_256(low512(sum), low512(x), low512(y)), dpbf16_256(high512(sum), high512(x), high512(y)));
}
QUIRE_EMULATED __m256i narrow_bf16_256(__m256 a) {   // 32 bits each
    const __m256i u = _mm256_castps_si256(flush256(a)), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(even, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
QUIRE_EMULATED __m256i narrow_bf16(__m512 a) {
    const __m256i packed = _mm256_packus_epi32(narrow_bf16_256(low512(a)), narrow_bf16_256(high512(a)));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
QUIRE_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    return reinterpret_cast<__m512bh>(join512(narrow_bf16(low), narrow_bf16(high)));
}

// Halves by number.
template <int N> QUIRE_EMULATED __m512d with_half(__m512d a, __m256d b) { return N ? join512(low512(a), b) : join512(b, high512(a)); }
template <int N> QUIRE_EMULATED __m256d half_of(__m512d a) { return N ? high512(a) : low512(a); }
template <int N> QUIRE_EMULATED __m256i half_of(__m512i a) { return N ? high512(a) : low512(a); }

}  // namespace quire

// Those whose last argument is a constant; without optimization, <immintrin.h> has them as macros too.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_roundscale_ps
#undef _mm512_slli_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi64
#undef _mm512_insertf64x4
#undef _mm512_extractf64x4_pd
#undef _mm512_extracti64x4_epi64
#define _mm512_cmp_ps_mask(a, b, predicate) ::quire::compare_ps<(predicate)>(a, b)
#define _mm512_cvtps_ph(a, rounding) ::quire::ps_to_ph<(rounding)>(a)
#define _mm512_roundscale_ps(a, rounding) ::quire::round_ps<(rounding)>(a)
#define _mm512_slli_epi32(a, n) ::quire::shift_left32<(n)>(a)
#define _mm512_srli_epi16(a, n) ::quire::shift_right_of_16<(n)>(a)
#define _mm512_srli_epi64(a, n) ::quire::shift_right64<(n)>(a)
#define _mm512_insertf64x4(a, b, n) ::quire::with_half<(n)>(a, b)
#define _mm512_extractf64x4_pd(a, n) ::quire::half_of<(n)>(a)
#define _mm512_extracti64x4_epi64(a, n) ::quire::half_of<(n)>(a)
