// How quantized weights lie in memory, and what of it is part of the arithmetic.
//
// Panels of `panel` columns lie one after the other, the last one padded with columns of zeros. A weight is stored as an
// unsigned number q = w + zero, with w = -127..127 and zero = 128 in 8 bits, w = -8..7 and zero = 8 in 4 bits, and stands
// for w * scale, or with offsets (4 bits only) for w * scale + offset. In MXFP4 it is a float of 4 bits, which the inner loop makes
// q = w + 12 of, where w is twice the float, -12..12. A panel with groups is a row of groups, ascending in k:
//
//     scales   bfloat16 [panel]
//              with offsets pairs of them, [panel][2]: an offset, then the scale
//     weights  uint8 [group / 4][panel][4], positions k..k+3 of a column adjacent; or, in 4 bits,
//              uint8 [group / 8][panel][4], where byte i holds position k + i (low half) and k + 4 + i (high half)
//
// Without groups (one scale for a column, 8 bits only) a panel is one such record over all of k, padded with w = 0 to a
// multiple of 4. So one sequential stream feeds the inner loop. The bytes depend on the panel's width and on nothing else
// of the instruction set.
#pragma once
#include "kernels.h"

namespace quire {

// Positions whose products are summed as integers before they count as a float; with groups it is the group. A sum of
// this many products of 127 * 127 is still exact as a float32. Changing it changes bytes.
constexpr int64_t kSegment = 1024;
// Positions of a row of activations that share a scale, where weights have groups: whole ones. Without groups it is a segment. What is
// large in one place costs nothing in another. A scale for each group of 32 would be a little more exact, and take 12 % longer with many
// rows, where this takes 5 %. Changing it changes bytes.
constexpr int64_t kRange = 128;

// Static, so that no compilation's copy can stand in for another's.
__attribute__((always_inline)) static inline int32_t zero_of(const Panels& w) {
    return w.bits == 8 ? 128 : w.coding == Coding::mxfp4 ? 12 : 8;
}

struct QuantLayout {
    int64_t segment, segments;   // positions in a segment, and how many there are
    int64_t scale_bytes;         // of one row of scales
    int64_t stride;              // bytes from a segment to the next
    int64_t scale_stride;        // bytes from a segment's scales to those of the next
    int64_t panel_bytes;
    int64_t range;               // positions of activations that share a scale
};

__attribute__((always_inline)) static inline QuantLayout quant_layout(const Panels& w) {
    QuantLayout l{};
    l.segment = w.group ? w.group : kSegment;
    l.range = w.group ? kRange : kSegment;
    l.segments = (w.k + l.segment - 1) / l.segment;
    l.scale_bytes = w.panel * (w.coding == Coding::offsets ? 4 : 2);
    const int64_t weights = l.segment * w.panel * w.bits / 8;
    l.stride = w.group ? l.scale_bytes + weights : weights;
    l.scale_stride = w.group ? l.stride : 0;
    l.panel_bytes = w.group ? l.segments * l.stride : l.scale_bytes + (w.k + 3) / 4 * 4 * w.panel;
    return l;
}

}  // namespace quire
