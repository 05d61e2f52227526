// Bindings of what a transformer layer is made of, outside attention.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "experts.h"
#include "pack.h"
#include "recording.h"

namespace quire {
namespace {

const char* dtype_name(const Panels& panels) {
    if (panels.bits) return panels.bits == 8 ? "int8" : panels.coding == Coding::mxfp4 ? "mxfp4" : "int4";
    return panels.dtype == DType::f32 ? "float32" : panels.dtype == DType::f16 ? "float16" : "bfloat16";
}

// Which groups there are for quantized weights, and that they divide k.
void require_group(const std::string& dtype, int64_t group, int64_t k) {
    if (dtype == "int8" && group == 0) return;
    const std::string whole = dtype == "int8" ? ", or 0 for one scale an output" : "";
    require(group == 32 || group == 64 || group == 128,
            "group_size is " + std::to_string(group) + ": choose 32, 64 or 128 for " + dtype + whole);
    if (k % group == 0) return;
    std::string choices;
    for (int64_t g : {32, 64, 128})
        if (k % g == 0) choices += (choices.empty() ? "" : " or ") + std::to_string(g);
    if (dtype == "int8") choices += choices.empty() ? "0" : " or 0";
    fail("group_size " + std::to_string(group) + " does not divide the " + std::to_string(k) + " inputs of this weight: " +
         (choices.empty() ? "none of 32, 64 and 128 does, take int8 with group_size 0 or leave it unquantized"
                          : "choose " + choices));
}

std::vector<Array> arrays_of(const nb::object& weight) {
    std::vector<Array> arrays;
    if (nb::isinstance<nb::list>(weight) || nb::isinstance<nb::tuple>(weight)) {
        for (nb::handle item : weight) arrays.push_back(nb::cast<Array>(item));
    } else {
        arrays.push_back(nb::cast<Array>(weight));
    }
    require(!arrays.empty(), "weight: at least one matrix is needed");
    return arrays;
}

void require_gated(const std::vector<Matrix>& parts, const std::vector<Array>& arrays) {
    require(parts.size() == 2 && parts[0].n == parts[1].n,
            "weight: gated takes two matrices of one shape, gate and up" +
                (parts.size() == 2 ? ": " + shape_of(arrays[0]) + " and " + shape_of(arrays[1])
                                   : ", not " + std::to_string(parts.size())));
}

PackedLinear* pack_linear(const nb::object& weight, const std::optional<std::string>& quantize, int64_t group, bool gated) {
    const std::vector<Array> arrays = arrays_of(weight);
    std::vector<Matrix> parts;
    const DType dtype = float_dtype(arrays[0], "weight");
    for (const Array& a : arrays) {
        if (float_dtype(a, "weight") != dtype) fail_type("weight: all matrices must have one dtype");
        require_ndim(a, 2, "weight");
        require(dim(a, 0) > 0 && dim(a, 1) > 0, "weight must not be empty, but is " + shape_of(a));
        require(a.shape(1) == arrays[0].shape(1),
                "weight: all matrices must have the same number of inputs: " + shape_of(arrays[0]) + " and " + shape_of(a));
        const int64_t size = size_of(dtype);
        parts.push_back({static_cast<const char*>(a.data()), dim(a, 0), dim(a, 1), stride(a, 0, dim(a, 1)) * size,
                         stride(a, 1, 1) * size});
    }
    if (gated) require_gated(parts, arrays);
    int64_t bits = 0;
    if (quantize) {
        require(*quantize == "int8" || *quantize == "int4", "quantize is '" + *quantize + "': choose int8, int4 or None");
        require_group(*quantize, group, parts[0].k);
        bits = *quantize == "int8" ? 8 : 4;
    } else {
        require(group == 0, "group_size is " + std::to_string(group) + ", but quantize is None: choose int8 or int4 to go with it");
    }
    nb::gil_scoped_release release;
    return new PackedLinear(active_kernels(), parts, dtype, bits, group, gated);   // nanobind takes ownership
}

struct FormatName { const char* name; Format format; int64_t values, bytes; };   // values and bytes of a block

constexpr FormatName kFormats[] = {
    {"Q4_0", Format::Q4_0, 32, 18},    {"Q4_1", Format::Q4_1, 32, 20},     {"Q5_0", Format::Q5_0, 32, 22},
    {"Q5_1", Format::Q5_1, 32, 24},    {"Q8_0", Format::Q8_0, 32, 34},     {"Q2_K", Format::Q2_K, 256, 84},
    {"Q3_K", Format::Q3_K, 256, 110},  {"Q4_K", Format::Q4_K, 256, 144},   {"Q5_K", Format::Q5_K, 256, 176},
    {"Q6_K", Format::Q6_K, 256, 210},  {"IQ4_NL", Format::IQ4_NL, 32, 18}, {"IQ4_XS", Format::IQ4_XS, 256, 136},
    {"MXFP4", Format::MXFP4, 32, 17},
};

const FormatName* format_named(const std::string& name) {
    for (const FormatName& each : kFormats)
        if (name == each.name) return &each;
    return nullptr;
}

struct BlocksName { const char* name; Format format; int64_t values, bytes, group; Coding coding; };   // of 4 bits

constexpr BlocksName kBlocks[] = {
    {"Q4_0", Format::Q4_0, 32, 18, 32, Coding::integers},
    {"Q4_1", Format::Q4_1, 32, 20, 32, Coding::offsets},
    {"Q4_K", Format::Q4_K, 256, 144, 32, Coding::offsets},
    {"MXFP4", Format::MXFP4, 32, 17, 32, Coding::mxfp4},
    {"int4:32", Format::Numbers, 32, 20, 32, Coding::integers},
    {"int4:64", Format::Numbers, 64, 36, 64, Coding::integers},
    {"int4:128", Format::Numbers, 128, 68, 128, Coding::integers},
    {"int4:32+offsets", Format::Numbers, 32, 24, 32, Coding::offsets},
    {"int4:64+offsets", Format::Numbers, 64, 40, 64, Coding::offsets},
    {"int4:128+offsets", Format::Numbers, 128, 72, 128, Coding::offsets},
    {"mxfp4", Format::Numbers, 32, 20, 32, Coding::mxfp4},
};

const BlocksName& blocks_named(const std::string& name) {
    std::string names;
    for (const BlocksName& each : kBlocks) {
        if (name == each.name) return each;
        names += std::string(names.empty() ? "" : ", ") + each.name;
    }
    fail("format '" + name + "' can't be packed as it is: choose one of " + names);
}

PackedLinear* pack_blocks(const nb::object& blocks, const std::string& name, bool gated) {
    const BlocksName* format = &blocks_named(name);
    const std::vector<Array> arrays = arrays_of(blocks);
    std::vector<Matrix> parts;
    for (const Array& a : arrays) {
        require_dtype<uint8_t>(a, "blocks", "uint8");
        require_ndim(a, 2, "blocks");
        require(dim(a, 0) > 0 && dim(a, 1) > 0 && dim(a, 1) % format->bytes == 0 && a.shape(1) == arrays[0].shape(1),
                "blocks of " + name + " are rows of one length, of " + std::to_string(format->bytes) + " bytes for " +
                    std::to_string(format->values) + " values, not " + shape_of(a));
        require(stride(a, 1, 1) == 1, "blocks: the bytes of a row must follow one another");
        parts.push_back({static_cast<const char*>(a.data()), dim(a, 0), dim(a, 1) / format->bytes * format->values,
                         stride(a, 0, dim(a, 1)), 1});
    }
    if (gated) require_gated(parts, arrays);
    nb::gil_scoped_release release;
    return new PackedLinear(active_kernels(), parts, format->format, format->group, format->coding, gated);
}

bool dequantize(const Array& blocks, const std::string& name, const OutArray& out) {
    const FormatName* const format = format_named(name);
    if (!format) return false;
    require_dtype<uint8_t>(blocks, "blocks", "uint8");
    require_ndim(blocks, 2, "blocks");
    require_ndim(out, 2, "out");
    if (float_dtype(out, "out") != DType::f16) fail_type("out must be a float16 array");
    require_contiguous(out, "out");
    require(stride(blocks, 1, 1) == 1, "blocks: the bytes of a row must follow one another");
    require(dim(blocks, 0) == dim(out, 0) && dim(blocks, 1) % format->bytes == 0 &&
                dim(blocks, 1) / format->bytes * format->values == dim(out, 1),
            "blocks of " + name + " are " + std::to_string(format->bytes) + " bytes for " + std::to_string(format->values) + " values: " +
                shape_of(blocks) + " and out " + shape_of(out));
    const DequantizeArgs args{static_cast<const uint8_t*>(blocks.data()), static_cast<f16*>(out.data()), dim(out, 0), dim(out, 1),
                              stride(blocks, 0, dim(blocks, 1)), format->format};
    nb::gil_scoped_release release;
    active_kernels().dequantize(args);
    return true;
}

PackedLinear* load_packed(const Array& data, int64_t n, int64_t k, const std::string& dtype, int64_t group, bool gated, bool offsets) {
    const Kernels& kernels = active_kernels();
    constexpr int64_t kMost = int64_t{1} << 30;   // so that no size overflows
    require(n > 0 && k > 0 && n < kMost && k < kMost,
            "n and k must be positive, and below 2^30: " + std::to_string(n) + " and " + std::to_string(k));
    require(!offsets || dtype == "int4", "offsets are for int4 weights, not for " + dtype);
    const Coding coding = offsets ? Coding::offsets : dtype == "mxfp4" ? Coding::mxfp4 : Coding::integers;
    Panels panels{data.data(), DType::f32, n, k, kernels.panel, 0, group, gated, coding};
    if (dtype == "mxfp4") {
        require(group == 32 && k % 32 == 0, "mxfp4 weights have groups of 32 inputs: group_size is " + std::to_string(group) + ", and k " +
                                                std::to_string(k));
        panels.bits = 4;
    } else if (dtype == "int8" || dtype == "int4") {
        require_group(dtype, group, k);
        panels.bits = dtype == "int8" ? 8 : 4;
    } else {
        if (dtype == "float16") panels.dtype = DType::f16;
        else if (dtype == "bfloat16") panels.dtype = DType::bf16;
        else require(dtype == "float32", "dtype '" + dtype + "' is unknown: choose float32, float16, bfloat16, int8, int4 or mxfp4");
        require(group == 0, "group_size is " + std::to_string(group) + ", but " + dtype + " weights have no groups: leave it at 0");
    }
    vector<uint8_t>(data, "data", "uint8", packed_bytes(panels));
    require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "data must be 64-byte aligned");
    return new PackedLinear(kernels, panels);
}

// A view of the packed bytes that keeps their owner alive.
nb::object packed_data(nb::handle self) {
    const auto& p = nb::cast<const PackedLinear&>(self);
    using View = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
    return nb::cast(View(p.panels.data, {static_cast<size_t>(p.nbytes)}, self));
}

Activation activation_named(const std::optional<std::string>& name, bool gated) {
    if (!name) return Activation::none;
    if (*name == "silu") return Activation::silu;
    if (*name == "gelu") return Activation::gelu;
    if (*name == "gelu_tanh") return Activation::gelu_tanh;
    if (*name == "relu") return Activation::relu;
    if (*name == "swiglu_oai") {
        require(gated, "activation 'swiglu_oai' is for gated linears");
        return Activation::swiglu_oai;
    }
    fail("activation '" + *name + "' is unknown: choose silu, gelu, gelu_tanh, relu, swiglu_oai or None");
}

void linear(const nb::object& self, const Array& x_, const OutArray& out_, const MaybeArray& bias, bool accumulate,
            const std::optional<std::string>& activation) {
    const auto& packed = nb::cast<const PackedLinear&>(self);
    const Matrix2 x = matrix(x_, "x"), out = matrix(out_, "out");
    require(x.cols == packed.panels.k, "x must have " + std::to_string(packed.panels.k) + " columns, not " + shape_of(x_));
    require(out.rows == x.rows && out.cols == packed.panels.n,
            "out must be [" + std::to_string(x.rows) + ", " + std::to_string(packed.panels.n) + "], not " + shape_of(out_));
    const float* b = bias ? vector<float>(*bias, "bias", "float32", (packed.panels.gated ? 2 : 1) * packed.panels.n) : nullptr;
    const Activation kind = activation_named(activation, packed.panels.gated);
    LinearArgs args{packed.panels, x.data, out.data, b, x.rows, x.stride, out.stride, accumulate, kind, nullptr, 0, 0, Reading::slices,
                    nullptr, 0};
    if (packed.then) packed.then->follow(args, packed.then->panels.data);
    if (x.rows == 0) return;
    run_kernel([=, &packed] {
        packed.readings.read(args.m, 1, [&](Reading reading) { packed.run(args, reading); });
    }, self, x_, out_, bias);
}

std::vector<PackedLinear*> linears_of(const nb::tuple& list, const char* name) {
    std::vector<PackedLinear*> linears;
    for (nb::handle item : list) linears.push_back(&nb::cast<PackedLinear&>(item));
    require(!linears.empty(), std::string(name) + ": at least one expert is needed");
    const Panels& first = linears[0]->panels;
    for (const PackedLinear* each : linears) {
        const Panels& p = each->panels;
        require(p.n == first.n && p.k == first.k && p.dtype == first.dtype && p.bits == first.bits && p.group == first.group &&
                    p.gated == first.gated && p.coding == first.coding && &each->kernels == &linears[0]->kernels,
                std::string(name) + ": the linears of all experts must be alike");
    }
    return linears;
}

// Of all experts, [experts, outputs] or, gated, [experts, 2 * outputs].
std::vector<float> biases_of(const MaybeArray& array, const char* name, const std::vector<PackedLinear*>& linears) {
    if (!array) return {};
    const Matrix2 m = matrix(*array, name);
    const int64_t columns = (linears[0]->panels.gated ? 2 : 1) * linears[0]->panels.n;
    require(m.rows == static_cast<int64_t>(linears.size()) && m.cols == columns,
            std::string(name) + " must be [" + std::to_string(linears.size()) + ", " + std::to_string(columns) + "], not " + shape_of(*array));
    std::vector<float> all;
    for (int64_t row = 0; row < m.rows; ++row) all.insert(all.end(), m.data + row * m.stride, m.data + row * m.stride + m.cols);
    return all;
}

void make_experts(Experts* self, const nb::tuple& up_, const nb::tuple& down_, int64_t taken, bool sum_to_one, const MaybeArray& up_bias,
                  const MaybeArray& down_bias, const MaybeArray& correction, bool sigmoid, float scale) {
    const std::vector<PackedLinear*> up = linears_of(up_, "up"), down = linears_of(down_, "down");
    require(up.size() == down.size(), "up and down must have as many experts: " + std::to_string(up.size()) + " and " +
                                          std::to_string(down.size()));
    require(up[0]->panels.n == down[0]->panels.k && down[0]->panels.n == up[0]->panels.k,
            "down must be [" + std::to_string(up[0]->panels.k) + ", " + std::to_string(up[0]->panels.n) + "], not [" +
                std::to_string(down[0]->panels.n) + ", " + std::to_string(down[0]->panels.k) + "]");
    require(taken >= 1 && taken <= static_cast<int64_t>(up.size()),
            "taken is " + std::to_string(taken) + ": choose from 1 to the " + std::to_string(up.size()) + " experts");
    Choice choice{taken, sum_to_one, sigmoid, scale, {}};
    if (correction) {
        const float* each = vector<float>(*correction, "correction", "float32", static_cast<int64_t>(up.size()));
        choice.correction.assign(each, each + up.size());
    }
    new (self) Experts(up, down, std::move(choice), biases_of(up_bias, "up_bias", up), biases_of(down_bias, "down_bias", down));
}

void run_experts(const nb::object& self, const Array& x_, const Array& scores_, const OutArray& out_, const OutArray& rows_,
                 const OutArray& inner_, bool accumulate, const std::optional<std::string>& activation) {
    const auto& experts = nb::cast<const Experts&>(self);
    const Matrix2 x = matrix(x_, "x"), scores = matrix(scores_, "scores"), out = matrix(out_, "out"), rows = matrix(rows_, "rows"),
                  inner = matrix(inner_, "inner");
    const int64_t hidden = experts.up().panels.k, intermediate = experts.up().panels.n;
    const auto shaped = [&](const Matrix2& m, const char* name, const auto& array, int64_t m_rows, int64_t cols) {
        require(m.rows == m_rows && m.cols == cols, std::string(name) + " must be [" + std::to_string(m_rows) + ", " + std::to_string(cols) +
                                                        "], not " + shape_of(array));
    };
    shaped(x, "x", x_, x.rows, hidden);
    shaped(scores, "scores", scores_, x.rows, experts.count());
    shaped(out, "out", out_, x.rows, hidden);
    shaped(rows, "rows", rows_, x.rows * experts.taken(), hidden);
    shaped(inner, "inner", inner_, x.rows * experts.taken(), intermediate);
    const Experts::Args args{x.data, scores.data, out.data, rows.data, inner.data, x.rows, x.stride, scores.stride, out.stride, rows.stride,
                             inner.stride, accumulate, activation_named(activation, experts.up().panels.gated)};
    run_kernel([args, &experts] { experts.run(args); }, self, x_, scores_, out_, rows_, inner_);
}

void norm(const Array& x_, const Array& weight, const MaybeArray& bias, float eps, const OutArray& out_, bool centre, bool accumulate) {
    const Heads x = heads(x_, "x"), out = heads(out_, "out");
    require(out.rows == x.rows && out.heads == x.heads && out.dim == x.dim && out_.ndim() == x_.ndim(),
            "out must have the shape of x, " + shape_of(x_) + ", not " + shape_of(out_));
    const float* w = vector<float>(weight, "weight", "float32", x.dim);
    const float* b = bias ? vector<float>(*bias, "bias", "float32", x.dim) : nullptr;
    const NormArgs args{x.data, out.data, w, b, x.rows, x.heads, x.dim, x.stride, x.head_stride, out.stride, out.head_stride, eps, centre,
                        accumulate};
    run_kernel([args, kernel = active_kernels().norm] { kernel(args); }, x_, weight, bias, out_);
}

void rotary(const OutArray& x_, const Array& positions_, const Array& cos_, const Array& sin_, const MaybeArray& scale_) {
    const Heads x = heads(x_, "x");
    require_ndim(x_, 3, "x");
    const Matrix2 cos = matrix(cos_, "cos"), sin = matrix(sin_, "sin");
    require_contiguous(cos_, "cos");
    require_contiguous(sin_, "sin");
    require(cos.rows == sin.rows && cos.cols == sin.cols,
            "cos and sin must have one shape: " + shape_of(cos_) + " and " + shape_of(sin_));
    require(2 * cos.cols <= x.dim, "cos has " + std::to_string(cos.cols) + " columns: at most half of head_dim " +
                                       std::to_string(x.dim) + " can be rotated");
    const int32_t* positions = vector<int32_t>(positions_, "positions", "int32", x.rows);
    const float* scale = scale_ ? vector<float>(*scale_, "scale", "float32", cos.rows) : nullptr;
    const RotaryArgs args{x.data, positions, cos.data, sin.data, x.rows, x.heads, cos.cols, x.stride, x.head_stride, scale};
    run_kernel([args, limit = cos.rows, kernel = active_kernels().rotary] {
        require_ids(args.positions, args.m, limit, "positions", "rows of cos");
        kernel(args);
    }, x_, positions_, cos_, sin_, scale_);
}

void embed(const Array& ids_, const Array& table, const OutArray& out_, float scale, bool add) {
    const Matrix2 out = matrix(out_, "out");
    const DType dtype = float_dtype(table, "table");
    require_ndim(table, 2, "table");
    require_contiguous(table, "table");
    require(dim(table, 1) == out.cols, "table and out must have the same width: " + shape_of(table) + " and " + shape_of(out_));
    const int32_t* ids = vector<int32_t>(ids_, "ids", "int32", out.rows);
    const EmbedArgs args{ids, table.data(), out.data, out.rows, out.cols, out.cols, out.stride, dtype, scale, add};
    run_kernel([args, limit = dim(table, 0), kernel = active_kernels().embed] {
        require_ids(args.ids, args.m, limit, "ids", "rows of table");
        kernel(args);
    }, ids_, table, out_);
}

void convert(const Array& x, const OutArray& out) {
    const DType from = float_dtype(x, "x"), to = float_dtype(out, "out");
    require(x.size() == out.size(), "x and out must have the same size: " + shape_of(x) + " and " + shape_of(out));
    require_contiguous(x, "x");
    require_contiguous(out, "out");
    const ConvertArgs args{x.data(), out.data(), static_cast<int64_t>(x.size()), from, to};
    run_kernel([args, kernel = active_kernels().convert] { kernel(args); }, x, out);
}

void softcap(const OutArray& x_, float cap) {
    const Matrix2 x = matrix(x_, "x");
    require(cap > 0, "cap must be above 0, not " + std::to_string(cap));
    const SoftcapArgs args{x.data, x.rows, x.cols, x.stride, cap};
    run_kernel([args, kernel = active_kernels().softcap] { kernel(args); }, x_);
}

}  // namespace

