// Vectors of 32-bit integers, as wide as those of simd.h, and the products of bytes that the quantized linear is made of.
// All of it is exact, so every instruction set computes the same integers.
#pragma once
#include "simd.h"

namespace quire::QUIRE_NS {

#if !defined(QUIRE_ISA_portable)
QUIRE_INLINE __m128i flips(__m128i bytes) {
    return _mm_xor_si128(_mm_cmpgt_epi8(_mm_setzero_si128(), bytes), _mm_set1_epi8(-128));
}
#endif

#if defined(QUIRE_ISA_avx512)
// Not __m512i, which is a vector of 64-bit integers to GCC: sums that change type in a loop are copied at every step.
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(64)));
QUIRE_INLINE __m512i raw(vi a) { return reinterpret_cast<__m512i>(a); }
QUIRE_INLINE vi as_vi(__m512i a) { return reinterpret_cast<vi>(a); }
QUIRE_INLINE vi max_i(vi a, vi b) { return as_vi(_mm512_max_epi32(raw(a), raw(b))); }
QUIRE_INLINE vi min_i(vi a, vi b) { return as_vi(_mm512_min_epi32(raw(a), raw(b))); }
template <int N> QUIRE_INLINE vi shift_right16(vi a) { return as_vi(_mm512_srli_epi16(raw(a), N)); }
QUIRE_INLINE vi bits_i(vf a) { return reinterpret_cast<vi>(a); }
QUIRE_INLINE vi to_int(vf a) { return as_vi(_mm512_cvtps_epi32(a)); }      // to nearest even; |a| < 2^22
QUIRE_INLINE vf to_float_v(vi a) { return _mm512_cvtepi32_ps(raw(a)); }
QUIRE_INLINE int32_t reduce_max_i(vi a) { return _mm512_reduce_max_epi32(raw(a)); }
QUIRE_INLINE void store_bytes(int8_t* p, vi a) {   // the low byte of each lane
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(raw(a)));
}
// For four lanes four bytes of magnitudes, then four that are 0x7f where the lane is negative, else 0x80.
QUIRE_INLINE void store_flips(int8_t* p, vi a) {
    const __m128i bytes = _mm512_cvtepi32_epi8(raw(a)), magnitude = _mm_abs_epi8(bytes), flip = flips(bytes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(magnitude, flip));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm_unpackhi_epi32(magnitude, flip));
}
// Neighbouring products of an unsigned and a signed byte, summed in 16 bits, which must hold them; neighbours of those, summed.
QUIRE_INLINE vh maddubs(vi u, vi a) { return reinterpret_cast<vh>(_mm512_maddubs_epi16(raw(u), raw(a))); }
QUIRE_INLINE vi add_pairs(vh a) { return as_vi(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), _mm512_set1_epi16(1))); }
// Four vectors' lanes in order as bytes, with saturation; the greater and the smaller of signed bytes.
QUIRE_INLINE vi narrow(const vi (&a)[4]) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_packs_epi32(raw(a[0]), raw(a[1])), high = _mm512_packs_epi32(raw(a[2]), raw(a[3]));
    return as_vi(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}
// Eight bytes of four bits each become four: position k + i low, k + 4 + i high.
QUIRE_INLINE void store_nibbles(uint8_t* p, vi bytes) {
    const __m512i both = _mm512_or_si512(raw(bytes), _mm512_srli_epi64(raw(bytes), 28));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(both));
}
// For each byte of `at`, 0 to 15, that of the table.
QUIRE_INLINE vi look_up(const uint8_t (&table)[16], vi at) {
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return as_vi(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), raw(at)));
}
QUIRE_INLINE vi max_bytes(vi a, vi b) { return as_vi(_mm512_max_epi8(raw(a), raw(b))); }
QUIRE_INLINE vi min_bytes(vi a, vi b) { return as_vi(_mm512_min_epi8(raw(a), raw(b))); }
#if defined(QUIRE_ISA_avx512vnni)
// Four products of an unsigned and a signed byte added to each lane.
QUIRE_INLINE vi dot(vi sum, vi u, vi a) { return as_vi(_mm512_dpbusd_epi32(raw(sum), raw(u), raw(a))); }
#endif

