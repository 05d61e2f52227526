// The sampler, row by row, in the order of vLLM's V1 sampler: raw logprobs; masks and biases; penalties; temperature;
// min_p; top_k; top_p; draw. What it keeps is always a prefix of the vocabulary ordered by (logit descending, id
// ascending), cut down by min_p; the vocabulary itself is never sorted, only the few candidates that a cheap bound leaves.
// Sums are taken in double and in an order that depends on the row alone.
#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "threads.h"

namespace quire {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Candidate { float z, w; int32_t id; };

bool likelier(const Candidate& a, const Candidate& b) { return a.z != b.z ? a.z > b.z : a.id < b.id; }

struct Row {
    const Kernels& kernels;
    const SampleArgs& a;
    const int64_t row, vocab = a.vocab;
    const float* raw = a.logits + row * a.stride;
    float *changed = nullptr, *weights = nullptr;   // scratch, one value a token
    float *maxima = nullptr, *ordered = nullptr;    // one a run of kMaxRun tokens
    double* sums = nullptr;
    int32_t* ids = nullptr;
    Candidate* candidates = nullptr;
    float raw_top = 0;                     // of the raw logits
    double raw_mass = 0;                   // sum of exp(logit - raw_top), where it is known

    void allocate() {
        const auto v = static_cast<size_t>(vocab), pad = size_t{64};
        const size_t runs = v / kSumRun + 1, max_runs = v / kMaxRun + 1;
        char* p = static_cast<char*>(thread_scratch(
            kScratchSampler, 3 * v * 4 + 2 * max_runs * 4 + runs * 8 + v * sizeof(Candidate) + 7 * pad));
        const auto take = [&p](size_t bytes) { char* at = p; p += (bytes + 63) / 64 * 64; return static_cast<void*>(at); };
        changed = static_cast<float*>(take(v * 4));
        weights = static_cast<float*>(take(v * 4));
        ids = static_cast<int32_t*>(take(v * 4));
        maxima = static_cast<float*>(take(max_runs * 4));
        ordered = static_cast<float*>(take(max_runs * 4));
        sums = static_cast<double*>(take(runs * 8));
        candidates = static_cast<Candidate*>(take(v * sizeof(Candidate)));
    }

    void run() {
        allocate();
        int32_t token = -1;
        const SampleStatus status = a.given ? look_at(token) : choose(token);
        a.status[row] = static_cast<int32_t>(status);
        if (a.tokens) a.tokens[row] = token;
        if (a.num_logprobs && a.num_logprobs[row] >= 0) report(token);
    }

    SampleStatus look_at(int32_t& token) {
        const RowScan seen = kernels.scan(raw, vocab);
        if (seen.bad) return SampleStatus::bad_logits;
        raw_top = seen.max;
        if (raw_top == -kInf) return SampleStatus::nothing_allowed;
        token = a.given[row];
        return SampleStatus::ok;
    }

    SampleStatus choose(int32_t& token) {
        const float* z = raw;
        RowScan seen = kernels.scan(z, vocab);
        if (seen.bad) return SampleStatus::bad_logits;
        raw_top = seen.max;
        if (changes()) {
            std::memcpy(changed, raw, static_cast<size_t>(vocab) * sizeof(float));
            restrict_tokens();
            penalize();
            z = changed;
            seen = kernels.scan(z, vocab);
            if (seen.bad) return SampleStatus::bad_logits;
        }
        if (seen.max == -kInf) return SampleStatus::nothing_allowed;
        const float temperature = a.temperature[row];
        token = temperature == 0 ? static_cast<int32_t>(kernels.find_equal(z, vocab, seen.max)) : draw(z, seen.max, temperature);
        return SampleStatus::ok;
    }

    bool has(const Lists& lists) const { return lists.start && lists.start[row + 1] > lists.start[row]; }
    float value(const float* array, float otherwise) const { return array ? array[row] : otherwise; }
    bool penalized() const {
        return value(a.repetition, 1) != 1 || value(a.frequency, 0) != 0 || value(a.presence, 0) != 0;
    }
    const uint32_t* mask() const {
        const int64_t index = a.mask_index ? a.mask_index[row] : row;
        return a.mask && index >= 0 ? a.mask + index * a.mask_stride : nullptr;
    }
    bool changes() const {
        return mask() || has(a.bias) || has(a.banned) || (penalized() && (has(a.prompt) || has(a.output)));
    }

