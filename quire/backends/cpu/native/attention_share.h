// Finds the keys that several sequences of a step have in common, so that they are read once.
#pragma once
#include <vector>

#include "attention_plan.h"

namespace quire {

// The sequences whose block tables begin with the same blocks form a tree: what all of a group have in common is a run of
// tiles for all of their rows; where tables part, each part goes on by itself. So samples of several prompts behind one
// system prompt share that among all, and each prompt among its own.
//
// A sequence takes part with whole tiles before its first query, if it has few queries (many share their reads anyway) and
// no window has passed its beginning. The rest of it stays an ordinary work, which begins with what came of the tiles.
class SharedPrefixes {
public:
    // task_rows: the most rows that share a read. What is found is valid until the next one is made on this thread.
    SharedPrefixes(const AttentionArgs& a, int64_t task_rows, Sharing sharing);

    const AttentionShared* groups() const { return groups_.data(); }
    int64_t num_groups() const { return static_cast<int64_t>(groups_.size()); }

    int64_t saved() const { return groups_.empty() ? 0 : saved_; }

    // Sets key_begin, merged and running of a work of all KV heads and all queries of its sequence.
    void hand_over(AttentionWork& w) const;

private:
    struct Row {
        int32_t seq, count, tiles;   // tiles: at most so many may be shared
        const int32_t* table;
        int32_t first, done;         // the first of its rows in the group; tiles that are shared
    };

    void find_rows(const AttentionArgs& a, int64_t task_rows);
    int64_t common_tiles(const Row& x, const Row& y) const;
    void add_group(size_t begin, size_t end);
    void add_runs(size_t begin, size_t end, int32_t depth);
    void place_states(const AttentionArgs& a);

    int64_t block_, group_;
    std::vector<Row> rows_;               // in lexicographic order of their tables
    std::vector<int32_t> common_;         // tiles that a row and the next one have in common
    std::vector<SharedMember> members_;   // of all groups
    std::vector<int32_t> key_begin_;      // of each member
    std::vector<SharedRun> runs_;
    std::vector<AttentionShared> groups_;
    std::vector<int32_t> member_of_;      // of each sequence, or -1; empty where nothing is shared
    int64_t saved_ = 0;                   // reads of a tile
};

}  // namespace quire
