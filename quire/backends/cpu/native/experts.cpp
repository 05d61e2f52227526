// Every row is routed by itself: the experts with the highest scores, or corrected shares, of equal ones the first, and their shares. Then
// rows are sorted by expert, so that all that take one meet its weights at once, and all experts of a step are one parallel region: the
// weights of those that nobody takes are not read. A row's sum goes over its own experts in the order in which it chose them. So its bytes
// are its own.
#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "threads.h"

namespace quire {
namespace {

constexpr int64_t kAlone = 32768;       // numbers that are gone through sooner than others are woken
constexpr int64_t kRowsOfTask = 8;

constexpr float kLeast = 1e-20f;        // added to a sum of shares, which may all be 0

struct Routing {
    const Experts::Args& args;
    const Choice& choice;
    int64_t experts, taken, dim;
    int32_t* chosen;     // [m, taken]
    float* weights;      // [m, taken]
    int32_t* places;     // [m, taken]: in `rows`
    float* shares;       // [m, 2 * experts], where experts are chosen by shares: these, and what is chosen by
};

// The experts for which `by` is highest. A row with a NaN in it takes the first ones, and is NaN; returns whether it has none.
bool choose(const Routing& r, const float* by, int32_t* chosen, float* weights) {
    if (std::any_of(by, by + r.experts, [](float each) { return std::isnan(each); })) {
        for (int64_t i = 0; i < r.taken; ++i)
            chosen[i] = static_cast<int32_t>(i), weights[i] = std::numeric_limits<float>::quiet_NaN();
        return false;
    }
    int64_t last = -1;   // those taken so far come before it: by score, and then by number
    for (int64_t i = 0; i < r.taken; ++i) {
        int64_t best = -1;
        for (int64_t e = 0; e < r.experts; ++e) {
            const bool left = last < 0 || by[e] < by[last] || (by[e] == by[last] && e > last);
            if (left && (best < 0 || by[e] > by[best])) best = e;
        }
        chosen[i] = static_cast<int32_t>(last = best);
    }
    return true;
}

void route(const Routing& r, int64_t row) {
    const float* scores = r.args.scores + row * r.args.scores_stride;
    int32_t* chosen = r.chosen + row * r.taken;
    float* weights = r.weights + row * r.taken;
    if (!choose(r, scores, chosen, weights)) return;
    const float most = scores[chosen[0]];
    float sum = 0.0f;
    for (int64_t i = 0; i < r.taken; ++i) sum += weights[i] = std::exp(scores[chosen[i]] - most);
    if (!r.choice.sum_to_one) {
        sum = 0.0f;
        for (int64_t e = 0; e < r.experts; ++e) sum += std::exp(scores[e] - most);
    }
    for (int64_t i = 0; i < r.taken; ++i) weights[i] = weights[i] / sum * r.choice.scale;
}

// Where what is chosen by is no score.
void route_by_shares(const Routing& r, int64_t row) {
    const float* scores = r.args.scores + row * r.args.scores_stride;
    float* shares = r.shares + row * 2 * r.experts;
    float* by = shares + r.experts;
    if (r.choice.sigmoid) {
        for (int64_t e = 0; e < r.experts; ++e) shares[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    } else {
        const float most = *std::max_element(scores, scores + r.experts);   // a NaN anywhere makes the sum NaN
        float sum = 0.0f;
        for (int64_t e = 0; e < r.experts; ++e) sum += shares[e] = std::exp(scores[e] - most);
        for (int64_t e = 0; e < r.experts; ++e) shares[e] /= sum;
    }
    const std::vector<float>& correction = r.choice.correction;
    for (int64_t e = 0; e < r.experts; ++e) by[e] = correction.empty() ? shares[e] : shares[e] + correction[static_cast<size_t>(e)];
    int32_t* chosen = r.chosen + row * r.taken;
    float* weights = r.weights + row * r.taken;
    if (!choose(r, by, chosen, weights)) return;
    float sum = 0.0f;
    for (int64_t i = 0; i < r.taken; ++i) sum += weights[i] = shares[chosen[i]];
    if (!r.choice.sum_to_one) sum = 1.0f;
    for (int64_t i = 0; i < r.taken; ++i) weights[i] = weights[i] / (sum + kLeast) * r.choice.scale;
}

void fetch(const Routing& r, int64_t row) {
    const Experts::Args& a = r.args;
    for (int64_t i = 0; i < r.taken; ++i)
        std::memcpy(a.rows + r.places[row * r.taken + i] * a.rows_stride, a.x + row * a.x_stride, static_cast<size_t>(r.dim) * sizeof(float));
}

template <void (*work)(const Routing&, int64_t)> void for_rows(const Routing& r, int64_t each) {
    if (r.args.m * each <= kAlone) {
        for (int64_t row = 0; row < r.args.m; ++row) work(r, row);
        return;
    }
    run_tasks((r.args.m + kRowsOfTask - 1) / kRowsOfTask, [](const void* context, int64_t task, int64_t) {
        const Routing& r = *static_cast<const Routing*>(context);
        const int64_t end = std::min((task + 1) * kRowsOfTask, r.args.m);
        for (int64_t row = task * kRowsOfTask; row < end; ++row) work(r, row);
    }, &r);
}

}  // namespace

Experts::Experts(std::vector<PackedLinear*> up, std::vector<PackedLinear*> down, Choice choice, std::vector<float> up_bias,
                 std::vector<float> down_bias)
    : up_(std::move(up)), down_(std::move(down)), choice_(std::move(choice)), up_bias_(std::move(up_bias)),
      down_bias_(std::move(down_bias)),
      up_readings_(readings_of(up_[0]->kernels, up_[0]->panels, true)),
      down_readings_(readings_of(down_[0]->kernels, down_[0]->panels, true)) {
    PackedLinear::gather(up_);
    PackedLinear::gather(down_);
}

void Experts::run(const Args& a) const {
    if (a.m == 0) return;
    const int64_t experts = count(), taken = choice_.taken, rows = a.m * taken;
    const bool by_shares = choice_.sigmoid || !choice_.correction.empty();
    const auto size = [](int64_t items, size_t each) { return (static_cast<size_t>(items) * each + 63) / 64 * 64; };
    const size_t ints = size(rows, 4), groups_size = size(experts, sizeof(RowGroup));
    const size_t fixed = 3 * ints + size(experts + 1, 4) + 2 * groups_size;
    char* memory = static_cast<char*>(thread_scratch(kScratchExperts, fixed + size(by_shares ? 2 * a.m * experts : 0, 4)));
    const Routing routing{a, choice_, experts, taken, up().panels.k, reinterpret_cast<int32_t*>(memory),
                          reinterpret_cast<float*>(memory + ints), reinterpret_cast<int32_t*>(memory + 2 * ints),
                          reinterpret_cast<float*>(memory + fixed)};
    auto* up_groups = reinterpret_cast<RowGroup*>(memory + 3 * ints);
    auto* down_groups = reinterpret_cast<RowGroup*>(memory + 3 * ints + groups_size);
    auto* starts = reinterpret_cast<int32_t*>(memory + 3 * ints + 2 * groups_size);   // of each expert's rows; then where its next one goes
    if (by_shares) for_rows<route_by_shares>(routing, experts * taken);
    else for_rows<route>(routing, experts * taken);

    const auto bias_of = [experts](const std::vector<float>& all, int64_t e) {
        return all.empty() ? nullptr : all.data() + static_cast<int64_t>(all.size()) / experts * e;
    };
    std::fill_n(starts, experts + 1, 0);
    for (int64_t i = 0; i < rows; ++i) ++starts[routing.chosen[i] + 1];
    int64_t met = 0;
    for (int64_t e = 0; e < experts; ++e) {
        if (const int32_t here = starts[e + 1]) {
            up_groups[met] = {starts[e], here, up_[static_cast<size_t>(e)]->panels.data, bias_of(up_bias_, e)};
            down_groups[met++] = {starts[e], here, down_[static_cast<size_t>(e)]->panels.data, bias_of(down_bias_, e)};
        }
        starts[e + 1] += starts[e];
    }
    for (int64_t i = 0; i < rows; ++i) routing.places[i] = starts[routing.chosen[i]]++;
    for_rows<fetch>(routing, taken * routing.dim);

    LinearArgs args{up().panels, a.rows, a.inner, nullptr, rows, a.rows_stride, a.inner_stride, false, a.activation, nullptr, 0, 0,
                    Reading::slices, up_groups, met};
    down().follow(args, down_groups[0].data);
    const int64_t each = (rows + met - 1) / met;
    up_readings_.read(each, met, [&](Reading reading) { up().run(args, reading); });
    args = {down().panels, a.inner, a.rows, nullptr, rows, a.inner_stride, a.rows_stride, false, Activation::none, nullptr, 0, 0,
            Reading::slices, down_groups, met};
    if (then) then->follow(args, then->panels.data);
    down_readings_.read(each, met, [&](Reading reading) { down().run(args, reading); });
    up().kernels.combine({a.rows, routing.places, routing.weights, a.out, a.m, routing.dim, taken, a.rows_stride, a.out_stride,
                          a.accumulate});
}

}  // namespace quire
