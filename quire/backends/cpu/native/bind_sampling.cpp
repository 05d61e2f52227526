// Binding of the sampler. Every parameter is an array with one value a row; what no row uses may be None.
#include <nanobind/stl/optional.h>

#include <cmath>

#include "arrays.h"
#include "dispatch.h"
#include "sampling.h"

namespace quire {
namespace {

using MaybeOut = std::optional<OutArray>;

const float* floats(const MaybeArray& a, const char* name, int64_t rows, float low, float high) {
    if (!a) return nullptr;
    const float* data = vector<float>(*a, name, "float32", rows);
    for (int64_t i = 0; i < rows; ++i)
        if (!(data[i] >= low && data[i] <= high))
            fail(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(data[i]) + ", not within " +
                 std::to_string(low) + " and " + std::to_string(high));
    return data;
}

Lists lists(const MaybeArray& start_, const MaybeArray& values_, const char* name, int64_t rows, int64_t vocab) {
    if (!start_ && !values_) return {};
    require(start_ && values_, std::string(name) + ": the starts and the values go together");
    const std::string start_name = std::string(name) + "_start";
    const int32_t* start = vector<int32_t>(*start_, start_name.c_str(), "int32", rows + 1);
    const int32_t* values = vector<int32_t>(*values_, name, "int32", -1);
    require(start[0] == 0 && start[rows] == dim(*values_, 0),
            start_name + " must go from 0 to the number of values, " + std::to_string(dim(*values_, 0)));
    for (int64_t i = 0; i < rows; ++i) require(start[i] <= start[i + 1], start_name + " must not decrease");
    require_ids(values, dim(*values_, 0), vocab, name, "tokens of the vocabulary");
    return {start, values};
}

template <class T> T* output(const MaybeOut& a, const char* name, const char* dtype, int64_t rows) {
    require(a.has_value(), std::string(name) + " is needed with num_logprobs");
    return vector<T>(*a, name, dtype, rows);
}

// Where the log probabilities of a.rows rows go.
void reports(SampleArgs& a, const Array& num_logprobs_, const MaybeOut& logprob, const MaybeOut& rank, const MaybeOut& top_ids,
             const MaybeOut& top_logprobs) {
    a.num_logprobs = vector<int32_t>(num_logprobs_, "num_logprobs", "int32", a.rows);
    a.logprob = output<float>(logprob, "logprob", "float32", a.rows);
    a.rank = output<int32_t>(rank, "rank", "int32", a.rows);
    if (top_ids || top_logprobs) {
        require(top_ids && top_logprobs, "top_ids and top_logprobs go together");
        const Matrix2 top = matrix(*top_logprobs, "top_logprobs");
        require_dtype<int32_t>(*top_ids, "top_ids", "int32");
        require_ndim(*top_ids, 2, "top_ids");
        require_contiguous(*top_ids, "top_ids");
        require_contiguous(*top_logprobs, "top_logprobs");
        require(top.rows == a.rows && dim(*top_ids, 0) == a.rows && dim(*top_ids, 1) == top.cols,
                "top_ids and top_logprobs must be [rows, n], not " + shape_of(*top_ids) + " and " + shape_of(*top_logprobs));
        a.top_ids = static_cast<int32_t*>(top_ids->data());
        a.top_logprobs = top.data;
        a.top_width = top.cols;
    }
    for (int64_t i = 0; i < a.rows; ++i)
        require(a.num_logprobs[i] <= a.top_width,
                "num_logprobs[" + std::to_string(i) + "] is " + std::to_string(a.num_logprobs[i]) + ", but top_ids has room for " +
                    std::to_string(a.top_width));
}

void sample_tokens(const Array& logits_, const OutArray& tokens, const OutArray& status, const Array& temperature,
                   const Array& seed, const Array& position, const MaybeArray& top_k, const MaybeArray& top_p,
                   const MaybeArray& min_p, const MaybeArray& repetition, const MaybeArray& frequency,
                   const MaybeArray& presence, const MaybeArray& prompt_start, const MaybeArray& prompt_ids,
                   const MaybeArray& output_start, const MaybeArray& output_ids, const MaybeArray& bias_start,
                   const MaybeArray& bias_ids, const MaybeArray& bias_values, const MaybeArray& banned_start,
                   const MaybeArray& banned_ids, const MaybeArray& allowed_mask, const MaybeArray& mask_index,
                   const MaybeArray& num_logprobs,
                   const MaybeOut& logprob, const MaybeOut& rank, const MaybeOut& top_ids, const MaybeOut& top_logprobs) {
    const Matrix2 logits = matrix(logits_, "logits");
    const int64_t rows = logits.rows, vocab = logits.cols;
    require(vocab >= 1 && vocab < (int64_t{1} << 31), "logits must have at least one column");
    SampleArgs a{};
    a.logits = logits.data, a.rows = rows, a.vocab = vocab, a.stride = logits.stride;
    a.tokens = vector<int32_t>(tokens, "tokens", "int32", rows);
    a.status = vector<int32_t>(status, "status", "int32", rows);
    constexpr float kMax = 3.4028234663852886e38f;
    a.temperature = floats(temperature, "temperature", rows, 0, kMax);
    a.seed = vector<uint64_t>(seed, "seed", "uint64", rows);
    a.position = vector<int64_t>(position, "position", "int64", rows);
    a.top_k = top_k ? vector<int32_t>(*top_k, "top_k", "int32", rows) : nullptr;
    a.top_p = floats(top_p, "top_p", rows, 0, kMax);
    a.min_p = floats(min_p, "min_p", rows, 0, 1);
    a.repetition = floats(repetition, "repetition_penalty", rows, 1e-6f, kMax);
    a.frequency = floats(frequency, "frequency_penalty", rows, -kMax, kMax);
    a.presence = floats(presence, "presence_penalty", rows, -kMax, kMax);
    a.prompt = lists(prompt_start, prompt_ids, "prompt_ids", rows, vocab);
    a.output = lists(output_start, output_ids, "output_ids", rows, vocab);
    a.banned = lists(banned_start, banned_ids, "banned_ids", rows, vocab);
    a.bias = lists(bias_start, bias_ids, "bias_ids", rows, vocab);
    require(bias_ids.has_value() == bias_values.has_value(), "bias_ids and bias_values go together");
    if (bias_values) a.bias_values = floats(bias_values, "bias_values", dim(*bias_ids, 0), -INFINITY, kMax);
    if (allowed_mask) {
        const auto d = allowed_mask->dtype();
        if (d != nb::dtype<int32_t>() && d != nb::dtype<uint32_t>()) fail_type("allowed_mask must be an int32 or uint32 array");
        require_ndim(*allowed_mask, 2, "allowed_mask");
        require_contiguous(*allowed_mask, "allowed_mask");
        a.mask_stride = dim(*allowed_mask, 1);
        const int64_t masks = dim(*allowed_mask, 0);
        require((mask_index || masks == rows) && a.mask_stride * 32 >= vocab,
                "allowed_mask must have a bit for each token of each row, but is " + shape_of(*allowed_mask));
        a.mask = static_cast<const uint32_t*>(allowed_mask->data());
        if (mask_index) a.mask_index = vector<int32_t>(*mask_index, "mask_index", "int32", rows);
        for (int64_t i = 0; mask_index && i < rows; ++i)
            require(a.mask_index[i] >= -1 && a.mask_index[i] < masks,
                    "mask_index[" + std::to_string(i) + "] is " + std::to_string(a.mask_index[i]) + ", but there are " +
                        std::to_string(masks) + " masks");
    }
    if (num_logprobs) reports(a, *num_logprobs, logprob, rank, top_ids, top_logprobs);
    nb::gil_scoped_release release;
    sample(active_kernels(), a);
}

void score_tokens(const Array& logits_, const Array& tokens, const OutArray& status, const Array& num_logprobs,
                  const MaybeOut& logprob, const MaybeOut& rank, const MaybeOut& top_ids, const MaybeOut& top_logprobs) {
    const Matrix2 logits = matrix(logits_, "logits");
    require(logits.cols >= 1 && logits.cols < (int64_t{1} << 31), "logits must have at least one column");
    SampleArgs a{};
    a.logits = logits.data, a.rows = logits.rows, a.vocab = logits.cols, a.stride = logits.stride;
    a.given = vector<int32_t>(tokens, "tokens", "int32", a.rows);
    require_ids(a.given, a.rows, a.vocab, "tokens", "tokens of the vocabulary");
    a.status = vector<int32_t>(status, "status", "int32", a.rows);
    reports(a, num_logprobs, logprob, rank, top_ids, top_logprobs);
    nb::gil_scoped_release release;
    sample(active_kernels(), a);
}

}  // namespace

void bind_sampling(nb::module_& m) {
    const auto none = [](const char* name) { return nb::arg(name) = nb::none(); };
    m.def("sample", sample_tokens, nb::arg("logits"), nb::arg("tokens"), nb::arg("status"), nb::kw_only(),
          nb::arg("temperature"), nb::arg("seed"), nb::arg("position"), none("top_k"), none("top_p"), none("min_p"),
          none("repetition_penalty"), none("frequency_penalty"), none("presence_penalty"), none("prompt_start"),
          none("prompt_ids"), none("output_start"), none("output_ids"), none("bias_start"), none("bias_ids"),
          none("bias_values"), none("banned_start"), none("banned_ids"), none("allowed_mask"), none("mask_index"),
          none("num_logprobs"),
          none("logprob"), none("rank"), none("top_ids"), none("top_logprobs"));
    m.def("score", score_tokens, nb::arg("logits"), nb::arg("tokens"), nb::arg("status"), nb::kw_only(), nb::arg("num_logprobs"),
          nb::arg("logprob"), nb::arg("rank"), none("top_ids"), none("top_logprobs"));
    m.def("uniform", uniform, nb::arg("seed"), nb::arg("position"));
}

}  // namespace quire
