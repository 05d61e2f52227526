// Writes new keys and values into their blocks: K dimension-major, V token-major.
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
            const float* k = a.k + token * a.k_stride + head * a.k_head_stride;
            const float* v = a.v + token * a.v_stride + head * a.v_head_stride;
            T* k_out = static_cast<T*>(a.cache.k) + (id * a.cache.kv_heads + head) * dim * block + position % block;
            T* v_out = static_cast<T*>(a.cache.v) + ((id * a.cache.kv_heads + head) * block + position % block) * dim;
            for (int64_t d = 0; d < dim; d += kWidth) {
                const int left = static_cast<int>(dim - d < kWidth ? dim - d : kWidth);
                T lane[kWidth];
                store(lane, load_n(k + d, left));
                for (int i = 0; i < left; ++i) k_out[(d + i) * block] = lane[i];
                store_n(v_out + d, load_n(v + d, left), left);
            }
        }
    }
}

}  // namespace

void write_kv(const WriteKvArgs& a) {
    const int64_t tasks = (a.tokens + kTokens - 1) / kTokens;
    switch (a.cache.dtype) {
        case DType::f32: return run_tasks(tasks, task<float>, &a);
        case DType::f16: return run_tasks(tasks, task<f16>, &a);
        case DType::bf16: return run_tasks(tasks, task<bf16>, &a);
    }
}

}  // namespace quire::QUIRE_NS