#elif defined(QUIRE_ISA_avx2)
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(32)));
QUIRE_INLINE __m256i raw(vi a) { return reinterpret_cast<__m256i>(a); }
QUIRE_INLINE vi as_vi(__m256i a) { return reinterpret_cast<vi>(a); }
QUIRE_INLINE vi max_i(vi a, vi b) { return as_vi(_mm256_max_epi32(raw(a), raw(b))); }
QUIRE_INLINE vi min_i(vi a, vi b) { return as_vi(_mm256_min_epi32(raw(a), raw(b))); }
template <int N> QUIRE_INLINE vi shift_right16(vi a) { return as_vi(_mm256_srli_epi16(raw(a), N)); }
QUIRE_INLINE vi bits_i(vf a) { return reinterpret_cast<vi>(a); }
QUIRE_INLINE vi to_int(vf a) { return as_vi(_mm256_cvtps_epi32(a)); }
QUIRE_INLINE vf to_float_v(vi a) { return _mm256_cvtepi32_ps(raw(a)); }
QUIRE_INLINE __m128i low_bytes(vi a) {
    const __m256i bytes = _mm256_and_si256(raw(a), _mm256_set1_epi32(255));
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    return _mm_packus_epi16(half, half);
}
QUIRE_INLINE void store_bytes(int8_t* p, vi a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low_bytes(a)); }
QUIRE_INLINE void store_flips(int8_t* p, vi a) {
    const __m128i bytes = low_bytes(a);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(_mm_abs_epi8(bytes), flips(bytes)));
}
QUIRE_INLINE vh maddubs(vi u, vi a) { return reinterpret_cast<vh>(_mm256_maddubs_epi16(raw(u), raw(a))); }
QUIRE_INLINE vi add_pairs(vh a) { return as_vi(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), _mm256_set1_epi16(1))); }
QUIRE_INLINE vi narrow(const vi (&a)[4]) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i low = _mm256_packs_epi32(raw(a[0]), raw(a[1])), high = _mm256_packs_epi32(raw(a[2]), raw(a[3]));
    return as_vi(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
QUIRE_INLINE void store_nibbles(uint8_t* p, vi bytes) {
    const __m256i both = _mm256_or_si256(raw(bytes), _mm256_srli_epi64(raw(bytes), 28));
    const __m256i words = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
}
QUIRE_INLINE vi look_up(const uint8_t (&table)[16], vi at) {
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return as_vi(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), raw(at)));
}
QUIRE_INLINE vi max_bytes(vi a, vi b) { return as_vi(_mm256_max_epi8(raw(a), raw(b))); }
QUIRE_INLINE vi min_bytes(vi a, vi b) { return as_vi(_mm256_min_epi8(raw(a), raw(b))); }

#else
using vi = vm;
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(16)));
QUIRE_INLINE vi max_i(vi a, vi b) { return a > b ? a : b; }
QUIRE_INLINE vi min_i(vi a, vi b) { return a < b ? a : b; }
template <int N> QUIRE_INLINE vi shift_right16(vi a) {   // the lower half of each lane gets the upper one's bits: mask them
    return reinterpret_cast<vi>(reinterpret_cast<vu>(a) >> N);
}
QUIRE_INLINE vi bits_i(vf a) { return as_int(a); }
QUIRE_INLINE vi to_int(vf a) { return __builtin_convertvector(round_even(a), vi); }
QUIRE_INLINE vf to_float_v(vi a) { return __builtin_convertvector(a, vf); }
QUIRE_INLINE void store_bytes(int8_t* p, vi a) { for (int i = 0; i < kWidth; ++i) p[i] = static_cast<int8_t>(a[i]); }
QUIRE_INLINE void store_flips(int8_t* p, vi a) {
    for (int i = 0; i < kWidth; ++i) {
        p[i] = static_cast<int8_t>(a[i] < 0 ? -a[i] : a[i]);
        p[i + kWidth] = static_cast<int8_t>(a[i] < 0 ? 0x7f : 0x80);
    }
}
QUIRE_INLINE void store_nibbles(uint8_t* p, vi bytes) {
    uint64_t eight[2];
    std::memcpy(eight, &bytes, sizeof eight);
    for (int i = 0; i < 2; ++i) {
        const uint32_t four = static_cast<uint32_t>(eight[i] | eight[i] >> 28);
        std::memcpy(p + 4 * i, &four, 4);
    }
}
QUIRE_INLINE vi look_up(const uint8_t (&table)[16], vi at) {
    uint8_t bytes[16];
    std::memcpy(bytes, &at, sizeof bytes);
    for (uint8_t& each : bytes) each = table[each];
    std::memcpy(&at, bytes, sizeof bytes);
    return at;
}
typedef int8_t vb __attribute__((vector_size(16)));
QUIRE_INLINE vi max_bytes(vi a, vi b) {
    const vb x = reinterpret_cast<vb>(a), y = reinterpret_cast<vb>(b);
    return reinterpret_cast<vi>(x > y ? x : y);
}
QUIRE_INLINE vi min_bytes(vi a, vi b) {
    const vb x = reinterpret_cast<vb>(a), y = reinterpret_cast<vb>(b);
    return reinterpret_cast<vi>(x < y ? x : y);
}
QUIRE_INLINE vi narrow(const vi (&a)[4]) {
    int8_t bytes[4 * kWidth];
    for (int i = 0; i < 4; ++i) store_bytes(bytes + i * kWidth, max_i(min_i(a[i], set1i(127)), set1i(-128)));
    vi all;
    std::memcpy(&all, bytes, sizeof all);
    return all;
}
// The products and sums here fit 16 bits, which is what SSE2 and NEON multiply.
typedef int16_t signed_vh __attribute__((vector_size(16)));
QUIRE_INLINE signed_vh even_bytes(vi a) { return reinterpret_cast<signed_vh>(a) << 8 >> 8; }
QUIRE_INLINE signed_vh odd_bytes(vi a) { return reinterpret_cast<signed_vh>(a) >> 8; }
QUIRE_INLINE vh maddubs(vi u, vi a) {   // of unsigned bytes below 128
    return reinterpret_cast<vh>(even_bytes(u) * even_bytes(a) + odd_bytes(u) * odd_bytes(a));
}
QUIRE_INLINE vi add_pairs(vh p) { return (reinterpret_cast<vi>(p) << 16 >> 16) + (reinterpret_cast<vi>(p) >> 16); }
#endif