    void restrict_tokens() {
        if (const uint32_t* allowed = mask()) {
            for (int64_t word = 0; word * 32 < vocab; ++word) {
                const uint32_t bits = allowed[word];
                if (bits == ~0u) continue;
                const int64_t begin = word * 32, end = std::min(vocab, begin + 32);
                if (!bits) std::fill(changed + begin, changed + end, -kInf);
                else   // without branches: masks may be anything
                    for (int64_t t = begin; t < end; ++t) {
                        const uint32_t keep = 0u - (bits >> (t - begin) & 1);
                        const uint32_t z = std::bit_cast<uint32_t>(changed[t]);
                        changed[t] = std::bit_cast<float>((z & keep) | (std::bit_cast<uint32_t>(-kInf) & ~keep));
                    }
            }
        }
        if (has(a.banned))
            for (int32_t i = a.banned.start[row]; i < a.banned.start[row + 1]; ++i) changed[a.banned.values[i]] = -kInf;
        if (has(a.bias))
            for (int32_t i = a.bias.start[row]; i < a.bias.start[row + 1]; ++i)
                changed[a.bias.values[i]] += a.bias_values[i];
    }

    void penalize() {
        if (!penalized()) return;
        const float repetition = value(a.repetition, 1), frequency = value(a.frequency, 0), presence = value(a.presence, 0);
        // counts[t] is 0 for all t between uses; -1 marks a token that is done.
        auto* counts = static_cast<int32_t*>(thread_scratch(kScratchHistory, static_cast<size_t>(vocab) * 4));
        const auto each = [this](const Lists& lists, auto&& visit) {
            if (!has(lists)) return;
            for (int32_t i = lists.start[row]; i < lists.start[row + 1]; ++i) visit(lists.values[i]);
        };
        const auto repeat = [&](int32_t t) { changed[t] = changed[t] > 0 ? changed[t] / repetition : changed[t] * repetition; };
        each(a.output, [&](int32_t t) { ++counts[t]; });
        each(a.output, [&](int32_t t) {
            if (counts[t] < 0) return;
            repeat(t);
            changed[t] -= frequency * static_cast<float>(counts[t]);
            changed[t] -= presence;
            counts[t] = -1;
        });
        each(a.prompt, [&](int32_t t) {
            if (counts[t] < 0) return;
            repeat(t);
            counts[t] = -1;
        });
        each(a.output, [&](int32_t t) { counts[t] = 0; });
        each(a.prompt, [&](int32_t t) { counts[t] = 0; });
    }

    // Finds the k likeliest tokens, and a few more: all with a logit that k runs of tokens reach, which only these can have.
    int64_t find_likeliest(const float* z, int64_t k) {
        const int64_t runs = (vocab + kMaxRun - 1) / kMaxRun, runs_of_runs = (runs + kMaxRun - 1) / kMaxRun;
        if (k > runs) return kernels.select_at_least(z, vocab, -kInf, ids);
        kernels.run_maxima(z, vocab, maxima);
        const bool few = k <= runs_of_runs;   // then k runs of runs do as well, and are looked through sooner
        if (few) kernels.run_maxima(maxima, runs, ordered);
        else std::copy(maxima, maxima + runs, ordered);
        std::nth_element(ordered, ordered + k - 1, ordered + (few ? runs_of_runs : runs), std::greater<>());
        const float reached = ordered[k - 1];
        int64_t n = 0;
        for (int64_t run = 0; run < runs; ++run) {
            if (!(maxima[run] >= reached)) continue;
            for (int64_t t = run * kMaxRun, end = std::min(vocab, t + kMaxRun); t < end; ++t)
                if (z[t] >= reached) ids[n++] = static_cast<int32_t>(t);
        }
        return n;
    }

    struct Range { float low, high; };

