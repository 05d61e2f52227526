// Norms and rotary position embedding. Each looks at one row (or head vector) only, and sums within it in a fixed order.
#include "simd.h"
#include "threads.h"

namespace quire::QUIRE_NS {
namespace {

// Rows in a task: enough work to be worth handing out.
int64_t rows_per_task(int64_t floats_per_row) {
    const int64_t rows = 16384 / (floats_per_row + 1);
    return rows < 1 ? 1 : rows;
}

float sum_of_squares(const float* x, int64_t n, vf mean) {
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
        for (int j = 0; j < 4; ++j) {
            const vf d = sub(load(x + i + j * kWidth), mean);
            sum[j] = fma(d, d, sum[j]);
        }
    for (; i < n; i += kWidth) {
        const int left = static_cast<int>(n - i < kWidth ? n - i : kWidth);
        const vf d = select(lanes_between(0, left), sub(load_n(x + i, left), mean), zero());
        sum[0] = fma(d, d, sum[0]);
    }
    return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

float sum_of(const float* x, int64_t n) {
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
        for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], load(x + i + j * kWidth));
    for (; i < n; i += kWidth) sum[0] = add(sum[0], load_n(x + i, static_cast<int>(n - i < kWidth ? n - i : kWidth)));
    return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

void norm_vector(const NormArgs& a, const float* x, float* out) {
    const float n = static_cast<float>(a.dim);
    const vf mean = set1(a.centre ? sum_of(x, a.dim) / n : 0.0f);
    const vf scale = set1(1.0f / __builtin_sqrtf(sum_of_squares(x, a.dim, mean) / n + a.eps));
    for (int64_t i = 0; i < a.dim; i += kWidth) {
        const int left = static_cast<int>(a.dim - i < kWidth ? a.dim - i : kWidth);
        vf y = mul(sub(load_n(x + i, left), mean), scale);
        y = a.bias ? fma(y, load_n(a.weight + i, left), load_n(a.bias + i, left)) : mul(y, load_n(a.weight + i, left));
        if (a.accumulate) y = add(load_n(out + i, left), y);
        store_n(out + i, y, left);
    }
}

void norm_task(const void* context, int64_t task, int64_t) {
    const NormArgs& a = *static_cast<const NormArgs*>(context);
    const int64_t step = rows_per_task(a.heads * a.dim), end = (task + 1) * step < a.m ? (task + 1) * step : a.m;
    for (int64_t row = task * step; row < end; ++row)
        for (int64_t head = 0; head < a.heads; ++head)
            norm_vector(a, a.x + row * a.x_stride + head * a.x_head_stride,
                        a.out + row * a.out_stride + head * a.out_head_stride);
}

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), where x1 and x2 are the two halves of the rotated dimensions.
void rotary_task(const void* context, int64_t task, int64_t) {
    const RotaryArgs& a = *static_cast<const RotaryArgs*>(context);
    const int64_t step = rows_per_task(2 * a.heads * a.half), end = (task + 1) * step < a.m ? (task + 1) * step : a.m;
    for (int64_t row = task * step; row < end; ++row) {
        const float* cos = a.cos + a.positions[row] * a.half;
        const float* sin = a.sin + a.positions[row] * a.half;
        const vf scale = set1(a.scale ? a.scale[a.positions[row]] : 1.0f);
        for (int64_t head = 0; head < a.heads; ++head) {
            float* x1 = a.x + row * a.x_stride + head * a.x_head_stride;
            float* x2 = x1 + a.half;
            for (int64_t i = 0; i < a.half; i += kWidth) {
                const int left = static_cast<int>(a.half - i < kWidth ? a.half - i : kWidth);
                const vf c = mul(load_n(cos + i, left), scale), s = mul(load_n(sin + i, left), scale);
                const vf u = load_n(x1 + i, left), v = load_n(x2 + i, left);
                store_n(x1 + i, fma(u, c, neg(mul(v, s))), left);
                store_n(x2 + i, fma(v, c, mul(u, s)), left);
            }
        }
    }
}

}  // namespace

void norm(const NormArgs& a) {
    const int64_t step = rows_per_task(a.heads * a.dim);
    run_tasks((a.m + step - 1) / step, norm_task, &a);
}

void rotary(const RotaryArgs& a) {
    const int64_t step = rows_per_task(2 * a.heads * a.half);
    run_tasks((a.m + step - 1) / step, rotary_task, &a);
}

}  // namespace quire::QUIRE_NS
