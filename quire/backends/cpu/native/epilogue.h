// How a linear ends: the sums of a tile become outputs. Each is the sum, + bias, activated, * its gated partner, + out, every step
// rounded to float32: the operations of a linear, an activation and a product in passes of their own, in their order, so the bytes are
// theirs too.
//
// A panel of a gated linear has gates in its first half and in its second the columns that they gate: a task has both.
#pragma once
#include "activation.h"

namespace quire::QUIRE_NS {

constexpr int kVecs = 4;                 // vectors in a panel row
constexpr int kPanel = kVecs * kWidth;

struct Output {
    float* out;              // the corner of a block of rows
    int64_t stride;
    const float* bias;       // of the panel's columns, or of its gates; or null
    const float* up_bias;    // of the columns that are gated
    int columns;             // of out that the panel has
    bool gated, accumulate;
    Activation activation;
};

// bias: of all columns, or null.
QUIRE_INLINE Output output_of(const LinearArgs& a, const float* bias, int64_t panel, int64_t row) {
    const int64_t outputs = panel_outputs(a.w), first = panel * outputs, left = a.w.n - first;
    if (bias) bias += first;
    return {a.out + row * a.out_stride + first, a.out_stride, bias, bias && a.w.gated ? bias + a.w.n : nullptr,
            static_cast<int>(left < outputs ? left : outputs), a.w.gated, a.accumulate, a.activation};
}

template <Activation kind> void finish_rows(const Output& o, const float* sums, int64_t row, int rows) {
    for (int m = 0; m < rows; ++m, ++row, sums += kPanel) {
        float* out = o.out + row * o.stride;
        for (int j = 0; j < o.columns; j += kWidth) {
            const int n = o.columns - j;
            const auto some = [n](const float* p) { return n >= kWidth ? load(p) : load_n(p, n); };
            vf y = load(sums + j);
            if (o.bias) y = add(y, some(o.bias + j));
            if (o.gated) {
                vf up = load(sums + kPanel / 2 + j);
                if (o.up_bias) up = add(up, some(o.up_bias + j));
                y = gate<kind>(y, up);
            } else {
                y = activate<kind>(y);
            }
            if (o.accumulate) y = add(some(out + j), y);
            if (n >= kWidth) store(out + j, y);
            else store_n(out + j, y, n);
        }
    }
}

// Rows of sums, kPanel apart, to the rows of out from `row` on.
static void finish_rows(const Output& o, const float* sums, int64_t row, int rows) {
    switch (o.activation) {
        case Activation::none: return finish_rows<Activation::none>(o, sums, row, rows);
        case Activation::silu: return finish_rows<Activation::silu>(o, sums, row, rows);
        case Activation::gelu: return finish_rows<Activation::gelu>(o, sums, row, rows);
        case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh>(o, sums, row, rows);
        case Activation::relu: return finish_rows<Activation::relu>(o, sums, row, rows);
        case Activation::swiglu_oai: return finish_rows<Activation::swiglu_oai>(o, sums, row, rows);
    }
}

}  // namespace quire::QUIRE_NS
