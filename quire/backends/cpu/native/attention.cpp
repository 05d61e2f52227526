// Paged attention: prefill, a chunk of it and decode are one kernel, because a query at position p is always computed
// the same way: over tiles of kKeyTile keys at fixed absolute positions, the maximum and the sum rescaled once a tile,
// and partial results merged every kSplit positions, in ascending order, whether or not threads shared the splits.
// Within a tile a score is a chain over the dimensions, and an output a chain over the row's own valid keys: what the
// neighbouring rows see, how large blocks are, and what unused memory holds can't reach it, not even as the sign of a 0.
//
// The rows of a task are a few queries x all query heads of one KV head; they share the loads of K and V. With few
// rows the cache is read in place; where a block is narrower than a vector, a vector of keys is loaded in pieces. With
// many rows a tile is first gathered into float32 scratch, which changes no arithmetic. A task may have several KV
// heads, which take turns at each tile: what a block holds for them lies together, and memory likes long stretches.
// The rows of a tile prefetch the next one, each register tile its share: the hardware can't know which block follows.
//
// Keys that lie in the same blocks for several sequences of a step are read once, for the rows of all of them: that is
// the beginning of each row's own arithmetic, whose state (of the split so far, and merged of those before) the row then
// takes over in a second region. Nothing is computed in another way or order.
#include "attention_task.h"

namespace quire::QUIRE_NS {
namespace {

template <class T> void task(const void* context, int64_t index, int64_t next) {
    const AttentionArgs& a = *static_cast<const AttentionArgs*>(context);
    Task<T> t{a, a.works[index]};
    t.run(next >= 0 ? &a.works[next] : nullptr);
}

template <class T> void shared_task(const void* context, int64_t index, int64_t) {
    const AttentionArgs& a = *static_cast<const AttentionArgs*>(context);
    const AttentionShared& shared = a.shared[index / a.cache.kv_heads];
    const auto kv_head = static_cast<int32_t>(index % a.cache.kv_heads);
    const AttentionWork w{shared.members[0].seq, kv_head, 1, 0, 0, 0, 0, 0, nullptr, nullptr, nullptr};
    Task<T> t{a, w};
    t.run_shared(shared);
}

}  // namespace

// What several sequences have in common, one task for each group and KV head.
void attention_shared(const AttentionArgs& a) {
    const int64_t n = a.num_shared * a.cache.kv_heads;
    switch (a.cache.type) {
        case KvType::f32: return run_tasks(n, shared_task<float>, &a);
        case KvType::f16: return run_tasks(n, shared_task<f16>, &a);
        case KvType::bf16: return run_tasks(n, shared_task<bf16>, &a);
        case KvType::i8: return run_tasks(n, shared_task<i8>, &a);
    }
}

void attention(const AttentionArgs& a) {
    switch (a.cache.type) {
        case KvType::f32: return run_tasks(a.num_works, task<float>, &a);
        case KvType::f16: return run_tasks(a.num_works, task<f16>, &a);
        case KvType::bf16: return run_tasks(a.num_works, task<bf16>, &a);
        case KvType::i8: return run_tasks(a.num_works, task<i8>, &a);
    }
}

// Puts together the splits of the same rows, given in ascending order, and writes the output.
void attention_merge(const AttentionArgs& a, const AttentionWork* splits, int64_t n) {
    const Task<float> t{a, splits[0]};
    for (int64_t row = 0; row < t.heads * t.rows; ++row) {
        float* into = (splits[0].merged ? splits[0].merged : splits[0].partial) + row * t.row_floats;
        for (int64_t i = splits[0].merged ? 0 : 1; i < n; ++i) merge(into, splits[i].partial + row * t.row_floats, t.padded);
        t.write(row, into);
    }
}

}  // namespace quire::QUIRE_NS
