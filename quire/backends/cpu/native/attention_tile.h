// The arithmetic of attention over one tile of keys: scores, softmax, weighted values, and the merge of two partial
// results. Included by attention.cpp alone, which says why it is done so and not otherwise.
#pragma once
#include "simd.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kVecs = 4;
constexpr int kRows = kWidth == 16 ? 6 : 3;            // rows in a register tile
constexpr int kWideRows = 2;                           // so few leave registers for longer stretches of V
constexpr int kTile = static_cast<int>(kKeyTile);
constexpr int kTileVecs = kTile / kWidth;

// Where a tile lies in the cache, for the first KV head of a task. Its keys as pieces of up to a vector, each from one
// block (of dimension 0); its values as tokens. Where a partial tile has no key, some key that it has is repeated.
constexpr int kPieces = kTile / 4;
template <class T> struct Place {
    const T* k[kPieces];
    const T* v[kTile];
};

// The scales of one KV head's int8 keys and values at one tile.
struct Scales {
    float k[kTile], v[kTile];
};

// The keys of a coming tile, to be prefetched in the order in which they lie in memory: `runs` runs, the first key of
// each at k[0] + offset, k[step] + offset and so on. For each dimension of q goes a stretch of kVecs vectors, `pitch`
// elements after the one before.
template <class C> struct Coming {
    const C* const* k;
    int runs, step;
    int64_t pitch, offset;
};

// scores[r][0..kVecs * kWidth) for MT rows of q; every lane is a chain over the dimensions. Dimension d of the vector v,
// which is in Parts pieces, is at at[v * Parts] + offset + d * stride.
template <int MT, int Parts, class C, class T>
void scores(const float* q, int64_t dim, const T* const* at, int64_t offset, int64_t stride, const Coming<C>& next, float* out) {
    vf acc[MT][kVecs];
    for (int m = 0; m < MT; ++m)
        for (int j = 0; j < kVecs; ++j) acc[m][j] = zero();
    const T* k[kVecs * Parts];
    for (int j = 0; j < kVecs * Parts; ++j) k[j] = at[j] + offset;
    const auto add_dimension = [&](int64_t d) __attribute__((always_inline)) {
        vf kv[kVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) kv[j] = load_parts<Parts>(k + j * Parts, d * stride);
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vf qv = set1(q[m * dim + d]);
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) acc[m][j] = fma(qv, kv[j], acc[m][j]);
        }
    };
    int64_t d = 0;
    const int64_t share = next.runs ? dim / next.runs : 0;
    for (int run = 0; run < next.runs; ++run) {
        const char* line = reinterpret_cast<const char*>(next.k[run * next.step] + next.offset);
        for (const int64_t end = d + share; d < end; ++d) {
#pragma GCC unroll 4
            for (size_t i = 0; i < kVecs * kWidth * sizeof(C); i += 64) prefetch_l2(line + i);
            line += next.pitch * static_cast<int64_t>(sizeof(C));
            add_dimension(d);
        }
    }
    for (; d < dim; ++d) add_dimension(d);
    for (int m = 0; m < MT; ++m)
        for (int j = 0; j < kVecs; ++j) store(out + m * kTile + j * kWidth, acc[m][j]);
}

template <int Parts, class C, class T>
void scores_rows(int mt, const float* q, int64_t dim, const T* const* at, int64_t offset, int64_t stride, const Coming<C>& next,
                 float* out) {
    switch (mt) {
        case 1: return scores<1, Parts>(q, dim, at, offset, stride, next, out);
        case 2: return scores<2, Parts>(q, dim, at, offset, stride, next, out);
        case 3: return scores<3, Parts>(q, dim, at, offset, stride, next, out);
#if defined(QUIRE_ISA_avx512)
        case 4: return scores<4, Parts>(q, dim, at, offset, stride, next, out);
        case 5: return scores<5, Parts>(q, dim, at, offset, stride, next, out);
        case 6: return scores<6, Parts>(q, dim, at, offset, stride, next, out);
#endif
    }
}

// The tokens [from, to) of V, each at key[t] + offset; the accumulators of a row have `padded` columns, those of the next
// lie `stride` further. next: the tokens of a coming tile, to be prefetched at next[t] + next_offset, or null.
template <class C, class T> struct Stretch {
    const T* const* key;
    int64_t offset;
    const C* const* next;
    int64_t next_offset;
    int from, to;
    int64_t stride, padded;
};

// acc[r] += p[r][t] * V[t] for t in [from, to), ascending, over NV vectors of columns.
template <int MT, int NV, class C, class T> void values(const float* p, const Stretch<C, T>& v, int64_t column, float* acc) {
    vf sum[MT][NV];
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[m][j] = load(acc + m * v.stride + j * kWidth);
    const T* const* const key = v.key;
    const C* const* const next = v.next;
    const int64_t at = v.offset + column, next_at = v.next_offset + column;
    for (int t = v.from, to = v.to; t < to; ++t) {
        vf vv[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) vv[j] = load(key[t] + at + j * kWidth);
        if (next) {
            const char* line = reinterpret_cast<const char*>(next[t] + next_at);
#pragma GCC unroll 8
            for (size_t i = 0; i < NV * kWidth * sizeof(C); i += 64) prefetch_l2(line + i);
        }
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vf pv = set1(p[m * kTile + t]);
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) sum[m][j] = fma(pv, vv[j], sum[m][j]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) store(acc + m * v.stride + j * kWidth, sum[m][j]);
}

