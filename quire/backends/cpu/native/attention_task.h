// The work of one thread on attention: some rows of queries against some KV heads, tile after tile. Included by
// attention.cpp alone, which says how it is cut.
#pragma once
#include <type_traits>

#include "attention_tile.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

// From so many rows on, keys and values of fewer bits are widened once for all of them. On AVX2 that never pays: what a tile of 6 rows
// converts in place costs less, and half or a quarter of the bytes pass through L1.
constexpr int64_t kGatherRows = kWidth == 8 ? INT64_MAX : 2 * kRows + 1;
constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kWideKeys = kTile + 16;        // floats between dimensions of gathered keys: an odd number of cache lines,
                                                 // so that a strip of them spreads over all sets of L1

// `rows` rows against each of `heads` KV heads, with everything that this needs in the thread's scratch.
template <class T> struct Task {
    static constexpr bool kScaled = std::is_same_v<T, i8>;
    const AttentionArgs& a;
    const AttentionWork& w;
    const int64_t group = a.heads / a.cache.kv_heads, heads = w.kv_heads;
    int64_t rows = w.count * group;
    const int64_t dim = a.cache.head_dim, padded = (dim + kWidth - 1) / kWidth * kWidth;
    const int64_t wide_values = padded + 16 * (1 + padded / 16 % 2);   // floats between gathered values, likewise
    const int64_t row_floats = partial_floats(dim), block = a.cache.block_size;
    const int64_t position = a.seq.start[w.seq] + w.query - a.seq.query_start[w.seq];   // of the first query
    // The first and the last key that any row sees here, and one more.
    int64_t low = a.window > 0 && position >= a.window ? position - a.window + 1 : w.key_begin, high = position + w.count;
    const int32_t* table = a.seq.block_tables + a.seq.rows[w.seq] * a.seq.table_stride;
    const int64_t head_size = dim * block, block_size = a.cache.kv_heads * head_size;   // elements of the cache
    const T* k_cache = static_cast<const T*>(a.cache.k) + w.kv_head * head_size;
    const T* v_cache = static_cast<const T*>(a.cache.v) + w.kv_head * head_size;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(block));
    float *q = nullptr, *s = nullptr, *state = nullptr, *merged = nullptr, *k_wide = nullptr, *v_wide = nullptr, *greatest = nullptr;
    Scales* scales = nullptr;
    int32_t *first = nullptr, *last = nullptr;   // the keys of a row are first[row] to last[row], both included

    void allocate(bool several) {
        const int64_t states = heads * rows * row_floats;
        const int64_t floats[9] = {heads * rows * dim, rows * kTile, states,    several ? states : 0, dim * kWideKeys,
                                   kTile * wide_values, 2 * rows, 2 * kTile, rows};
        int64_t total = 0;
        for (int64_t n : floats) total += (n + 15) / 16 * 16;
        float* p = static_cast<float*>(thread_scratch(kScratchAttention, static_cast<size_t>(total) * sizeof(float)));
        float* at[9];
        for (int i = 0; i < 9; ++i) at[i] = p, p += (floats[i] + 15) / 16 * 16;
        q = at[0], s = at[1], state = at[2], merged = at[3], k_wide = at[4], v_wide = at[5];
        first = reinterpret_cast<int32_t*>(at[6]), last = first + rows;
        scales = reinterpret_cast<Scales*>(at[7]), greatest = at[8];
    }

    // One tile of keys, the first of them at position `base`. Rows are ordered by position, so those that see anything
    // of it, [r0, r1), are consecutive; together they see the keys [from, to) of it.
    struct Seen { int64_t base, r0, r1; int from, to; };

    const T* key_at(int64_t key) const { return k_cache + table[key >> shift] * block_size + (key & (block - 1)); }
    const T* value_at(int64_t key) const { return v_cache + table[key >> shift] * block_size + (key & (block - 1)) * dim; }

    int64_t first_tile() const {
        const int64_t begin = w.split_begin * kSplit;
        return (low > begin ? low : begin) / kTile * kTile;
    }
    size_t state_bytes() const { return static_cast<size_t>(heads * rows * row_floats) * sizeof(float); }

    // Only blocks that hold a key of [low, high) are looked up: others may be gone.
    void place(int64_t base, Place<T>& at) const {
        const int from = static_cast<int>(low > base ? low - base : 0);
        const int to = static_cast<int>(high < base + kTile ? high - base : kTile);
        const int piece = static_cast<int>(block < kWidth ? block : kWidth);
        for (int j = 0; j < kTile / piece; ++j) {
            const int v = j < from / piece ? from / piece : j > (to - 1) / piece ? (to - 1) / piece : j;
            at.k[j] = key_at(base + v * piece);
        }
        const int run = static_cast<int>(block < kTile ? block : kTile), begin = from / run * run;
        int t = begin;
        for (; t < to; t += run) {
            const T* v = value_at(base + t);
            for (int i = 0; i < run; ++i) at.v[t + i] = v + i * dim;
        }
        for (int i = 0; i < begin; ++i) at.v[i] = at.v[begin];
        for (int i = t; i < kTile; ++i) at.v[i] = at.v[t - 1];
        if constexpr (kScaled)   // the hardware can't know where these are either
            for (t = begin; t < to; t += run)
                for (int64_t i = 0, from = scale_at(base + t, 0); i < heads * block; i += 32) {
                    prefetch_l2(a.cache.k_scales + from + i);
                    prefetch_l2(a.cache.v_scales + from + i);
                }
    }

    // Where the scale of a key is, for the first KV head of this task or a later one.
    int64_t scale_at(int64_t key, int64_t head) const {
        return (table[key >> shift] * a.cache.kv_heads + w.kv_head + head) * block + (key & (block - 1));
    }

    void gather_scales(const Seen& n, int64_t head) {
        const int run = static_cast<int>(block < kTile ? block : kTile);
        for (int t = n.from / run * run; t < n.to; t += run) {
            const int64_t at = scale_at(n.base + t, head);
            for (int i = 0; i < run; i += kWidth) {
                const int left = run - i < kWidth ? run - i : kWidth;
                store_n(scales->k + t + i, load_n(a.cache.k_scales + at + i, left), left);
                store_n(scales->v + t + i, load_n(a.cache.v_scales + at + i, left), left);
            }
        }
    }

    // Scaled here, so that scores are in units of log 2.
    void take_query(const float* from, float* to) const {
        const float scale = a.scale * kLog2E;
        int64_t d = 0;
        for (; d + kWidth <= dim; d += kWidth) store(to + d, mul(load(from + d), set1(scale)));
        for (; d < dim; ++d) to[d] = from[d] * scale;
    }

    // follow: the work that this thread will probably do next, or null.
    void run(const AttentionWork* follow) {
        const bool several = !w.partial && (w.merged || w.split_end - w.split_begin > 1);
        allocate(several);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = position + row / group;
            last[row] = static_cast<int32_t>(at);
            first[row] = static_cast<int32_t>(a.window > 0 && at >= a.window ? at - a.window + 1 : 0);
            const float* from = a.q + (w.query + row / group) * a.q_stride + (w.kv_head * group + row % group) * a.q_head_stride;
            for (int64_t head = 0; head < heads; ++head)
                take_query(from + head * group * a.q_head_stride, q + (head * rows + row) * dim);
        }
        const bool many = rows >= kGatherRows;
        Place<T> places[2];
        Place<T>*here = &places[0], *next = &places[1];
        place(first_tile(), *here);
        float* result = several ? merged : state;
        clear(result, 0, heads * rows);
        if (several && w.merged) std::memcpy(merged, w.merged, state_bytes());
        for (int64_t split = w.split_begin; split < w.split_end; ++split) {
            if (several) clear(state, 0, heads * rows);
            if (split == w.split_begin && w.running) std::memcpy(state, w.running, state_bytes());
            const int64_t begin = split == w.split_begin ? first_tile() : split * kSplit;
            const int64_t end = high < (split + 1) * kSplit ? high : (split + 1) * kSplit;
            for (int64_t base = begin; base < end; base += kTile) {
                if (base + kTile < end || (split + 1 < w.split_end && end < high)) {
                    place(base + kTile, *next);
                } else if (follow) {
                    const Task<T> other{a, *follow};
                    other.place(other.first_tile(), *next);
                } else {
                    *next = *here;
                }
                const Seen n = seen(base);
                for (int64_t head = 0; head < heads; ++head) {
                    if constexpr (kScaled) gather_scales(n, head);
                    const bool stay = head + 1 < heads;   // the next turn is at this tile
                    step(n, {*here, head * head_size, stay ? *here : *next, stay ? (head + 1) * head_size : 0,
                             q + head * rows * dim, state + head * rows * row_floats}, many);
                }
                Place<T>* const done = here;
                here = next, next = done;
            }
            if (several)
                for (int64_t row = 0; row < heads * rows; ++row) merge(merged + row * row_floats, state + row * row_floats, padded);
        }
        if (w.partial) {
            std::memcpy(w.partial, state, state_bytes());
        } else {
            for (int64_t row = 0; row < heads * rows; ++row) write(row, result + row * row_floats);
        }
    }

    // Many sequences over the keys that they have in common: what they go on with, each by itself, is handed over.
    void run_shared(const AttentionShared& group_of) {
        rows = group_of.rows;
        allocate(true);
        int64_t row = 0;
        for (int64_t i = 0; i < group_of.num_members; ++i) {
            const SharedMember& m = group_of.members[i];
            for (int64_t n = 0; n < m.count * group; ++n, ++row) {
                first[row] = 0, last[row] = INT32_MAX - 1;
                const int64_t head = w.kv_head * group + n % group;
                take_query(a.q + (m.query + n / group) * a.q_stride + head * a.q_head_stride, q + row * dim);
            }
        }
        clear(state, 0, rows);
        clear(merged, 0, rows);
        for (int64_t i = 0; i < group_of.num_runs; ++i) run_tiles(group_of.runs[i]);
        for (int64_t i = 0, at = 0; i < group_of.num_members; ++i) {
            const SharedMember& m = group_of.members[i];
            const int64_t floats = m.count * group * row_floats;
            std::memcpy(m.merged + w.kv_head * floats, merged + at, static_cast<size_t>(floats) * sizeof(float));
            std::memcpy(m.running + w.kv_head * floats, state + at, static_cast<size_t>(floats) * sizeof(float));
            at += floats;
        }
    }

    void run_tiles(const SharedRun& run) {
        table = a.seq.block_tables + a.seq.rows[run.seq] * a.seq.table_stride;
        low = 0, high = run.tile_end * kTile;
        Place<T> places[2];
        place(run.tile_begin * kTile, places[run.tile_begin % 2]);
        for (int64_t tile = run.tile_begin; tile < run.tile_end; ++tile) {
            const Place<T>& here = places[tile % 2];
            Place<T>& next = places[(tile + 1) % 2];
            if (tile + 1 < run.tile_end) place((tile + 1) * kTile, next);
            else next = here;
            const Seen n{tile * kTile, run.row_begin, run.row_end, 0, kTile};
            if constexpr (kScaled) gather_scales(n, 0);
            step(n, {here, 0, next, 0, q, state}, run.row_end - run.row_begin >= kGatherRows);
            if ((tile + 1) * kTile % kSplit) continue;
            for (int64_t row = run.row_begin; row < run.row_end; ++row) merge(merged + row * row_floats, state + row * row_floats, padded);
            clear(state, run.row_begin, run.row_end);
        }
    }

    void clear(float* states, int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end; ++row) {
            float* p = states + row * row_floats;
            p[0] = -__builtin_inff();
            p[1] = 0;
            std::memset(p + 16, 0, static_cast<size_t>(row_floats - 16) * sizeof(float));
        }
    }

    // row: of all heads.
    void write(int64_t row, const float* p) const {
        const int64_t head = w.kv_head + row / rows, query = w.query + row % rows / group;
        float* out = a.out + query * a.out_stride + (head * group + row % group) * dim;
        float inverse = 1.0f / p[1];
        if (a.sinks) {
            const float sink = a.sinks[head * group + row % group] * kLog2E, most = sink > p[0] ? sink : p[0];
            const float kept = power_of_2(p[0] - most);
            inverse = kept / (p[1] * kept + power_of_2(sink - most));
        }
        for (int64_t i = 0; i < dim; i += kWidth) {
            const int left = static_cast<int>(dim - i < kWidth ? dim - i : kWidth);
            store_n(out + i, mul(load_n(p + 16 + i, left), set1(inverse)), left);
        }
    }

    Seen seen(int64_t base) const {
        Seen s{base, 0, rows, static_cast<int>(low > base ? low - base : 0),
               static_cast<int>(high < base + kTile ? high - base : kTile)};
        while (s.r0 < s.r1 && last[s.r0] < base) ++s.r0;
        while (s.r1 > s.r0 && first[s.r1 - 1] >= base + kTile) --s.r1;
        return s;
    }

    // One KV head at one tile: where both are, which comes next, and the head's queries and results.
    struct Turn {
        const Place<T>& here;
        int64_t offset;
        const Place<T>& next;
        int64_t next_offset;
        const float* q;
        float* state;
    };

    void step(const Seen& n, const Turn& t, bool many) {
        if (kWidth == 16 && block == kWidth / 4) return step_parts<kWidth == 16 ? 4 : 1>(n, t, many);
        if (kWidth >= 8 && block == kWidth / 2) return step_parts<kWidth >= 8 ? 2 : 1>(n, t, many);
        return step_parts<1>(n, t, many);
    }

    // Parts: the blocks that a vector of keys comes from.
    template <int Parts> void step_parts(const Seen& n, const Turn& t, bool many) {
        const bool plain = std::is_same_v<T, float> && Parts == 1;   // in float32 vectors already
        if (many && !plain) {
            gather_keys<Parts>(n, t);
            const float* at[kTileVecs];
            for (int j = 0; j < kTileVecs; ++j) at[j] = k_wide + j * kWidth;
            score_rows<1, float>(at, 0, kWideKeys, n, t);
        } else {
            score_rows<Parts, T>(t.here.k, t.offset, block, n, t);
        }
        soften_rows(n, t);
        if ((many && !plain) || padded != dim) {
            gather_values(n, t);
            const float* at[kTile];
            for (int i = 0; i < kTile; ++i) at[i] = v_wide + i * wide_values;
            value_rows<float>(at, 0, n, t);
        } else {
            value_rows<T>(t.here.v, t.offset, n, t);
        }
    }

    void soften_rows(const Seen& n, const Turn& t) {
        const float cap = a.softcap * kLog2E;
        for (int64_t row = n.r0; row < n.r1; ++row) {
            float* at = s + row * kTile;
            greatest[row] = whole(row, n.base) ? greatest_score<true, kScaled>(at, {0, kTile}, *scales, cap)
                                               : greatest_score<false, kScaled>(at, valid(row, n.base), *scales, cap);
        }
        for (int64_t row = n.r0; row < n.r1; ++row) {
            float* p = t.state + row * row_floats;
            if (greatest[row] > p[0]) rescale(greatest[row], p, padded);
        }
        for (int64_t row = n.r0; row < n.r1; ++row) {
            float *at = s + row * kTile, *p = t.state + row * row_floats;
            p[1] += whole(row, n.base) ? soften<true, kScaled>(at, {0, kTile}, p[0], *scales)
                                       : soften<false, kScaled>(at, valid(row, n.base), p[0], *scales);
        }
    }

    bool whole(int64_t row, int64_t base) const { return first[row] <= base && last[row] >= base + kTile - 1; }
    Valid<false> valid(int64_t row, int64_t base) const { return {begin_of(row, base), end_of(row, base)}; }
    int begin_of(int64_t row, int64_t base) const {
        return static_cast<int>(first[row] > base ? first[row] - base : 0);
    }
    int end_of(int64_t row, int64_t base) const {
        const int64_t end = last[row] + 1;
        return static_cast<int>(end < base + kTile ? end - base : kTile);
    }

    static int64_t tiles_of(const Seen& n) { return (n.r1 - n.r0 + kRows - 1) / kRows; }

    // f(integral_constant MT, begin, end): the rows [r0, r1) in register tiles of MT rows, whole ones and then the rest.
    template <class F> void in_register_tiles(const Seen& n, const F& f) {
        const int64_t rest = n.r1 - (n.r1 - n.r0) % kRows;
        if (n.r0 < rest) f(std::integral_constant<int, kRows>{}, n.r0, rest);
        switch (n.r1 - rest) {
            case 1: return f(std::integral_constant<int, 1>{}, rest, n.r1);
            case 2: return f(std::integral_constant<int, 2>{}, rest, n.r1);
            case 3: return f(std::integral_constant<int, 3>{}, rest, n.r1);
            case 4: return f(std::integral_constant<int, 4>{}, rest, n.r1);
            case 5: return f(std::integral_constant<int, 5>{}, rest, n.r1);
        }
    }

    template <int Parts, class U>
    void score_rows(const U* const* at, int64_t offset, int64_t stride, const Seen& n, const Turn& t) {
        in_register_tiles(n, [&](auto tile, int64_t begin, int64_t end) {
            constexpr int mt = tile, vecs = score_vecs(mt), keys = vecs * kWidth;
            const int64_t piece = block < kWidth ? block : kWidth, run = block < keys ? block : keys;
            Coming<T> next{nullptr, static_cast<int>(keys / run), static_cast<int>(run / piece), block < keys ? keys : block,
                           t.next_offset, {0, tiles_of(n)}};
            // A strip of keys stays in L1 while the rows pass by, which prefetch the one that follows it.
            for (int key = n.from / keys * keys; key < n.to; key += keys) {
                next.k = t.next.k + key / piece;
                for (int64_t row = begin; row < end; row += mt) {
                    if (end_of(row + mt - 1, n.base) <= key) continue;   // nobody sees it
                    next.share.index = (row - n.r0) / kRows;
                    scores<mt, vecs, Parts>(t.q + row * dim, dim, at + key / kWidth * Parts, offset, stride, next,
                                            s + row * kTile + key);
                }
            }
        });
    }

    template <class U> void value_rows(const U* const* key, int64_t offset, const Seen& n, const Turn& t) {
        Stretch<T, U> v{key, offset, t.next.v, t.next_offset, 0, 0, row_floats, padded, {0, tiles_of(n)}};
        in_register_tiles(n, [&](auto tile, int64_t begin, int64_t end) {
            value_columns<tile, value_vecs(tile)>(0, begin, end, n, t, v);
        });
    }

    // The columns of V from `column` on, in strips of NV vectors, and what is left in narrower ones: a strip stays in L1
    // while the rows pass by.
    template <int MT, int NV, class U>
    void value_columns(int64_t column, int64_t begin, int64_t end, const Seen& n, const Turn& t, Stretch<T, U>& v) {
        for (; column + NV * kWidth <= padded; column += NV * kWidth) {
            for (int64_t row = begin; row < end; row += MT) {
                v.share.index = (row - n.r0) / kRows;
                value_tile<MT, NV>(column, row, n, t, v);
            }
        }
        if constexpr (NV > 1)
            if (column < padded) value_columns<MT, NV / 2>(column, begin, end, n, t, v);
    }

    // The keys that all rows of a register tile see go together; what only some see, row by row, in ascending order.
    template <int MT, int NV, class U>
    void value_tile(int64_t column, int64_t row, const Seen& n, const Turn& t, Stretch<T, U>& v) {
        const float* p = s + row * kTile;
        float* acc = t.state + row * row_floats + 16 + column;
        const auto alone = [&](int m, int from, int to) {
            v.from = from, v.to = to;
            if (from < to) values<1, NV>(p + m * kTile, v, column, acc + m * row_floats);
        };
        const int from = begin_of(row + MT - 1, n.base), to = end_of(row, n.base);
        const bool common = from < to;
        for (int m = 0; m < MT; ++m) alone(m, begin_of(row + m, n.base), common ? from : end_of(row + m, n.base));
        if (!common) return;
        v.from = from, v.to = to;
        values<MT, NV>(p, v, column, acc);
        for (int m = 0; m < MT; ++m) alone(m, to, end_of(row + m, n.base));
    }

    template <int Parts> void gather_keys(const Seen& n, const Turn& t) {
        const int from = n.from / kWidth, to = (n.to - 1) / kWidth + 1;
        for (int64_t d = 0; d < dim; ++d)
#pragma GCC unroll 4
            for (int i = from; i < to; ++i)
                store(k_wide + d * kWideKeys + i * kWidth, load_parts<Parts>(t.here.k + i * Parts, t.offset + d * block));
    }

    void gather_values(const Seen& n, const Turn& t) {
        for (int i = n.from; i < n.to; ++i)
            for (int64_t c = 0; c < dim; c += kWidth)
                store(v_wide + i * wide_values + c,
                      load_n(t.here.v[i] + t.offset + c, static_cast<int>(dim - c < kWidth ? dim - c : kWidth)));
    }
};

}  // namespace
}  // namespace quire::QUIRE_NS