    int32_t draw(const float* z, float top, float temperature) {
        const double total = kernels.exp_row(z, vocab, top, temperature, weights, sums);
        if (z == raw && temperature == 1) raw_mass = total;
        const double u = uniform(a.seed[row], static_cast<uint64_t>(a.position[row]));
        const int64_t k = a.top_k && a.top_k[row] > 0 && a.top_k[row] < vocab ? a.top_k[row] : 0;
        const float p = value(a.top_p, 1), least = value(a.min_p, 0);
        if (!k && p >= 1 && least <= 0) return draw_from_all(u * total);

        Range edge{0, kInf};   // of weights: all above it are kept, and none below it
        int64_t n;
        if (k) n = find_likeliest(z, k);
        else if (least > 0) n = kernels.select_at_least(weights, vocab, least, ids);
        else n = find_nucleus(p, total, edge);
        int64_t count = 0;
        double above = 0;
        for (int64_t i = 0; i < n; ++i) {
            const int32_t id = ids[i];
            const float w = weights[id];
            if (w >= edge.high) above += w;
            else if (w > 0 && w >= least) candidates[count++] = {z[id], w, id};
        }
        Candidate last{-kInf, 0, INT32_MAX};   // the least likely one that is kept
        if (k && count > k) {
            std::nth_element(candidates, candidates + k - 1, candidates + count, likelier);
            last = candidates[k - 1];
            count = k;
        }
        // Without min_p and top_k the mass of what was left out above counts as well.
        if (p < 1) last = nucleus(count, above, p * (k || least > 0 ? mass(0, count) : total));

        // Once more in ascending order of ids, which the search has disturbed.
        count = 0;
        double kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const int32_t id = ids[i];
            const float w = weights[id];
            if (!(w > 0 && w >= least) || likelier(last, {z[id], w, id})) continue;
            ids[count++] = id;
            kept += w;
        }
        const double target = u * kept;
        double reached = 0;
        for (int64_t i = 0; i < count; ++i)
            if ((reached += weights[ids[i]]) > target) return ids[i];
        return ids[count - 1];
    }