template <int MT, class C, class T> void values_columns(const float* p, const Stretch<C, T>& v, float* acc) {
    int64_t c = 0;
    if constexpr (kWidth == 16 && MT <= kWideRows)
        for (; c + 2 * kVecs * kWidth <= v.padded; c += 2 * kVecs * kWidth) values<MT, 2 * kVecs>(p, v, c, acc + c);
    for (; c + kVecs * kWidth <= v.padded; c += kVecs * kWidth) values<MT, kVecs>(p, v, c, acc + c);
    switch ((v.padded - c) / kWidth) {
        case 1: return values<MT, 1>(p, v, c, acc + c);
        case 2: return values<MT, 2>(p, v, c, acc + c);
        case 3: return values<MT, 3>(p, v, c, acc + c);
    }
}

template <class C, class T> void values_rows(int mt, const float* p, const Stretch<C, T>& v, float* acc) {
    switch (mt) {
        case 1: return values_columns<1>(p, v, acc);
        case 2: return values_columns<2>(p, v, acc);
        case 3: return values_columns<3>(p, v, acc);
#if defined(QUIRE_ISA_avx512)
        case 4: return values_columns<4>(p, v, acc);
        case 5: return values_columns<5>(p, v, acc);
        case 6: return values_columns<6>(p, v, acc);
#endif
    }
}

// 2^x for x <= 0, to about 1 ulp: the fraction by a polynomial (minimax on [-1/2, 1/2]), the rest into the exponent.
QUIRE_INLINE vf power_of_2(vf x) {
    x = max(set1(-150.0f), x);   // NaN stays NaN
    const vf n = round_even(x), r = sub(x, n);
    vf p = fma(set1(1.5353361960e-4f), r, set1(1.3398875017e-3f));
    p = fma(p, r, set1(9.6184369177e-3f));
    p = fma(p, r, set1(5.5503323674e-2f));
    p = fma(p, r, set1(2.4022647738e-1f));
    p = fma(p, r, set1(6.9314718246e-1f));
    p = fma(p, r, set1(1.0f));
    return scale2(p, n);
}
QUIRE_INLINE float power_of_2(float x) {
    float lane[kWidth];
    store(lane, power_of_2(set1(x)));
    return lane[0];
}

// Online softmax over one tile, in three passes over the rows, so that the rows' chains overlap. Scores are in units of
// log 2. Keys [from, to) of a row are valid: other lanes are chosen away, never multiplied.
template <bool Whole> struct Valid {
    int from, to;
    vf operator()(int j, vf x, vf otherwise) const {
        return Whole ? x : select(lanes_between(from - j * kWidth, to - j * kWidth), x, otherwise);
    }
};

// The scores of one row, scaled, and the greatest of them. Scaled: they are of int8 keys, whose scales come in here.
template <bool Whole, bool Scaled> float scale_scores(float* s, const Valid<Whole>& valid, float scale, const Scales& scales) {
    vf top = set1(-__builtin_inff());
    for (int j = 0; j < kTileVecs; ++j) {
        vf x = load(s + j * kWidth);
        if constexpr (Scaled) x = mul(x, load(scales.k + j * kWidth));
        x = valid(j, mul(x, set1(scale)), set1(-__builtin_inff()));
        store(s + j * kWidth, x);
        top = max(x, top);
    }
    return reduce_max(top);
}

// A greater maximum: what was accumulated is rescaled.
inline void rescale(float greatest, float* state, int64_t padded) {
    const float before = state[0];
    state[0] = greatest;
    if (state[1] == 0) return;
    const float c = power_of_2(before - greatest);
    state[1] *= c;
    for (int64_t i = 16; i < 16 + padded; i += kWidth) store(state + i, mul(load(state + i), set1(c)));
}

// Scores become probabilities relative to the maximum; returns their sum. Scaled: each will meet an int8 value.
template <bool Whole, bool Scaled> float soften(float* s, const Valid<Whole>& valid, float most, const Scales& scales) {
    vf total = zero();
    for (int j = 0; j < kTileVecs; ++j) {
        const vf p = valid(j, power_of_2(sub(load(s + j * kWidth), set1(most))), zero());
        if constexpr (Scaled) store(s + j * kWidth, valid(j, mul(p, load(scales.v + j * kWidth)), zero()));
        else store(s + j * kWidth, p);
        total = add(total, p);
    }
    return reduce_add(total);
}

// Adds the partial result of a later split to an earlier one; a sum of 0 means that the row saw no key there.
void merge(float* into, const float* from, int64_t padded) {
    if (from[1] == 0) return;
    if (into[1] == 0) {
        std::memcpy(into, from, static_cast<size_t>(16 + padded) * sizeof(float));
        return;
    }
    const float most = from[0] > into[0] ? from[0] : into[0];
    const float a = power_of_2(into[0] - most), b = power_of_2(from[0] - most);
    into[0] = most;
    into[1] = fma1(from[1], b, into[1] * a);
    for (int64_t i = 16; i < 16 + padded; i += kWidth)
        store(into + i, fma(load(from + i), set1(b), mul(load(into + i), set1(a))));
}

}  // namespace
}  // namespace quire::QUIRE_NS
