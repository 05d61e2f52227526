// What happens to an element alone: between the two linears of a feed-forward, and to scores and logits that have a limit.
#pragma once
#include "simd.h"

namespace quire::QUIRE_NS {

QUIRE_INLINE vf sigmoid(vf x) { return div(set1(1.0f), add(set1(1.0f), exp(neg(x)))); }

QUIRE_INLINE vf silu(vf x) { return div(x, add(set1(1.0f), exp(neg(x)))); }

// 0.5 (1 + tanh(u)) = sigmoid(2u), which loses nothing where tanh(u) is near -1. Hendrycks and Gimpel, 2016.
QUIRE_INLINE vf gelu_tanh(vf x) {
    const vf inner = fma(mul(mul(x, x), x), set1(0.044715f), x);
    return mul(x, sigmoid(mul(inner, set1(2.0f * 0.7978845608028654f))));
}

// x times the normal distribution function, from erfc by a Chebyshev fit that is good to 1.2e-7 relative everywhere
// (Press et al., Numerical Recipes, 6.2).
QUIRE_INLINE vf gelu(vf x) {
    const vf z = mul(abs(x), set1(0.70710678118654752f));
    const vf t = div(set1(1.0f), fma(z, set1(0.5f), set1(1.0f)));
    vf p = set1(0.17087277f);
    p = fma(p, t, set1(-0.82215223f));
    p = fma(p, t, set1(1.48851587f));
    p = fma(p, t, set1(-1.13520398f));
    p = fma(p, t, set1(0.27886807f));
    p = fma(p, t, set1(-0.18628806f));
    p = fma(p, t, set1(0.09678418f));
    p = fma(p, t, set1(0.37409196f));
    p = fma(p, t, set1(1.00002368f));
    p = fma(p, t, set1(-1.26551223f));
    const vf tail = mul(mul(t, set1(0.5f)), exp(fma(neg(z), z, p)));   // the distribution function at -|x|
    return mul(x, select(greater(x, zero()), sub(set1(1.0f), tail), tail));
}

template <Activation kind> QUIRE_INLINE vf activate(vf x) {
    if constexpr (kind == Activation::silu) return silu(x);
    else if constexpr (kind == Activation::gelu) return gelu(x);
    else if constexpr (kind == Activation::gelu_tanh) return gelu_tanh(x);
    else if constexpr (kind == Activation::relu) return max(zero(), x);   // NaN stays NaN
    else return x;
}

// cap tanh(x / cap), cap > 0 (Gemma 2, arXiv 2408.00118, section 2). NaN stays NaN.
QUIRE_INLINE vf softcap(vf x, float cap) {
    const vf e = exp(mul(abs(x), set1(-2.0f / cap)));
    const vf y = div(mul(set1(cap), sub(set1(1.0f), e)), add(set1(1.0f), e));
    return select(greater(zero(), x), neg(y), y);
}

// The activated gate x times what it gates. NaN stays NaN. swiglu_oai: gpt-oss, arXiv 2508.10925, section 2.
template <Activation kind> QUIRE_INLINE vf gate(vf x, vf up) {
    if constexpr (kind == Activation::swiglu_oai) {
        const vf most = set1(7.0f), least = set1(-7.0f);
        x = min(most, x);
        return mul(add(max(least, min(most, up)), set1(1.0f)), mul(x, sigmoid(mul(x, set1(1.702f)))));
    } else {
        return mul(activate<kind>(x), up);
    }
}

}  // namespace quire::QUIRE_NS
