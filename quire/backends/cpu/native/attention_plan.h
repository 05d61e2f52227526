// Cuts a mixed batch into attention tasks. Only who computes what is decided here; the bytes do not depend on it.
#pragma once
#include "kernels.h"

namespace quire {
enum class Sharing { never, where_it_pays, always };
// Returns how many reads of a tile, by all KV heads, sharing saved.
int64_t paged_attention(const Kernels& kernels, AttentionArgs args, Sharing sharing);
}
