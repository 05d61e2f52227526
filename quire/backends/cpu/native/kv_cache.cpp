// Writes new keys and values into their blocks: K dimension-major, V token-major. An int8 cache holds each head's vector of a
// token relative to its largest element, which goes into the scale beside it.
#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int64_t kTokens = 8;   // in a task

// The sequence that token i belongs to: the last one that starts at or before it and is not empty.
int64_t sequence_of(const Ragged& seq, int64_t token) {
    int64_t low = 0, high = seq.seqs;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (seq.query_start[middle] <= token ? low : high) = middle;
    }
    return low;
}

// A vector of K or V in the cache's type: [dim] numbers, `stride` elements apart.
template <class T> void put(const float* x, int64_t dim, T* out, int64_t stride, f16*) {
    for (int64_t d = 0; d < dim; d += kWidth) {
        const int left = static_cast<int>(dim - d < kWidth ? dim - d : kWidth);
        const vf part = load_n(x + d, left);
        if (stride == 1) {
            store_n(out + d, part, left);
            continue;
        }
        T lane[kWidth];
        store(lane, part);
        for (int i = 0; i < left; ++i) out[(d + i) * stride] = lane[i];
    }
}

// round(x / scale) with scale = max|x| / 127, rounded to float16 first so that reading it back is exact. A number that is
// not finite makes the scale NaN: what it is a part of must not look like a number.
void put(const float* x, int64_t dim, i8* out, int64_t stride, f16* scale) {
    const auto at = [&](int64_t d) { return load_n(x + d, static_cast<int>(dim - d < kWidth ? dim - d : kWidth)); };
    vf top = zero(), bad = zero();
    for (int64_t d = 0; d < dim; d += kWidth) {
        top = max(abs(at(d)), top);
        bad = add(bad, mul(at(d), zero()));
    }
    from_float((reduce_max(top) + reduce_add(bad)) / 127.0f, *scale);
    const float rounded = to_float(*scale), inverse = rounded > 0 ? 1.0f / rounded : 0.0f;
    for (int64_t d = 0; d < dim; d += kWidth) {
        float lane[kWidth];
        store(lane, min(max(round_even(mul(at(d), set1(inverse))), set1(-127.0f)), set1(127.0f)));
        for (int64_t i = 0; i < kWidth && d + i < dim; ++i) out[(d + i) * stride].value = static_cast<int8_t>(lane[i]);
    }
}

template <class T> void task(const void* context, int64_t task, int64_t) {
    const WriteKvArgs& a = *static_cast<const WriteKvArgs*>(context);
    const int64_t end = (task + 1) * kTokens < a.tokens ? (task + 1) * kTokens : a.tokens;
    const int64_t dim = a.cache.head_dim, block = a.cache.block_size;
    int64_t s = sequence_of(a.seq, task * kTokens);
    for (int64_t token = task * kTokens; token < end; ++token) {
        while (token >= a.seq.query_start[s + 1]) ++s;
        const int64_t position = a.seq.start[s] + token - a.seq.query_start[s];
        const int64_t id = a.seq.block_tables[a.seq.rows[s] * a.seq.table_stride + position / block];
        for (int64_t head = 0; head < a.cache.kv_heads; ++head) {
            const int64_t of_head = id * a.cache.kv_heads + head, row = of_head * block + position % block;
            put(a.k + token * a.k_stride + head * a.k_head_stride, dim,
                static_cast<T*>(a.cache.k) + of_head * dim * block + position % block, block, a.cache.k_scales + row);
            put(a.v + token * a.v_stride + head * a.v_head_stride, dim, static_cast<T*>(a.cache.v) + row * dim, 1,
                a.cache.v_scales + row);
        }
    }
}

}  // namespace

void write_kv(const WriteKvArgs& a) {
    const int64_t tasks = (a.tokens + kTokens - 1) / kTokens;
    switch (a.cache.type) {
        case KvType::f32: return run_tasks(tasks, task<float>, &a);
        case KvType::f16: return run_tasks(tasks, task<f16>, &a);
        case KvType::bf16: return run_tasks(tasks, task<bf16>, &a);
        case KvType::i8: return run_tasks(tasks, task<i8>, &a);
    }
}

}  // namespace quire::QUIRE_NS
