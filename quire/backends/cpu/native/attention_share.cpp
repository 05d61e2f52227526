#include "attention_share.h"

#include <algorithm>
#include <utility>

#include "threads.h"

namespace quire {
namespace {

constexpr int32_t kQueries = 8;              // of a sequence that takes part, at most
constexpr int64_t kWorth = int64_t{1} << 19; // bytes not read that pay for a second region and the states handed over

int64_t bytes_of(KvType type) { return type == KvType::f32 ? 4 : type == KvType::i8 ? 1 : 2; }

}  // namespace

SharedPrefixes::SharedPrefixes(const AttentionArgs& a, int64_t task_rows, Sharing sharing)
    : block_(a.cache.block_size), group_(a.heads / a.cache.kv_heads) {
    if (sharing == Sharing::never) return;
    find_rows(a, task_rows);
    if (common_.empty() || *std::max_element(common_.begin(), common_.end()) == 0) return;
    std::vector<size_t> ends;   // of groups: consecutive rows that begin alike
    for (size_t i = 0; i < rows_.size(); ++i)
        if (i + 1 == rows_.size() || common_[i] == 0) ends.push_back(i + 1);
    const auto with_several = std::count_if(ends.begin(), ends.end(), [&, begin = size_t{0}](size_t end) mutable {
        return end - std::exchange(begin, end) > 1;
    });
    // Every thread should get something, even if that means reading twice.
    const int64_t tasks = with_several * a.cache.kv_heads, wanted = (2 * num_threads() + tasks - 1) / tasks;
    size_t begin = 0;
    for (const size_t end : ends) {
        const auto size = static_cast<int64_t>(end - begin);
        int64_t rows = 0;
        for (size_t i = begin; i < end; ++i) rows += rows_[i].count * group_;
        const int64_t parts = std::max<int64_t>(std::min(std::max((rows + task_rows - 1) / task_rows, wanted), size / 2), 1);
        for (int64_t part = 0; part < parts; ++part)
            add_group(begin + static_cast<size_t>(part * size / parts), begin + static_cast<size_t>((part + 1) * size / parts));
        begin = end;
    }
    const int64_t tile_bytes = 2 * kKeyTile * a.cache.kv_heads * a.cache.head_dim * bytes_of(a.cache.type);
    if (sharing == Sharing::where_it_pays && saved_ * tile_bytes < kWorth) groups_.clear();
    if (!groups_.empty()) place_states(a);
}

void SharedPrefixes::find_rows(const AttentionArgs& a, int64_t task_rows) {
    const int64_t most = std::min<int64_t>(kQueries, std::max<int64_t>(1, task_rows / group_));   // of a work that is not cut: see hand_over
    for (int64_t s = 0; s < a.seq.seqs; ++s) {
        const int32_t count = a.seq.query_start[s + 1] - a.seq.query_start[s], start = a.seq.start[s];
        if (count < 1 || count > most || start < kKeyTile || (a.window > 0 && start + count > a.window)) continue;
        rows_.push_back({static_cast<int32_t>(s), count, static_cast<int32_t>(start / kKeyTile),
                         a.seq.block_tables + a.seq.rows[s] * a.seq.table_stride, 0, 0});
    }
    if (rows_.size() < 2) return;
    const auto blocks = [&](const Row& row) { return (row.tiles * kKeyTile + block_ - 1) / block_; };
    std::sort(rows_.begin(), rows_.end(), [&](const Row& x, const Row& y) {
        if (x.table[0] != y.table[0]) return x.table[0] < y.table[0];
        return std::lexicographical_compare(x.table, x.table + blocks(x), y.table, y.table + blocks(y));
    });
    for (size_t i = 0; i + 1 < rows_.size(); ++i)
        common_.push_back(static_cast<int32_t>(common_tiles(rows_[i], rows_[i + 1])));
}

int64_t SharedPrefixes::common_tiles(const Row& x, const Row& y) const {
    const int64_t tiles = std::min(x.tiles, y.tiles), blocks = (tiles * kKeyTile + block_ - 1) / block_;
    const int64_t same = std::mismatch(x.table, x.table + blocks, y.table).first - x.table;
    return std::min(tiles, same * block_ / kKeyTile);
}

void SharedPrefixes::add_group(size_t begin, size_t end) {
    const size_t runs = runs_.size();
    int32_t rows = 0;
    for (size_t i = begin; i < end; ++i) rows_[i].first = rows, rows += static_cast<int32_t>(rows_[i].count * group_);
    add_runs(begin, end, 0);
    if (runs_.size() == runs) return;
    // Pointers are set when all are there.
    groups_.push_back({nullptr, nullptr, static_cast<int64_t>(end - begin), static_cast<int64_t>(runs_.size() - runs), rows});
    for (size_t i = begin; i < end; ++i) {
        members_.push_back({rows_[i].seq, 0, rows_[i].count, nullptr, nullptr});
        key_begin_.push_back(rows_[i].done * static_cast<int32_t>(kKeyTile));
    }
}

// The rows [begin, end) have the tiles before `depth` behind them.
void SharedPrefixes::add_runs(size_t begin, size_t end, int32_t depth) {
    if (end - begin < 2) return;
    const int32_t common = *std::min_element(common_.begin() + static_cast<std::ptrdiff_t>(begin),
                                             common_.begin() + static_cast<std::ptrdiff_t>(end) - 1);
    if (common > depth) {
        const auto last = static_cast<int32_t>(rows_[end - 1].first + rows_[end - 1].count * group_);
        runs_.push_back({rows_[begin].seq, rows_[begin].first, last, depth, common});
        for (size_t i = begin; i < end; ++i) rows_[i].done = common;
        saved_ += static_cast<int64_t>(end - begin - 1) * (common - depth);
    }
    for (size_t i = begin; i < end; ++i)
        if (i + 1 == end || common_[i] == common) add_runs(begin, i + 1, common), begin = i + 1;
}

// Pointers into what is complete now: of the groups to members and runs, of the members to memory for their states.
void SharedPrefixes::place_states(const AttentionArgs& a) {
    const int64_t row = a.cache.kv_heads * group_ * partial_floats(a.cache.head_dim);
    int64_t total = 0;
    for (const SharedMember& m : members_) total += 2 * m.count * row;
    auto* next = static_cast<float*>(thread_scratch(kScratchShared, static_cast<size_t>(total) * sizeof(float)));
    member_of_.assign(static_cast<size_t>(a.seq.seqs), -1);
    for (size_t i = 0; i < members_.size(); ++i) {
        SharedMember& m = members_[i];
        m.query = a.seq.query_start[m.seq];
        m.merged = next, next += m.count * row;
        m.running = next, next += m.count * row;
        member_of_[static_cast<size_t>(m.seq)] = static_cast<int32_t>(i);
    }
    const SharedMember* members = members_.data();
    const SharedRun* runs = runs_.data();
    for (AttentionShared& g : groups_) {
        g.members = members, members += g.num_members;
        g.runs = runs, runs += g.num_runs;
    }
}

void SharedPrefixes::hand_over(AttentionWork& w) const {
    const int32_t at = member_of_.empty() ? -1 : member_of_[static_cast<size_t>(w.seq)];
    if (at < 0) return;
    w.key_begin = key_begin_[static_cast<size_t>(at)];
    w.merged = members_[static_cast<size_t>(at)].merged;
    w.running = members_[static_cast<size_t>(at)].running;
}

}  // namespace quire
