// The arithmetic of attention over one tile of keys: scores, softmax, weighted values, and the merge of two partial
// results. Included by attention.cpp alone, which says why it is done so and not otherwise.
#pragma once
#include "activation.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int kTile = static_cast<int>(kKeyTile);
constexpr int kTileVecs = kTile / kWidth;
constexpr int kRows = 6;   // rows in a register tile, at most
constexpr int kRegisters = kWidth == 16 ? 32 : 16;

// Vectors of keys, or of columns of V, beside `rows` rows: so many that the sums, one operand of each and another fit the
// registers (32, or 16), and that few rows still have sums enough to keep both multipliers busy.
constexpr int score_vecs(int rows) { return kWidth == 16 ? 4 : rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
constexpr int value_vecs(int rows) { return kWidth == 16 && rows <= 2 ? 8 : score_vecs(rows); }

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

// sum[m][j] += row(m) * column(j). The columns are held in registers, or the rows where those would not fit: what passes by
// may be loaded, or converted, once for each use.
template <int MT, int NV, class Row, class Column> QUIRE_INLINE void outer_product(Row row, Column column, vf (&sum)[MT][NV]) {
    if constexpr (MT < NV && MT * NV + NV + 1 > kRegisters) {
        vf held[MT];
#pragma GCC unroll 8
        for (int m = 0; m < MT; ++m) held[m] = row(m);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
            const vf passing = column(j);
#pragma GCC unroll 8
            for (int m = 0; m < MT; ++m) sum[m][j] = fma(held[m], passing, sum[m][j]);
        }
    } else {
        vf held[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) held[j] = column(j);
#pragma GCC unroll 8
        for (int m = 0; m < MT; ++m) {
            const vf passing = row(m);
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) sum[m][j] = fma(passing, held[j], sum[m][j]);
        }
    }
}

// What comes next is prefetched in four places at once, which take turns: gemm_prefetch.h says why.
constexpr int kPlaces = 4;

// A register tile's share of what all tiles of rows prefetch together: part `index` of `count` equal ones, be they [0, n) of anything.
struct Share {
    int64_t index, count;
    int64_t begin(int64_t n) const { return n * index / count; }
    int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

// The keys of a coming tile, to be prefetched: `runs` runs (a power of two), the first key of each at k[0] + offset, k[step] + offset
// and so on. For each dimension of q goes a stretch of NV vectors; in a run they are `pitch` elements apart.
template <class C> struct Coming {
    const C* const* k;
    int runs, step;
    int64_t pitch, offset;
    Share share;

    // Runs that a place has, one after the other.
    int runs_of_place() const { return runs > kPlaces ? runs / kPlaces : 1; }

    // Where the run `index` of each place begins, or, of fewer runs than places, its part of one, which is so many `stretches`.
    void places(int index, int64_t stretches, const char** line) const {
        for (int i = 0; i < kPlaces; ++i) {
            const int parts = runs < kPlaces ? kPlaces / runs : 1, run = runs < kPlaces ? i / parts : i * runs_of_place() + index;
            line[i] = reinterpret_cast<const char*>(k[run * step] + offset + i % parts * stretches * pitch);
        }
    }
};

// scores[r][0..NV * kWidth) for MT rows of q; every lane is a chain over the dimensions. Dimension d of the vector v,
// which is in Parts pieces, is at at[v * Parts] + offset + d * stride.
template <int MT, int NV, int Parts, class C, class T>
void scores(const float* q, int64_t dim, const T* const* at, int64_t offset, int64_t stride, const Coming<C>& next, float* out) {
    vf acc[MT][NV];
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[m][j] = zero();
    const T* k[NV * Parts];
    for (int j = 0; j < NV * Parts; ++j) k[j] = at[j] + offset;
    const auto dimension = [&](int64_t d) QUIRE_LAMBDA {
        outer_product<MT, NV>([&](int m) QUIRE_LAMBDA { return set1(q[m * dim + d]); },
                              [&](int j) QUIRE_LAMBDA { return load_parts<Parts>(k + j * Parts, d * stride); }, acc);
    };
    // One loop for dimensions that prefetch and others: with two the sums would change registers in between.
    const int64_t stretches = dim / (kPlaces * next.runs_of_place());
    const int64_t from = next.share.begin(stretches) * next.pitch, to = next.share.end(stretches) * next.pitch;
    int64_t d = 0;
    for (int run = 0; run < next.runs_of_place(); ++run) {
        const char* line[kPlaces];
        next.places(run, stretches, line);
        for (int64_t at = 0, end = stretches * next.pitch; at < end; at += next.pitch, d += kPlaces) {
#pragma GCC unroll 4
            for (int place = 0; place < kPlaces; ++place) {
                if (at >= from && at < to) {
#pragma GCC unroll 8
                    for (size_t i = 0; i < NV * kWidth * sizeof(C); i += 64)
                        prefetch_l2(line[place] + at * static_cast<int64_t>(sizeof(C)) + i);
                }
                dimension(d + place);
            }
        }
    }
    for (; d < dim; ++d) dimension(d);
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) store(out + m * kTile + j * kWidth, acc[m][j]);
}

