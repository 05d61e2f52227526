// Logits to tokens. Each row is sampled from its own logits, parameters, history, seed and position, and nothing else.
#pragma once
#include "kernels.h"

namespace quire {

// Lists of different lengths, one for each row: row s is values[start[s]] to values[start[s + 1] - 1].
struct Lists {
    const int32_t* start = nullptr;   // null: all lists are empty
    const int32_t* values = nullptr;
};

enum class SampleStatus : int32_t { ok = 0, bad_logits = 1, nothing_allowed = 2 };

// A null array means: no row uses this. See _native.pyi for what each parameter does, and in which order.
struct SampleArgs {
    const float* logits;
    int64_t rows, vocab, stride;
    const float *temperature, *top_p, *min_p, *repetition, *frequency, *presence;
    const int32_t* top_k;
    const uint64_t* seed;
    const int64_t* position;
    Lists prompt, output, bias, banned;
    const float* bias_values;
    const uint32_t* mask;             // [masks, mask_stride], bit t of a mask: token t is allowed
    int64_t mask_stride;
    const int32_t* mask_index;        // [rows] the mask of each row, -1: none; null: row s has mask s
    const int32_t* num_logprobs;      // -1: none
    int32_t *tokens, *status;
    float* logprob;
    int32_t* rank;
    int32_t* top_ids;                 // [rows, top_width]
    float* top_logprobs;
    int64_t top_width;
    const int32_t* given = nullptr;   // tokens that are there already: they are reported, and nothing is chosen
};

// With args.given, only the logits, num_logprobs and what is written for them are used, besides the status.
void sample(const Kernels& kernels, const SampleArgs& args);

// Philox4x32-10 (Salmon et al., SC 2011) keyed by seed, at counter (position, 0): uniform in [0, 1), 53 bits.
double uniform(uint64_t seed, uint64_t position);

}  // namespace quire
