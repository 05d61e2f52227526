// Cuts a mixed batch into attention tasks: a few queries of one sequence x some KV heads. A task that is so long that the
// other threads would wait for it is cut again, at the positions where its arithmetic merges partial results anyway.
#include "attention_plan.h"

#include <algorithm>
#include <vector>

#include "attention_share.h"
#include "threads.h"

namespace quire {
namespace {

constexpr int64_t kTaskRows = 96;           // query rows that share the loads of K and V; their state stays in L2
constexpr int64_t kStateFloats = 1 << 13;   // of all rows of a task with several KV heads
constexpr int64_t kTasks = 3;               // a thread should get at least so many

int64_t keys_seen(const AttentionArgs& a, const AttentionWork& w) {
    const int64_t position = a.seq.start[w.seq] + w.query - a.seq.query_start[w.seq];
    const int64_t first = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
    return position + w.count - std::max<int64_t>(first, w.key_begin);
}

}  // namespace

int64_t paged_attention(const Kernels& kernels, AttentionArgs a, Sharing sharing) {
    const SharedPrefixes prefixes(a, kTaskRows, sharing);
    a.shared = prefixes.groups(), a.num_shared = prefixes.num_groups();
    const int64_t group = a.heads / a.cache.kv_heads;
    const int64_t most = std::max<int64_t>(1, kTaskRows / group);
    struct Item { AttentionWork work; int64_t cost; };
    std::vector<Item> items;
    int64_t total = 0;
    for (int64_t s = 0; s < a.seq.seqs; ++s) {
        const int32_t begin = a.seq.query_start[s], end = a.seq.query_start[s + 1];
        const int64_t tiles = (end - begin + most - 1) / most;
        int32_t query = begin;
        for (int64_t i = 0; i < tiles; ++i) {
            const auto count = static_cast<int32_t>((end - query + (tiles - i) - 1) / (tiles - i));
            AttentionWork w{static_cast<int32_t>(s), 0, 1, query, count, 0, 0, 0, nullptr, nullptr, nullptr};
            prefixes.hand_over(w);
            const int64_t position = a.seq.start[s] + query - begin;
            const int64_t first = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
            w.split_begin = static_cast<int32_t>(std::max<int64_t>(first, w.key_begin) / kSplit);
            w.split_end = static_cast<int32_t>((position + count - 1) / kSplit + 1);
            const int64_t cost = keys_seen(a, w) * (count * group + 4);   // rows, and the loads that they share
            items.push_back({w, cost});
            total += cost;
            query += count;
        }
    }
    const int threads = num_threads();
    const int64_t too_long = threads > 1 ? total * a.cache.kv_heads / (kTasks * threads) : INT64_MAX;
    std::vector<Item> works;
    std::vector<AttentionWork> split_works;
    std::vector<int64_t> groups;   // number of splits of each group of split_works
    int64_t partial_size = 0;
    const int64_t row_floats = partial_floats(a.cache.head_dim);
    for (const Item& item : items) {
        AttentionWork w = item.work;
        // As many heads as leave enough tasks, and room for their rows; cut where that allows more of them.
        const int64_t kv_heads = a.cache.kv_heads, splits = w.split_end - w.split_begin;
        const int64_t room = kStateFloats / (w.count * group * row_floats);
        const auto fair = [&](int64_t cuts) {
            return std::clamp<int64_t>(std::min(room, too_long / (item.cost / cuts + 1)), 1, kv_heads);
        };
        const bool cut = splits > 1 && (item.cost > too_long || fair(splits) > fair(1));
        const int64_t heads = fair(cut ? splits : 1), parts = (kv_heads + heads - 1) / heads;
        for (int64_t part = 0; part < parts; ++part) {
            w.kv_head = static_cast<int32_t>(part * kv_heads / parts);
            w.kv_heads = static_cast<int32_t>((part + 1) * kv_heads / parts) - w.kv_head;
            const int64_t before = w.kv_head * w.count * group * row_floats;
            w.merged = item.work.merged ? item.work.merged + before : nullptr;
            w.running = item.work.running ? item.work.running + before : nullptr;
            if (!cut) {
                works.push_back({w, item.cost * w.kv_heads});
                continue;
            }
            groups.push_back(splits);
            for (int32_t split = w.split_begin; split < w.split_end; ++split) {
                split_works.push_back(w);
                split_works.back().split_begin = split, split_works.back().split_end = split + 1;
                if (split > w.split_begin) split_works.back().merged = split_works.back().running = nullptr;
                partial_size += w.kv_heads * w.count * group * row_floats;
            }
        }
    }
    std::vector<float> partials(static_cast<size_t>(partial_size));
    float* next = partials.data();
    for (AttentionWork& w : split_works) w.partial = next, next += w.kv_heads * w.count * group * row_floats;

    const size_t num_split = split_works.size();
    // The longest first, so that no thread starts one when the others are done; those that were cut are the longest.
    std::stable_sort(works.begin(), works.end(), [](const Item& x, const Item& y) { return x.cost > y.cost; });
    for (const Item& item : works) split_works.push_back(item.work);
    a.works = split_works.data();
    a.num_works = static_cast<int64_t>(split_works.size());
    if (a.num_shared) kernels.attention_shared(a);
    kernels.attention(a);
    for (size_t at = 0, g = 0; at < num_split; at += static_cast<size_t>(groups[g++]))
        kernels.attention_merge(a, split_works.data() + at, groups[g]);
    return prefixes.saved();
}

}  // namespace quire
