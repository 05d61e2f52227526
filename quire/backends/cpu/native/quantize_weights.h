// How weights become whole numbers of 8 and 4 bits: a scale for a run of positions, and the numbers that it makes of them. What is
// computed here decides the packed bytes, so it is the same arithmetic in the same order for every width of vectors.
#pragma once
#include "simd_int.h"

namespace quire::QUIRE_NS {

constexpr int kMaxGroups = 32;   // that are fitted together

// Weights become round(w * inverse * factor), which stand for multiples of scale. Where inverse is 0 all become 0.
struct Fits {
    float inverse[kMaxGroups], factor[kMaxGroups];
    bf16 scale[kMaxGroups];
};

// Weights that are all tiny count as zeros; where some are not finite, the scale is not a number.
QUIRE_INLINE bool has_no_fit(int32_t magnitude, bf16& scale) {
    if (magnitude < kInfinityBits && from_bits(static_cast<uint32_t>(magnitude)) >= kTiny) return false;
    scale.bits = magnitude < kInfinityBits ? 0 : 0x7fc0;
    return true;
}

// 8 bits: the greatest magnitude becomes 127.
QUIRE_INLINE void fit8(int32_t magnitude, Fits& fits, int g) {
    fits.inverse[g] = 0, fits.factor[g] = 1;
    if (has_no_fit(magnitude, fits.scale[g])) return;
    from_float(from_bits(static_cast<uint32_t>(magnitude)) / 127.0f, fits.scale[g]);
    fits.inverse[g] = 1.0f / to_float(fits.scale[g]);
}

// Sixteen lanes in a fixed order, halves first, so that every width of vectors gives the same scale.
QUIRE_INLINE float sum16(vf (&part)[16 / kWidth]) {
#pragma GCC unroll 2
    for (int half = 8 / kWidth; half; half /= 2)
#pragma GCC unroll 2
        for (int i = 0; i < half; ++i) part[i] = add(part[i], part[i + half]);
    return reduce_add(part[0]);
}

// 4 bits: the weight of the greatest magnitude goes to -8, the end of the range that reaches further, or somewhat inside
// or beyond it, whichever leaves the least squared error; the scale is the one that fits the whole numbers best.
constexpr int kTries = 3;
constexpr float kFactors[kTries] = {1.0f, 7.25f / 8.0f, 9.0f / 8.0f};

// A try's whole numbers for v = w * (-8 / top), |v| <= 8: clamped to -8..7 where they could be outside.
template <int Try> QUIRE_INLINE vf whole4(vf v) {
    const vf q = round_even(Try == 0 ? v : mul(v, set1(kFactors[Try])));
    if constexpr (Try == 1) return q;
    const vf below = min(set1(7.0f), q);
    return Try == 0 ? below : max(set1(-8.0f), below);
}

// Of a try's whole numbers q: cross = sum of q * v, square = sum of q * q.
template <int Try> QUIRE_INLINE void try_group(const float* w, int64_t n, float inverse, float& cross, float& square) {
    vf qv[16 / kWidth], qq[16 / kWidth];
#pragma GCC unroll 4
    for (int l = 0; l < 16 / kWidth; ++l) qv[l] = qq[l] = zero();
    for (int64_t i = 0; i < n; i += 16)
#pragma GCC unroll 4
        for (int l = 0; l < 16 / kWidth; ++l) {
            const vf v = mul(load(w + i + l * kWidth), set1(inverse)), q = whole4<Try>(v);
            qv[l] = add(qv[l], mul(q, v));
            qq[l] = fma(q, q, qq[l]);   // exact
        }
    cross = sum16(qv), square = sum16(qq);
}

// All groups of w[0..n), in passes over them, none of which has a branch that depends on the weights' values.
QUIRE_INLINE void fit4(const float* w, int64_t n, int64_t group, Fits& fits) {
    const int groups = static_cast<int>(n / group);
    int32_t magnitude[kMaxGroups];
    float top[kMaxGroups] = {}, scale[kMaxGroups], cross[kTries][kMaxGroups] = {}, square[kTries][kMaxGroups] = {};
    for (int g = 0; g < groups; ++g) {
        const float* at = w + g * group;
        vf most = load(at);
        for (int64_t i = kWidth; i < group; i += kWidth) most = max(most, load(at + i));
        magnitude[g] = greatest_magnitude(at, group);
        const float size = from_bits(static_cast<uint32_t>(magnitude[g]));
        top[g] = reduce_max(most) == size ? size : -size;
    }
    for (int g = 0; g < groups; g += kWidth) store(fits.inverse + g, div(set1(-8.0f), load(top + g)));
    for (int g = 0; g < groups; ++g) {
        try_group<0>(w + g * group, group, fits.inverse[g], cross[0][g], square[0][g]);
        try_group<1>(w + g * group, group, fits.inverse[g], cross[1][g], square[1][g]);
        try_group<2>(w + g * group, group, fits.inverse[g], cross[2][g], square[2][g]);
    }
    for (int g = 0; g < groups; g += kWidth) {
        vf best = set1(-1.0f), fitted = zero(), factor = zero();
#pragma GCC unroll 3
        for (int t = 0; t < kTries; ++t) {
            const vf c = load(cross[t] + g), s = load(square[t] + g), explained = div(mul(c, c), s);
            const vm better = greater(explained, best);
            best = select(better, explained, best);
            fitted = select(better, div(c, s), fitted);
            factor = select(better, set1(kFactors[t]), factor);
        }
        store(fits.factor + g, factor);
        store(scale + g, mul(fitted, div(load(top + g), set1(-8.0f))));
    }
    for (int g = 0; g < groups; ++g) {
        from_float(scale[g], fits.scale[g]);
        if (has_no_fit(magnitude[g], fits.scale[g])) fits.inverse[g] = 0;
    }
}

// Four vectors of weights as bytes, stored as their unsigned numbers.
template <int Bits> QUIRE_INLINE vi quantize_four(const float* w, const float (&inverse)[4], const float (&factor)[4]) {
    vi whole[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const vf v = mul(load(w + i * kWidth), set1(inverse[i]));
        whole[i] = inverse[i] == 0 ? set1_i(0) : to_int(Bits == 8 ? v : mul(v, set1(factor[i])));
    }
    const vi bytes = narrow(whole);
    const auto all = [](int x) { return set1_i(static_cast<int32_t>(0x01010101u * static_cast<uint8_t>(x))); };
    if constexpr (Bits == 8) return xor_i(max_bytes(bytes, all(-127)), all(128));
    return xor_i(and_i(max_bytes(min_bytes(bytes, all(7)), all(-8)), all(15)), all(8));
}

// The run w[0..n), of whose positions 2^shift have a fit each, as it is stored of a column; up to 4 * kWidth - 1 positions more
// are written, as of zeros.
template <int Bits> QUIRE_INLINE void quantize_run(const float* w, int64_t n, int shift, const Fits& fits, uint8_t* q) {
    constexpr int64_t kStep = 4 * kWidth;
    for (int64_t i = 0; i < n; i += kStep, w += kStep) {
        float inverse[4], factor[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int64_t g = (i + j * kWidth) >> shift;
            inverse[j] = fits.inverse[g], factor[j] = fits.factor[g];
        }
        vi bytes;
        if (n - i >= kStep) {
            bytes = quantize_four<Bits>(w, inverse, factor);
        } else {
            float rest[kStep] = {};
            std::memcpy(rest, w, static_cast<size_t>(n - i) * sizeof(float));
            bytes = quantize_four<Bits>(rest, inverse, factor);
        }
        if constexpr (Bits == 8) std::memcpy(q + i, &bytes, sizeof bytes);
        else store_nibbles(q + i / 2, bytes);
    }
}

}  // namespace quire::QUIRE_NS