    // Finds the tokens of the nucleus, and a few more: those that weigh edge.low or more. They hold the mass p * total for certain, those
    // that weigh edge.high or more do not. Halves the distance between the logarithms, that is the bits; soon few tokens are left.
    int64_t find_nucleus(float p, double total, Range& edge) {
        constexpr double kRoom = 1e-4;   // far more than what float32 sums are off by
        constexpr int kSteps = 8, kOfAll = 3;
        // Tokens below a share (1 - p) / vocab of the mass hold less than 1 - p together.
        const float low = static_cast<float>(0.5 * (1 - p) * total / static_cast<double>(vocab));
        auto from = std::bit_cast<uint32_t>(low), to = std::bit_cast<uint32_t>(1.0f);   // what the likeliest one weighs
        auto* left = reinterpret_cast<float*>(candidates);   // the weights of `ids`; candidates come later
        const float* among = weights;
        int64_t n = vocab;
        for (int step = 0; step < kSteps; ++step) {
            if (step == kOfAll) {
                n = kernels.select_at_least(weights, vocab, std::bit_cast<float>(from), ids);
                for (int64_t i = 0; i < n; ++i) left[i] = weights[ids[i]];
                among = left;
            }
            const uint32_t middle = from + (to - from) / 2;
            const double mass = kernels.mass_at_least(among, n, std::bit_cast<float>(middle));
            if (mass >= p * total * (1 + kRoom)) from = middle;
            else to = middle;
            if (mass < p * total * (1 - kRoom)) edge.high = std::bit_cast<float>(to);
        }
        edge.low = std::bit_cast<float>(from);
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i) {   // without a branch: half of them stay
            ids[count] = ids[i];
            count += left[i] >= edge.low;
        }
        return count;
    }

    double mass(int64_t from, int64_t to) const {
        double sum = 0;
        for (int64_t i = from; i < to; ++i) sum += candidates[i].w;
        return sum;
    }

    // The last candidate, in order of likelihood, of the smallest set that holds at least `target`, of which `before` comes
    // before all candidates. Sorts only the bucket of logits in which the mass gets there.
    Candidate nucleus(int64_t count, double before, double target) {
        constexpr int kBuckets = 1024;
        double buckets[kBuckets] = {};
        float least = kInf, top = -kInf;
        for (int64_t i = 0; i < count; ++i) least = std::min(least, candidates[i].z), top = std::max(top, candidates[i].z);
        const bool spread = top - least > 1e-30f;   // otherwise all go to the first bucket
        const float scale = spread ? kBuckets / (top - least) : 0.0f;
        const auto bucket = [=](const Candidate& c) { return std::min(kBuckets - 1, static_cast<int>((top - c.z) * scale)); };
        for (int64_t i = 0; i < count; ++i) buckets[bucket(candidates[i])] += candidates[i].w;
        int here = 0;
        while (spread && here < kBuckets - 1 && before + buckets[here] < target) before += buckets[here++];
        Candidate* end = std::partition(candidates, candidates + count, [&](const Candidate& c) { return bucket(c) == here; });

        int64_t low = 0, high = end - candidates;   // the last one needed is in [low, high)
        while (high - low > 256) {
            const int64_t middle = (low + high) / 2;
            std::nth_element(candidates + low, candidates + middle, candidates + high, likelier);
            const double left = mass(low, middle);
            if (before + left >= target) high = middle;
            else low = middle, before += left;
        }
        std::sort(candidates + low, candidates + high, likelier);
        for (; low < high - 1; ++low)
            if ((before += candidates[low].w) >= target) break;
        return candidates[low];
    }

    // The run in which the mass passes the target, then the token in it. Rounding may let the sum end short of the
    // target, inside a run or at the very end: then it is the last token before that point that can be drawn at all.
    int32_t draw_from_all(double target) {
        double reached = 0;
        int64_t end = vocab;
        for (int64_t begin = 0; begin < vocab; begin += kSumRun) {
            const double next = reached + sums[begin / kSumRun];
            if (next > target) {
                end = std::min(vocab, begin + kSumRun);
                for (int64_t t = begin; t < end; ++t) {
                    reached += weights[t];
                    if (reached > target && weights[t] > 0) return static_cast<int32_t>(t);
                }
                break;
            }
            reached = next;
        }
        while (!(weights[end - 1] > 0)) --end;   // the likeliest token has weight 1, and lies in or before this run
        return static_cast<int32_t>(end - 1);
    }

    // Raw log probabilities: of the token, its rank, and the likeliest ones. A token has the greatest of them only if it has the
    // greatest logit: where rounding would make two equal, the less likely one gets the next smaller float.
    void report(int32_t token) {
        const int64_t wanted = std::min<int64_t>(a.num_logprobs[row], a.top_width);
        int32_t* top_ids = a.top_ids + row * a.top_width;
        float* top_logprobs = a.top_logprobs + row * a.top_width;
        std::fill(top_ids, top_ids + a.top_width, -1);
        std::fill(top_logprobs, top_logprobs + a.top_width, -kInf);
        a.logprob[row] = -kInf;
        a.rank[row] = -1;
        if (token < 0) return;
        if (raw_mass == 0) raw_mass = kernels.exp_row(raw, vocab, raw_top, 1.0f, nullptr, nullptr);
        const double log_sum = raw_top + std::log(raw_mass);
        const float most = static_cast<float>(raw_top - log_sum);
        const auto logprob = [=, this](float z) {
            const auto value = static_cast<float>(z - log_sum);
            return z < raw_top && value == most ? std::nextafter(most, -kInf) : value;
        };
        a.logprob[row] = logprob(raw[token]);
        const int64_t n = wanted > 0 ? find_likeliest(raw, wanted) : 0, kept = std::min(n, wanted);
        float least = kInf;
        int64_t greater = 0;
        for (int64_t i = 0; i < n; ++i) {
            candidates[i] = {raw[ids[i]], 0, ids[i]};
            least = std::min(least, candidates[i].z);
            greater += candidates[i].z > raw[token];
        }
        if (!(raw[token] >= least)) greater = raw[token] == raw_top ? 0 : kernels.count_greater(raw, vocab, raw[token]);
        a.rank[row] = static_cast<int32_t>(1 + greater);
        std::partial_sort(candidates, candidates + kept, candidates + n, likelier);
        for (int64_t i = 0; i < kept; ++i) {
            top_ids[i] = candidates[i].id;
            top_logprobs[i] = logprob(candidates[i].z);
        }
    }
};

struct Context { const Kernels& kernels; const SampleArgs& args; };

void task(const void* context, int64_t index, int64_t) {
    const Context& c = *static_cast<const Context*>(context);
    Row row{c.kernels, c.args, index};
    row.run();
}

}  // namespace

void sample(const Kernels& kernels, const SampleArgs& args) {
    const Context context{kernels, args};
    run_tasks(args.rows, task, &context);
}

double uniform(uint64_t seed, uint64_t position) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(p1),
                                  static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(p0)};
        std::memcpy(c, next, sizeof c);
        key0 += 0x9E3779B9, key1 += 0xBB67AE85;
    }
    return static_cast<double>((uint64_t{c[0]} << 32 | c[1]) >> 11) * 0x1p-53;
}

}  // namespace quire
