// What happens to each element alone: embedding rows, sums of what experts give, conversions between float widths, limits of logits.
#include "activation.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

constexpr int64_t kRun = 4096;   // elements in a task

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

void combine_task(const void* context, int64_t row, int64_t) {
    const CombineArgs& a = *static_cast<const CombineArgs*>(context);
    const int32_t* places = a.places + row * a.taken;
    const float* weights = a.weights + row * a.taken;
    float* out = a.out + row * a.out_stride;
    for (int64_t i = 0; i < a.dim; i += kWidth) {
        const int left = static_cast<int>(a.dim - i < kWidth ? a.dim - i : kWidth);
        vf sum = zero();
        for (int64_t j = 0; j < a.taken; ++j) sum = fma(set1(weights[j]), load_n(a.y + places[j] * a.y_stride + i, left), sum);
        store_n(out + i, a.accumulate ? add(load_n(out + i, left), sum) : sum, left);
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

void softcap_task(const void* context, int64_t task, int64_t) {
    const SoftcapArgs& a = *static_cast<const SoftcapArgs*>(context);
    const int64_t runs = (a.n + kRun - 1) / kRun, at = task % runs * kRun, end = at + kRun < a.n ? at + kRun : a.n;
    float* x = a.x + task / runs * a.stride;
    for (int64_t i = at; i < end; i += kWidth) {
        const int left = static_cast<int>(end - i < kWidth ? end - i : kWidth);
        store_n(x + i, softcap(load_n(x + i, left), a.cap), left);
    }
}

}  // namespace

void combine(const CombineArgs& args) {
    constexpr int64_t kAlone = 32768;   // numbers that are added sooner than others are woken
    if (args.m * args.taken * args.dim <= kAlone) {
        for (int64_t row = 0; row < args.m; ++row) combine_task(&args, row, -1);
    } else {
        run_tasks(args.m, combine_task, &args);
    }
}

void embed(const EmbedArgs& a) { run_tasks(a.m, embed_task, &a); }
void softcap(const SoftcapArgs& a) { run_tasks((a.n + kRun - 1) / kRun * a.m, softcap_task, &a); }
void convert(const ConvertArgs& a) { run_tasks((a.n + kRun - 1) / kRun, convert_task, &a); }

}  // namespace quire::QUIRE_NS
