// Paged attention: prefill, a chunk of it and decode are one kernel, because a query at position p is always computed
// the same way: over tiles of kKeyTile keys at fixed absolute positions, the maximum and the sum rescaled once a tile,
// and partial results merged every kSplit positions, in ascending order, whether or not threads shared the splits.
// Within a tile a score is a chain over the dimensions, and an output a chain over the row's own valid keys: what the
// neighbouring rows see, how large blocks are, and what unused memory holds can't reach it, not even as the sign of a 0.
//
// The rows of a task are a few queries x all query heads of one KV head; they share the loads of K and V. With few
// rows the cache is read in place. With many, or where a block is narrower than a vector, a tile is first gathered
// into float32 scratch, which changes no arithmetic.
#include "attention_tile.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int64_t kGatherRows = 2 * kRows + 1;         // from here on gathering pays

// Where a tile lies in the cache: its K as vectors of keys (of dimension 0), its V as tokens. Where a partial tile has
// no key, some key that it has is repeated.
template <class T> struct Place {
    const T* k[kTileVecs];
    const T* v[kTile];
};

// One task: `rows` rows against the KV head, with everything it needs in this thread's scratch.
template <class T> struct Task {
    const AttentionArgs& a;
    const AttentionWork& w;
    const int64_t group = a.heads / a.cache.kv_heads, rows = w.count * group;
    const int64_t dim = a.cache.head_dim, padded = (dim + kWidth - 1) / kWidth * kWidth;
    const int64_t row_floats = partial_floats(dim), block = a.cache.block_size;
    const int64_t position = a.seq.start[w.seq] + w.query - a.seq.query_start[w.seq];   // of the first query
    const int32_t* table = a.seq.block_tables + a.seq.rows[w.seq] * a.seq.table_stride;
    const T* k_cache = static_cast<const T*>(a.cache.k) + w.kv_head * dim * block;
    const T* v_cache = static_cast<const T*>(a.cache.v) + w.kv_head * dim * block;
    const int64_t block_floats = a.cache.kv_heads * dim * block;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(block));
    float *q = nullptr, *s = nullptr, *state = nullptr, *merged = nullptr, *k_wide = nullptr, *v_wide = nullptr;
    int32_t *first = nullptr, *last = nullptr;   // the keys of a row are first[row] to last[row], both included

    void allocate(bool several) {
        const int64_t states = rows * row_floats;
        const int64_t floats[7] = {rows * dim,  rows * kTile,   states,  several ? states : 0,
                                   dim * kTile, kTile * padded, 2 * rows};
        int64_t total = 0;
        for (int64_t n : floats) total += (n + 15) / 16 * 16;
        float* p = static_cast<float*>(thread_scratch(kScratchAttention, static_cast<size_t>(total) * sizeof(float)));
        float* at[7];
        for (int i = 0; i < 7; ++i) at[i] = p, p += (floats[i] + 15) / 16 * 16;
        q = at[0], s = at[1], state = at[2], merged = at[3], k_wide = at[4], v_wide = at[5];
        first = reinterpret_cast<int32_t*>(at[6]), last = first + rows;
    }

    const T* key_at(int64_t key) const { return k_cache + table[key >> shift] * block_floats + (key & (block - 1)); }
    const T* value_at(int64_t key) const { return v_cache + table[key >> shift] * block_floats + (key & (block - 1)) * dim; }

    // The first and the last key that any row sees, and one more.
    int64_t low() const { return a.window > 0 && position >= a.window ? position - a.window + 1 : 0; }
    int64_t high() const { return position + w.count; }
    int64_t first_tile() const {
        const int64_t begin = w.split_begin * kSplit;
        return (low() > begin ? low() : begin) / kTile * kTile;
    }

    // Only blocks that hold a key of [low, high) are looked up: others may be gone.
    void place(int64_t base, Place<T>& at) const {
        const int from = static_cast<int>(low() > base ? low() - base : 0);
        const int to = static_cast<int>(high() < base + kTile ? high() - base : kTile);
        if (block >= kWidth)
            for (int j = 0; j < kTileVecs; ++j) {
                const int v = j < from / kWidth ? from / kWidth : j > (to - 1) / kWidth ? (to - 1) / kWidth : j;
                at.k[j] = key_at(base + v * kWidth);
            }
        const int run = static_cast<int>(block < kTile ? block : kTile), begin = from / run * run;
        int t = begin;
        for (; t < to; t += run) {
            const T* v = value_at(base + t);
            for (int i = 0; i < run; ++i) at.v[t + i] = v + i * dim;
        }
        for (int i = 0; i < begin; ++i) at.v[i] = at.v[begin];
        for (int i = t; i < kTile; ++i) at.v[i] = at.v[t - 1];
    }

    // follow: the work that this thread will probably do next, or null.
    void run(const AttentionWork* follow) {
        const bool several = !w.partial && w.split_end - w.split_begin > 1;
        allocate(several);
        for (int64_t i = 0, row = 0; i < w.count; ++i)
            for (int64_t g = 0; g < group; ++g, ++row) {
                const int64_t at = position + i;
                last[row] = static_cast<int32_t>(at);
                first[row] = static_cast<int32_t>(a.window > 0 && at >= a.window ? at - a.window + 1 : 0);
                std::memcpy(q + row * dim, a.q + (w.query + i) * a.q_stride + (w.kv_head * group + g) * a.q_head_stride,
                            static_cast<size_t>(dim) * sizeof(float));
            }
        const bool many = rows >= kGatherRows;
        Place<T> places[2];
        Place<T>*here = &places[0], *next = &places[1];
        if (!many) place(first_tile(), *here);
        float* result = several ? merged : state;
        clear(result);
        for (int64_t split = w.split_begin; split < w.split_end; ++split) {
            if (several) clear(state);
            const int64_t begin = split == w.split_begin ? first_tile() : split * kSplit;
            const int64_t end = high() < (split + 1) * kSplit ? high() : (split + 1) * kSplit;
            for (int64_t base = begin; base < end; base += kTile) {
                if (many) {
                    step_gathered(base);
                    continue;
                }
                if (base + kTile < end || (split + 1 < w.split_end && end < high())) {
                    place(base + kTile, *next);
                } else if (follow) {
                    const Task<T> other{a, *follow};
                    other.place(other.first_tile(), *next);
                } else {
                    *next = *here;
                }
                step_in_place(base, *here, *next);
                Place<T>* const done = here;
                here = next, next = done;
            }
            if (several)
                for (int64_t row = 0; row < rows; ++row) merge(merged + row * row_floats, state + row * row_floats, padded);
        }
        if (w.partial) {
            std::memcpy(w.partial, state, static_cast<size_t>(rows * row_floats) * sizeof(float));
        } else {
            for (int64_t row = 0; row < rows; ++row) write(row, result + row * row_floats);
        }
    }

    void clear(float* states) const {
        for (int64_t row = 0; row < rows; ++row) {
            float* p = states + row * row_floats;
            p[0] = -__builtin_inff();
            p[1] = 0;
            std::memset(p + 16, 0, static_cast<size_t>(row_floats - 16) * sizeof(float));
        }
    }

    void write(int64_t row, const float* p) const {
        float* out = a.out + (w.query + row / group) * a.out_stride + (w.kv_head * group + row % group) * dim;
        const float inverse = 1.0f / p[1];
        for (int64_t i = 0; i < dim; i += kWidth) {
            const int left = static_cast<int>(dim - i < kWidth ? dim - i : kWidth);
            store_n(out + i, mul(load_n(p + 16 + i, left), set1(inverse)), left);
        }
    }

    // One tile of keys, the first of them at position `base`. Rows are ordered by position, so those that see anything
    // of it, [r0, r1), are consecutive; together they see the keys [from, to) of it.
    struct Seen { int64_t r0, r1; int from, to; };
    Seen seen(int64_t base) const {
        Seen s{0, rows, static_cast<int>(low() > base ? low() - base : 0),
               static_cast<int>(high() < base + kTile ? high() - base : kTile)};
        while (s.r0 < s.r1 && last[s.r0] < base) ++s.r0;
        while (s.r1 > s.r0 && first[s.r1 - 1] >= base + kTile) --s.r1;
        return s;
    }

    void step_in_place(int64_t base, const Place<T>& here, const Place<T>& next) {
        const Seen n = seen(base);
        if (block >= kWidth) {
            score_rows<true>(here.k, next.k, block, n);
        } else {
            gather_keys(base, n);
            score_wide(n);
        }
        soften_rows(base, n);
        if (padded == dim) {
            value_rows<true>(here.v, next.v, base, n);
        } else {
            gather_values(base, n);
            value_wide(base, n);
        }
    }

    void step_gathered(int64_t base) {
        const Seen n = seen(base);
        gather_keys(base, n);
        score_wide(n);
        soften_rows(base, n);
        gather_values(base, n);
        value_wide(base, n);
    }

    void score_wide(const Seen& n) {
        const float* at[kTileVecs];
        for (int j = 0; j < kTileVecs; ++j) at[j] = k_wide + j * kWidth;
        score_rows<false>(at, at, kTile, n);
    }

    void value_wide(int64_t base, const Seen& n) {
        const float* at[kTile];
        for (int t = 0; t < kTile; ++t) at[t] = v_wide + t * padded;
        value_rows<false>(at, at, base, n);
    }

    void soften_rows(int64_t base, const Seen& n) {
        for (int64_t row = n.r0; row < n.r1; ++row) {
            float* p = state + row * row_floats;
            const int from = begin_of(row, base), to = end_of(row, base);
            if (from == 0 && to == kTile) soften<true>(s + row * kTile, from, to, a.scale, p[0], p[1], p + 16, padded);
            else soften<false>(s + row * kTile, from, to, a.scale, p[0], p[1], p + 16, padded);
        }
    }

    int begin_of(int64_t row, int64_t base) const {
        return static_cast<int>(first[row] > base ? first[row] - base : 0);
    }
    int end_of(int64_t row, int64_t base) const {
        const int64_t end = last[row] + 1;
        return static_cast<int>(end < base + kTile ? end - base : kTile);
    }

    template <bool Ahead, class U> void score_rows(const U* const* at, const U* const* next, int64_t stride, const Seen& n) {
        for (int64_t row = n.r0; row < n.r1;) {
            const int mt = static_cast<int>(n.r1 - row < kRows ? n.r1 - row : kRows);
            for (int j = n.from / kWidth / kVecs * kVecs; j * kWidth < n.to; j += kVecs)
                scores_rows<Ahead, U>(mt, q + row * dim, dim, at + j, next + j, stride, s + row * kTile + j * kWidth);
            next = at;   // the first rows have prefetched it
            row += mt;
        }
    }

    // The keys that all rows of a register tile see go together; what only some see, row by row, in ascending order.
    template <bool Ahead, class U> void value_rows(const U* const* key, const U* const* next, int64_t base, const Seen& n) {
        for (int64_t row = n.r0; row < n.r1;) {
            const int mt = static_cast<int>(n.r1 - row < kRows ? n.r1 - row : kRows);
            const float* p = s + row * kTile;
            float* acc = state + row * row_floats + 16;
            const int from = begin_of(row + mt - 1, base), to = end_of(row, base);
            const bool common = from < to;
            for (int m = 0; m < mt; ++m) {
                const int mine = begin_of(row + m, base), end = common ? from : end_of(row + m, base);
                if (mine < end)
                    values_rows<Ahead, U>(1, p + m * kTile, {key, next, mine, end, row_floats, padded}, acc + m * row_floats);
            }
            if (common) values_rows<Ahead, U>(mt, p, {key, next, from, to, row_floats, padded}, acc);
            for (int m = 0; common && m < mt; ++m) {
                const int end = end_of(row + m, base);
                if (to < end)
                    values_rows<Ahead, U>(1, p + m * kTile, {key, next, to, end, row_floats, padded}, acc + m * row_floats);
            }
            next = key;
            row += mt;
        }
    }

    void gather_keys(int64_t base, const Seen& n) {
        const int64_t run = block < kTile ? block : kTile;     // keys of a tile that lie together
        for (int64_t t = n.from / run * run; t < n.to; t += run) {
            const T* k = key_at(base + t);
            for (int64_t d = 0; d < dim; ++d) {
                float* wide = k_wide + d * kTile + t;
                if (run >= kWidth) {
                    for (int64_t i = 0; i < run; i += kWidth) store(wide + i, load(k + d * block + i));
                } else {
                    store_n(wide, load_n(k + d * block, static_cast<int>(run)), static_cast<int>(run));
                }
            }
        }
    }

    void gather_values(int64_t base, const Seen& n) {
        for (int64_t t = n.from; t < n.to; ++t) {
            const T* v = value_at(base + t);
            for (int64_t i = 0; i < dim; i += kWidth)
                store(v_wide + t * padded + i, load_n(v + i, static_cast<int>(dim - i < kWidth ? dim - i : kWidth)));
        }
    }
};

template <class T> void task(const void* context, int64_t index, int64_t next) {
    const AttentionArgs& a = *static_cast<const AttentionArgs*>(context);
    Task<T> t{a, a.works[index]};
    t.run(next >= 0 ? &a.works[next] : nullptr);
}

}  // namespace

void attention(const AttentionArgs& a) {
    switch (a.cache.dtype) {
        case DType::f32: return run_tasks(a.num_works, task<float>, &a);
        case DType::f16: return run_tasks(a.num_works, task<f16>, &a);
        case DType::bf16: return run_tasks(a.num_works, task<bf16>, &a);
    }
}

// Puts together the splits of the same rows, given in ascending order, and writes the output.
void attention_merge(const AttentionArgs& a, const AttentionWork* splits, int64_t n) {
    const Task<float> t{a, splits[0]};
    for (int64_t row = 0; row < t.rows; ++row) {
        float* into = splits[0].partial + row * t.row_floats;
        for (int64_t i = 1; i < n; ++i) merge(into, splits[i].partial + row * t.row_floats, t.padded);
        t.write(row, into);
    }
}

}  // namespace quire::QUIRE_NS