// The tokens [from, to) of V, each at key[t] + offset; the accumulators of a row have `padded` columns, those of the next
// lie `stride` further. next: the tokens of a coming tile, of which those of `share` are prefetched at next[t] + next_offset.
template <class C, class T> struct Stretch {
    const T* const* key;
    int64_t offset;
    const C* const* next;
    int64_t next_offset;
    int from, to;
    int64_t stride, padded;
    Share share;
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
    const int64_t begin = v.share.begin(kTile), end = v.share.end(kTile);
    for (int t = v.from, to = v.to; t < to; ++t) {
        const T* const value = key[t] + at;
        outer_product<MT, NV>([&](int m) __attribute__((always_inline)) { return set1(p[m * kTile + t]); },
                              [&](int j) __attribute__((always_inline)) { return load(value + j * kWidth); }, sum);
        if (t >= begin && t < end) {
            const int token = kWidth == 16 ? t % kPlaces * (kTile / kPlaces) + t / kPlaces : t;   // on AVX2 instructions bind, not lines
            const char* line = reinterpret_cast<const char*>(next[token] + next_at);
#pragma GCC unroll 8
            for (size_t i = 0; i < NV * kWidth * sizeof(C); i += 64) prefetch_l2(line + i);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) store(acc + m * v.stride + j * kWidth, sum[m][j]);
}

// 2^x for x <= 0, to about 1.4 units in the last place: the fraction by a polynomial (minimax on [-1/2, 1/2]), the rest
// into the exponent.
QUIRE_INLINE vf power_of_2(vf x) {
    x = max(set1(kNoPower), x);   // NaN stays NaN
    const vf n = round_power(x), r = sub(x, whole_power(n));
    vf p = fma(set1(1.3264727247e-3f), r, set1(9.6715126882e-3f));
    p = fma(p, r, set1(5.5507337436e-2f));
    p = fma(p, r, set1(2.4022242085e-1f));
    p = fma(p, r, set1(6.9314697760e-1f));
    p = fma(p, r, set1(1.0f));
    return times_power(p, n);
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

// The greatest score of one row. Scaled: they are of int8 keys, whose scales come in here. cap: what they are limited by, or 0.
template <bool Whole, bool Scaled> float greatest_score(float* s, const Valid<Whole>& valid, const Scales& scales, float cap) {
    vf top = set1(-__builtin_inff());
    for (int j = 0; j < kTileVecs; ++j) {
        vf x = load(s + j * kWidth);
        if constexpr (Scaled) x = mul(x, load(scales.k + j * kWidth));
        if (cap > 0) x = softcap(x, cap);
        x = valid(j, x, set1(-__builtin_inff()));
        if (Scaled || !Whole || cap > 0) store(s + j * kWidth, x);
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
