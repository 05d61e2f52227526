// The passes over a row of logits that the sampler is made of.
#include "simd.h"

namespace quire::QUIRE_NS {

RowScan scan(const float* z, int64_t n) {
    vf most = set1(-__builtin_inff());
    uint32_t bad = 0;
    constexpr uint32_t kAll = (1u << kWidth) - 1;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        const vf x = load(z + i);
        most = max(x, most);
        bad |= bits(below_inf(x)) ^ kAll;
    }
    float top = reduce_max(most);
    for (; i < n; ++i) {
        bad |= !(z[i] < __builtin_inff());
        top = z[i] > top ? z[i] : top;
    }
    return {top, bad != 0};
}

double exp_row(const float* z, int64_t n, float most, float temperature, float* w, double* sums) {
    double total = 0;
    const vf shift = set1(most), t = set1(temperature);
    const bool divide = temperature != 1;
    for (int64_t start = 0, run = 0; start < n; start += kSumRun, ++run) {
        const int64_t end = start + kSumRun < n ? start + kSumRun : n;
        vf sum = zero();
        int64_t i = start;
        for (; i + kWidth <= end; i += kWidth) {
            const vf x = sub(load(z + i), shift), e = exp(divide ? div(x, t) : x);
            sum = add(sum, e);
            if (w) store(w + i, e);
        }
        if (i < end) {
            const int left = static_cast<int>(end - i);
            const vf e = select(lanes_between(0, left), exp(div(sub(load_n(z + i, left), shift), t)), zero());
            sum = add(sum, e);
            if (w) store_n(w + i, e, left);
        }
        const double run_sum = reduce_add(sum);
        if (sums) sums[run] = run_sum;
        total += run_sum;
    }
    return total;
}

double mass_at_least(const float* w, int64_t n, float low) {
    double total = 0;
    const vf bound = set1(low);
    for (int64_t start = 0; start < n; start += kSumRun) {
        const int64_t end = start + kSumRun < n ? start + kSumRun : n;
        vf sum[4];
        for (vf& s : sum) s = zero();
        int64_t i = start;
        for (; i + 4 * kWidth <= end; i += 4 * kWidth)
            for (int j = 0; j < 4; ++j) {
                const vf x = load(w + i + j * kWidth);
                sum[j] = add(sum[j], select(at_least(x, bound), x, zero()));
            }
        float rest = 0;
        for (; i < end; ++i) rest += w[i] >= low ? w[i] : 0;
        total += reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) + rest;
    }
    return total;
}

int64_t count_greater(const float* z, int64_t n, float than) {
    int64_t count = 0, i = 0;
    const vf bound = set1(than);
    for (; i + kWidth <= n; i += kWidth) count += __builtin_popcount(bits(greater(load(z + i), bound)));
    for (; i < n; ++i) count += z[i] > than;
    return count;
}

int64_t select_at_least(const float* z, int64_t n, float low, int32_t* ids) {
    int64_t count = 0, i = 0;
    const vf bound = set1(low);
#if defined(QUIRE_ISA_avx512)
    __m512i id = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + kWidth <= n; i += kWidth) {   // no branch on what is found; count <= i, so a whole vector fits
        const vm m = at_least(load(z + i), bound);
        _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(m, id));
        count += __builtin_popcount(m);
        id = _mm512_add_epi32(id, _mm512_set1_epi32(kWidth));
    }
#else
    for (; i + kWidth <= n; i += kWidth)
        for (uint32_t m = bits(at_least(load(z + i), bound)); m; m &= m - 1)
            ids[count++] = static_cast<int32_t>(i + __builtin_ctz(m));
#endif
    for (; i < n; ++i)
        if (z[i] >= low) ids[count++] = static_cast<int32_t>(i);
    return count;
}

int64_t find_equal(const float* z, int64_t n, float value) {
    int64_t i = 0;
    const vf v = set1(value);
    for (; i + kWidth <= n; i += kWidth)
        if (const uint32_t m = bits(equal(load(z + i), v))) return i + __builtin_ctz(m);
    for (; i < n; ++i)
        if (z[i] == value) return i;
    return -1;
}

void run_maxima(const float* z, int64_t n, float* maxima) {
    for (int64_t start = 0; start < n; start += kMaxRun) {
        const int64_t end = start + kMaxRun < n ? start + kMaxRun : n;
        vf most = set1(-__builtin_inff());
        int64_t i = start;
        for (; i + kWidth <= end; i += kWidth) most = max(load(z + i), most);
        float top = reduce_max(most);
        for (; i < end; ++i) top = z[i] > top ? z[i] : top;
        *maxima++ = top;
    }
}

}  // namespace quire::QUIRE_NS