// sum += a here and now: the compiler would add up products first, and have no registers for the sums.
QUIRE_INLINE void accumulate(vh& sum, vh a) {
    sum += a;
#if defined(QUIRE_ISA_avx512) && defined(__AVX512F__)   // not where it is emulated
    asm("" : "+v"(sum));
#elif defined(QUIRE_ISA_avx2)
    asm("" : "+x"(sum));
#endif
}
QUIRE_INLINE vh as_half(vi a) { return reinterpret_cast<vh>(a); }
QUIRE_INLINE vi load_i(const void* p) { vi a; std::memcpy(&a, p, sizeof a); return a; }
QUIRE_INLINE vi set1_i(int32_t x) { return x - vi{}; }
QUIRE_INLINE vi add_i(vi a, vi b) { return a + b; }
QUIRE_INLINE vi and_i(vi a, vi b) { return a & b; }
QUIRE_INLINE vi xor_i(vi a, vi b) { return a ^ b; }
// Of pairs of bfloat16, first and second.
QUIRE_INLINE void load_pairs(const void* p, vf& first, vf& second) {
    const vi both = load_i(p);
    first = reinterpret_cast<vf>(both << 16), second = reinterpret_cast<vf>(and_i(both, set1_i(-65536)));
}
// The sums of lanes 4 apart.
QUIRE_INLINE void reduce_fours(vi a, int32_t (&sum)[4]) {
#if defined(QUIRE_ISA_avx512)
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(raw(a)), _mm512_extracti64x4_epi64(raw(a), 1));
#elif defined(QUIRE_ISA_avx2)
    const __m256i half = raw(a);
#endif
#if defined(QUIRE_ISA_portable)
    std::memcpy(sum, &a, sizeof sum);
#else
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    std::memcpy(sum, &four, sizeof sum);
#endif
}
#if defined(QUIRE_ISA_avx2)
QUIRE_INLINE int32_t reduce_max_i(vi a) {
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(raw(a)), _mm256_extracti128_si256(raw(a), 1));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
#elif defined(QUIRE_ISA_portable)
QUIRE_INLINE int32_t reduce_max_i(vi a) {
    int32_t most = a[0];
    for (int i = 1; i < kWidth; ++i) most = a[i] > most ? a[i] : most;
    return most;
}
#endif

// Four vectors at once.
QUIRE_INLINE void store_bytes(int8_t* p, const vi (&a)[4]) {
    const vi bytes = narrow(a);
    std::memcpy(p, &bytes, sizeof bytes);
}
QUIRE_INLINE void store_flips(int8_t* p, const vi (&a)[4]) {
#if defined(QUIRE_ISA_avx2)
    const __m256i bytes = _mm256_permutevar8x32_epi32(raw(narrow(a)), _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
    const __m256i magnitude = _mm256_abs_epi8(bytes), negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes);
    const __m256i flip = _mm256_xor_si256(negative, _mm256_set1_epi8(-128));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_unpacklo_epi32(magnitude, flip));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, _mm256_unpackhi_epi32(magnitude, flip));
#else
    for (int i = 0; i < 4; ++i) store_flips(p + 2 * i * kWidth, a[i]);
#endif
}

// The greatest magnitude among p[0..n), as the bits of a float: 0x7f800000 is infinity, more is NaN.
QUIRE_INLINE int32_t greatest_magnitude(const float* p, int64_t n) {
    const vi magnitude = set1_i(0x7fffffff);
    vi most = set1_i(0);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) most = max_i(most, and_i(bits_i(load(p + i)), magnitude));
    if (i < n) most = max_i(most, and_i(bits_i(load_n(p + i, static_cast<int>(n - i))), magnitude));
    return reduce_max_i(most);
}
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr float kTiny = 0x1p-100f;   // what is smaller counts as zero, so that its inverse is finite

}  // namespace quire::QUIRE_NS
