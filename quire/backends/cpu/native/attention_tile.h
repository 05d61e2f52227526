// The arithmetic of attention over one tile of keys: scores, softmax, weighted values, and the merge of two partial
// results. Included by attention.cpp alone, which says why it is done so and not otherwise.
#pragma once
#include "simd.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kVecs = 4;
constexpr int kRows = kWidth == 16 ? 6 : 3;            // rows in a register tile
constexpr int kTile = static_cast<int>(kKeyTile);
constexpr int kTileVecs = kTile / kWidth;

// scores[r][0..kVecs * kWidth) for MT rows of q; every lane is a chain over the dimensions. The vector v of dimension d
// is at at[v] + d * stride. With Ahead, the same place of the next tile is prefetched at each step.
template <int MT, bool Ahead, class T>
void scores(const float* q, int64_t dim, const T* const* at, const T* const* next, int64_t stride, float* out) {
    vf acc[MT][kVecs];
    for (int m = 0; m < MT; ++m)
        for (int j = 0; j < kVecs; ++j) acc[m][j] = zero();
    const T *k0 = at[0], *k1 = at[1], *k2 = at[2], *k3 = at[3];
    const T *n0 = next[0], *n1 = next[1], *n2 = next[2], *n3 = next[3];
    for (int64_t d = 0; d < dim; ++d) {
        const int64_t i = d * stride;
        const vf kv[kVecs] = {load(k0 + i), load(k1 + i), load(k2 + i), load(k3 + i)};
        if constexpr (Ahead) prefetch_l2(n0 + i), prefetch_l2(n1 + i), prefetch_l2(n2 + i), prefetch_l2(n3 + i);
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vf qv = set1(q[m * dim + d]);
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) acc[m][j] = fma(qv, kv[j], acc[m][j]);
        }
    }
    for (int m = 0; m < MT; ++m)
        for (int j = 0; j < kVecs; ++j) store(out + m * kTile + j * kWidth, acc[m][j]);
}

// acc[r] += p[r][t] * V[t] for t in [from, to), ascending, over NV vectors of columns.
template <int MT, int NV, bool Ahead, class T>
void values(const float* p, const T* const* key, const T* const* next, int64_t column, int from, int to, float* acc,
            int64_t acc_stride) {
    vf sum[MT][NV];
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[m][j] = load(acc + m * acc_stride + j * kWidth);
    for (int t = from; t < to; ++t) {
        vf vv[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) vv[j] = load(key[t] + column + j * kWidth);
        if constexpr (Ahead) {
            const char* line = reinterpret_cast<const char*>(next[t] + column);
#pragma GCC unroll 4
            for (size_t i = 0; i < NV * kWidth * sizeof(T); i += 64) prefetch_l2(line + i);
        }
#pragma GCC unroll 6
        for (int m = 0; m < MT; ++m) {
            const vf pv = set1(p[m * kTile + t]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) sum[m][j] = fma(pv, vv[j], sum[m][j]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) store(acc + m * acc_stride + j * kWidth, sum[m][j]);
}

template <bool Ahead, class T>
void scores_rows(int mt, const float* q, int64_t dim, const T* const* at, const T* const* next, int64_t stride, float* out) {
    switch (mt) {
        case 1: return scores<1, Ahead>(q, dim, at, next, stride, out);
        case 2: return scores<2, Ahead>(q, dim, at, next, stride, out);
        case 3: return scores<3, Ahead>(q, dim, at, next, stride, out);
#if defined(QUIRE_ISA_avx512)
        case 4: return scores<4, Ahead>(q, dim, at, next, stride, out);
        case 5: return scores<5, Ahead>(q, dim, at, next, stride, out);
        case 6: return scores<6, Ahead>(q, dim, at, next, stride, out);
#endif
    }
}

// The tokens [from, to) of V; the accumulators of a row have `padded` columns, those of the next lie `stride` further.
template <class T> struct Stretch {
    const T* const* key;
    const T* const* next;
    int from, to;
    int64_t stride, padded;
};

template <int MT, bool Ahead, class T> void values_columns(const float* p, const Stretch<T>& v, float* acc) {
    int64_t c = 0;
    for (; c + kVecs * kWidth <= v.padded; c += kVecs * kWidth)
        values<MT, kVecs, Ahead>(p, v.key, v.next, c, v.from, v.to, acc + c, v.stride);
    switch ((v.padded - c) / kWidth) {
        case 1: return values<MT, 1, Ahead>(p, v.key, v.next, c, v.from, v.to, acc + c, v.stride);
        case 2: return values<MT, 2, Ahead>(p, v.key, v.next, c, v.from, v.to, acc + c, v.stride);
        case 3: return values<MT, 3, Ahead>(p, v.key, v.next, c, v.from, v.to, acc + c, v.stride);
    }
}

template <bool Ahead, class T> void values_rows(int mt, const float* p, const Stretch<T>& v, float* acc) {
    switch (mt) {
        case 1: return values_columns<1, Ahead>(p, v, acc);
        case 2: return values_columns<2, Ahead>(p, v, acc);
        case 3: return values_columns<3, Ahead>(p, v, acc);
#if defined(QUIRE_ISA_avx512)
        case 4: return values_columns<4, Ahead>(p, v, acc);
        case 5: return values_columns<5, Ahead>(p, v, acc);
        case 6: return values_columns<6, Ahead>(p, v, acc);
#endif
    }
}

// Online softmax over one tile of one row: keys [from, to) are valid. Scores become probabilities relative to the new
// maximum; what was accumulated is rescaled if the maximum moved. Invalid lanes are chosen away, never multiplied.
template <bool Whole>
void soften(float* s, int from, int to, float scale, float& most, float& sum, float* acc, int64_t padded) {
    const auto valid = [=](int j, vf x, vf otherwise) {
        return Whole ? x : select(lanes_between(from - j * kWidth, to - j * kWidth), x, otherwise);
    };
    vf x[kTileVecs], top = set1(-__builtin_inff());
    for (int j = 0; j < kTileVecs; ++j) {
        x[j] = valid(j, mul(load(s + j * kWidth), set1(scale)), set1(-__builtin_inff()));
        top = max(x[j], top);
    }
    const float before = most, tile_most = reduce_max(top);
    if (tile_most > before) {
        most = tile_most;
        if (sum != 0) {
            const float c = exp1(before - most);
            sum *= c;
            for (int64_t i = 0; i < padded; i += kWidth) store(acc + i, mul(load(acc + i), set1(c)));
        }
    }
    vf total = zero();
    for (int j = 0; j < kTileVecs; ++j) {
        const vf p = valid(j, exp(sub(x[j], set1(most))), zero());
        store(s + j * kWidth, p);
        total = add(total, p);
    }
    sum += reduce_add(total);
}

// Adds the partial result of a later split to an earlier one; a sum of 0 means that the row saw no key there.
void merge(float* into, const float* from, int64_t padded) {
    if (from[1] == 0) return;
    if (into[1] == 0) {
        std::memcpy(into, from, static_cast<size_t>(16 + padded) * sizeof(float));
        return;
    }
    const float most = from[0] > into[0] ? from[0] : into[0];
    const float a = exp1(into[0] - most), b = exp1(from[0] - most);
    into[0] = most;
    into[1] = fma1(from[1], b, into[1] * a);
    for (int64_t i = 16; i < 16 + padded; i += kWidth)
        store(into + i, fma(load(from + i), set1(b), mul(load(into + i), set1(a))));
}

}  // namespace
}  // namespace quire::QUIRE_NS
