// Writes new keys and values into their blocks: K dimension-major, V token-major. An int8 cache holds each head's vector of a
// token relative to its largest element, which goes into the scale beside it.
#include <cstring>
#include <initializer_list>

#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int64_t kRun = 16;   // keys that are written side by side

// Tokens in a task: some for every thread, and whole blocks where there are many.
int64_t tokens_per_task(int64_t tokens) { return tokens >= 256 ? 2 * kRun : 8; }

// The sequence that token i belongs to: the last one that starts at or before it and is not empty.
int64_t sequence_of(const Ragged& seq, int64_t token) {
    int64_t low = 0, high = seq.seqs;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (seq.query_start[middle] <= token ? low : high) = middle;
    }
    return low;
}

// What the numbers of a vector [dim] are multiplied by, and its scale where the cache's type has one: int8 is relative to the
// largest, max|x| / 127 rounded to float16 first so that reading it back is exact. A number that is not finite makes the
// scale NaN: what it is a part of must not look like a number.
template <class T> float factor(const float*, int64_t, f16*, T*) { return 1; }
float factor(const float* x, int64_t dim, f16* scale, i8*) {
    vf top = zero(), bad = zero();
    for (int64_t d = 0; d < dim; d += kWidth) {
        const vf part = load_n(x + d, static_cast<int>(dim - d < kWidth ? dim - d : kWidth));
        top = max(abs(part), top);
        bad = add(bad, mul(part, zero()));
    }
    from_float((reduce_max(top) + reduce_add(bad)) / 127.0f, *scale);
    const float rounded = to_float(*scale);
    return rounded > 0 ? 1.0f / rounded : 0.0f;
}

// `left` numbers in the cache's type; out has room for kWidth.
template <class T> void convert(const float* x, int left, float, T* out) { store(out, load_n(x, left)); }
void convert(const float* x, int left, float factor, i8* out) {
    float lane[kWidth];
    store(lane, min(max(round_even(mul(load_n(x, left), set1(factor))), set1(-127.0f)), set1(127.0f)));
    for (int i = 0; i < kWidth; ++i) out[i].value = static_cast<int8_t>(lane[i]);
}

// The keys of `count` tokens of one block, [dim] numbers each: dimension by dimension, so that a line of the cache is
// written once.
template <class T> void put_keys(const float* x, int64_t x_stride, int64_t count, int64_t dim, T* out, int64_t block, f16* scales) {
    float factors[kRun];
    for (int64_t t = 0; t < count; ++t) factors[t] = factor(x + t * x_stride, dim, scales + t, out);
    for (int64_t d = 0; d < dim; d += kWidth) {
        const int left = static_cast<int>(dim - d < kWidth ? dim - d : kWidth);
        T lanes[kRun][kWidth];
        for (int64_t t = 0; t < count; ++t) convert(x + t * x_stride + d, left, factors[t], lanes[t]);
        for (int i = 0; i < left; ++i)
            for (int64_t t = 0; t < count; ++t) out[(d + i) * block + t] = lanes[t][i];
    }
}

template <class T> void put_value(const float* x, int64_t dim, T* out, f16* scale) {
    const float f = factor(x, dim, scale, out);
    for (int64_t d = 0; d < dim; d += kWidth) {
        const int left = static_cast<int>(dim - d < kWidth ? dim - d : kWidth);
        T lanes[kWidth];
        convert(x + d, left, f, lanes);
        std::memcpy(out + d, lanes, static_cast<size_t>(left) * sizeof(T));
    }
}

template <class T> void task(const void* context, int64_t task, int64_t) {
    const WriteKvArgs& a = *static_cast<const WriteKvArgs*>(context);
    const int64_t step = tokens_per_task(a.tokens), end = (task + 1) * step < a.tokens ? (task + 1) * step : a.tokens;
    const int64_t dim = a.cache.head_dim, block = a.cache.block_size;
    int64_t s = sequence_of(a.seq, task * step);
    for (int64_t token = task * step, count; token < end; token += count) {
        while (token >= a.seq.query_start[s + 1]) ++s;
        const int64_t position = a.seq.start[s] + token - a.seq.query_start[s], at = position % block;
        const int64_t id = a.seq.block_tables[a.seq.rows[s] * a.seq.table_stride + position / block];
        count = a.seq.query_start[s + 1] - token;
        for (const int64_t most : {kRun, block - at, end - token}) count = most < count ? most : count;
        for (int64_t head = 0; head < a.cache.kv_heads; ++head) {
            const int64_t of_head = id * a.cache.kv_heads + head, row = of_head * block + at;
            put_keys(a.k + token * a.k_stride + head * a.k_head_stride, a.k_stride, count, dim,
                     static_cast<T*>(a.cache.k) + of_head * dim * block + at, block, a.cache.k_scales + row);
            for (int64_t t = 0; t < count; ++t)
                put_value(a.v + (token + t) * a.v_stride + head * a.v_head_stride, dim,
                          static_cast<T*>(a.cache.v) + (row + t) * dim, a.cache.v_scales + row + t);
        }
    }
}

}  // namespace

void write_kv(const WriteKvArgs& a) {
    const int64_t step = tokens_per_task(a.tokens), tasks = (a.tokens + step - 1) / step;
    switch (a.cache.type) {
        case KvType::f32: return run_tasks(tasks, task<float>, &a);
        case KvType::f16: return run_tasks(tasks, task<f16>, &a);
        case KvType::bf16: return run_tasks(tasks, task<bf16>, &a);
        case KvType::i8: return run_tasks(tasks, task<i8>, &a);
    }
}

}  // namespace quire::QUIRE_NS
