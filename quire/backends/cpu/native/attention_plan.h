// Cuts a mixed batch into attention tasks. Only who computes what is decided here; the bytes do not depend on it.
#pragma once
#include "kernels.h"

namespace quire {
void paged_attention(const Kernels& kernels, AttentionArgs args);
}
