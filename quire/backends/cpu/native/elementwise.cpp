// What happens to each element alone: activations, embedding rows, conversions between float widths.
#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int64_t kRun = 4096;   // elements in a task

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

template <Activation kind> QUIRE_INLINE vf apply(vf x) {
    if constexpr (kind == Activation::silu) return silu(x);
    else if constexpr (kind == Activation::gelu) return gelu(x);
    else if constexpr (kind == Activation::gelu_tanh) return gelu_tanh(x);
    else return max(zero(), x);   // NaN stays NaN
}

template <Activation kind> void activate(const float* x, const float* up, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) {
        const int left = static_cast<int>(n - i < kWidth ? n - i : kWidth);
        vf y = apply<kind>(load_n(x + i, left));
        if (up) y = mul(y, load_n(up + i, left));
        store_n(out + i, y, left);
    }
}

void activation_task(const void* context, int64_t task, int64_t) {
    const ActivationArgs& a = *static_cast<const ActivationArgs*>(context);
    const int64_t runs = (a.f + kRun - 1) / kRun, row = task / runs, at = task % runs * kRun;
    const int64_t n = a.f - at < kRun ? a.f - at : kRun;
    const float* x = a.x + row * a.x_stride + at;
    const float* up = a.gated ? x + a.f : nullptr;
    float* out = a.out + row * a.out_stride + at;
    switch (a.kind) {
        case Activation::silu: return activate<Activation::silu>(x, up, out, n);
        case Activation::gelu: return activate<Activation::gelu>(x, up, out, n);
        case Activation::gelu_tanh: return activate<Activation::gelu_tanh>(x, up, out, n);
        case Activation::relu: return activate<Activation::relu>(x, up, out, n);
    }
}

template <class T> void embed_row(const EmbedArgs& a, const T* table, int64_t row) {
    const T* from = table + a.ids[row] * a.table_stride;
    float* out = a.out + row * a.out_stride;
    for (int64_t i = 0; i < a.dim; i += kWidth) {
        const int left = static_cast<int>(a.dim - i < kWidth ? a.dim - i : kWidth);
        const vf x = load_n(from + i, left);
        store_n(out + i, a.add ? add(load_n(out + i, left), x) : mul(x, set1(a.scale)), left);
    }
}

void embed_task(const void* context, int64_t row, int64_t) {
    const EmbedArgs& a = *static_cast<const EmbedArgs*>(context);
    switch (a.dtype) {
        case DType::f32: return embed_row(a, static_cast<const float*>(a.table), row);
        case DType::f16: return embed_row(a, static_cast<const f16*>(a.table), row);
        case DType::bf16: return embed_row(a, static_cast<const bf16*>(a.table), row);
    }
}

template <class From, class To> void convert_run(const void* x, void* out, int64_t at, int64_t end) {
    const From* from = static_cast<const From*>(x);
    To* to = static_cast<To*>(out);
    for (int64_t i = at; i < end; i += kWidth) {
        const int left = static_cast<int>(end - i < kWidth ? end - i : kWidth);
        store_n(to + i, load_n(from + i, left), left);
    }
}

template <class From> void convert_from(const ConvertArgs& a, int64_t at, int64_t end) {
    switch (a.to) {
        case DType::f32: return convert_run<From, float>(a.x, a.out, at, end);
        case DType::f16: return convert_run<From, f16>(a.x, a.out, at, end);
        case DType::bf16: return convert_run<From, bf16>(a.x, a.out, at, end);
    }
}

void convert_task(const void* context, int64_t task, int64_t) {
    const ConvertArgs& a = *static_cast<const ConvertArgs*>(context);
    const int64_t at = task * kRun, end = at + kRun < a.n ? at + kRun : a.n;
    switch (a.from) {
        case DType::f32: return convert_from<float>(a, at, end);
        case DType::f16: return convert_from<f16>(a, at, end);
        case DType::bf16: return convert_from<bf16>(a, at, end);
    }
}

}  // namespace

void activation(const ActivationArgs& a) { run_tasks(a.m * ((a.f + kRun - 1) / kRun), activation_task, &a); }
void embed(const EmbedArgs& a) { run_tasks(a.m, embed_task, &a); }
void convert(const ConvertArgs& a) { run_tasks((a.n + kRun - 1) / kRun, convert_task, &a); }

}  // namespace quire::QUIRE_NS