void bind_layers(nb::module_& m) {
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def_prop_ro("n", [](const PackedLinear& p) { return p.panels.n; })
        .def_prop_ro("k", [](const PackedLinear& p) { return p.panels.k; })
        .def_prop_ro("dtype", [](const PackedLinear& p) { return dtype_name(p.panels); })
        .def_prop_ro("gated", [](const PackedLinear& p) { return p.panels.gated; })
        .def_prop_ro("offsets", [](const PackedLinear& p) { return p.panels.coding == Coding::offsets; })
        .def_prop_ro("group_size", [](const PackedLinear& p) { return p.panels.group; })
        .def_prop_ro("panel", [](const PackedLinear& p) { return p.panels.panel; })
        .def_prop_ro("data", packed_data)
        .def_prop_ro("nbytes", [](const PackedLinear& p) { return p.nbytes; })
        .def("set_then", [](PackedLinear& p, const PackedLinear& then) { p.then = &then; }, nb::arg("then"), nb::keep_alive<1, 2>())
        .def_prop_ro("isa", [](const PackedLinear& p) { return p.kernels.name; });
    nb::class_<Experts>(m, "Experts")
        .def("__init__", make_experts, nb::arg("up"), nb::arg("down"), nb::arg("taken"), nb::arg("sum_to_one"),
             nb::arg("up_bias") = nb::none(), nb::arg("down_bias") = nb::none(), nb::arg("correction") = nb::none(),
             nb::arg("sigmoid") = false, nb::arg("scale") = 1.0f, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def_prop_ro("count", [](const Experts& e) { return e.count(); })
        .def_prop_ro("taken", [](const Experts& e) { return e.taken(); })
        .def_prop_ro("dtype", [](const Experts& e) { return dtype_name(e.up().panels); })
        .def_prop_ro("gated", [](const Experts& e) { return e.up().panels.gated; })
        .def_prop_ro("nbytes", [](const Experts& e) { return e.nbytes(); })
        .def("set_then", [](Experts& e, const PackedLinear& then) { e.then = &then; }, nb::arg("then"), nb::keep_alive<1, 2>());
    m.def("experts", run_experts, nb::arg("experts"), nb::arg("x"), nb::arg("scores"), nb::arg("out"), nb::arg("rows"), nb::arg("inner"),
          nb::arg("accumulate") = false, nb::arg("activation") = nb::none());
    m.def("pack_linear", pack_linear, nb::arg("weights"), nb::arg("quantize") = nb::none(), nb::arg("group_size") = 0,
          nb::arg("gated") = false);
    m.def("load_packed", load_packed, nb::arg("data"), nb::arg("n"), nb::arg("k"), nb::arg("dtype"), nb::arg("group_size") = 0,
          nb::arg("gated") = false, nb::arg("offsets") = false, nb::keep_alive<0, 1>());
    m.def("pack_blocks", pack_blocks, nb::arg("blocks"), nb::arg("format"), nb::arg("gated") = false);
    m.def("dequantize", dequantize, nb::arg("blocks"), nb::arg("format"), nb::arg("out"));
    m.def("panel", [] { return active_kernels().panel; });
    m.def("linear", linear, nb::arg("packed"), nb::arg("x"), nb::arg("out"), nb::arg("bias") = nb::none(),
          nb::arg("accumulate") = false, nb::arg("activation") = nb::none());
    m.def("rms_norm",
          [](const Array& x, const Array& weight, float eps, const OutArray& out, bool accumulate) {
              norm(x, weight, {}, eps, out, false, accumulate);
          },
          nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"), nb::arg("accumulate") = false);
    m.def("layer_norm",
          [](const Array& x, const Array& weight, const MaybeArray& bias, float eps, const OutArray& out) {
              norm(x, weight, bias, eps, out, true, false);
          },
          nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("eps"), nb::arg("out"));
    m.def("rotary", rotary, nb::arg("x"), nb::arg("positions"), nb::arg("cos"), nb::arg("sin"), nb::arg("scale") = nb::none());
    m.def("embed",
          [](const Array& ids, const Array& table, const OutArray& out, float scale) { embed(ids, table, out, scale, false); },
          nb::arg("ids"), nb::arg("table"), nb::arg("out"), nb::arg("scale") = 1.0f);
    m.def("add_rows", [](const Array& ids, const Array& table, const OutArray& out) { embed(ids, table, out, 1.0f, true); },
          nb::arg("ids"), nb::arg("table"), nb::arg("out"));
    m.def("softcap", softcap, nb::arg("x"), nb::arg("cap"));
    m.def("convert", convert, nb::arg("x"), nb::arg("out"));
}

}  // namespace quire
