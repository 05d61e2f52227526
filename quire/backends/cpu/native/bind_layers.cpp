// Bindings of what a transformer layer is made of, outside attention.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "pack.h"
#include "threads.h"

namespace quire {
namespace {

const char* dtype_name(DType dtype) {
    return dtype == DType::f32 ? "float32" : dtype == DType::f16 ? "float16" : "bfloat16";
}

PackedLinear* pack_linear(const nb::object& weight) {
    std::vector<Array> arrays;
    if (nb::isinstance<nb::list>(weight) || nb::isinstance<nb::tuple>(weight)) {
        for (nb::handle item : weight) arrays.push_back(nb::cast<Array>(item));
    } else {
        arrays.push_back(nb::cast<Array>(weight));
    }
    require(!arrays.empty(), "weight: at least one matrix is needed");
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
    nb::gil_scoped_release release;
    return new PackedLinear(active_kernels(), parts, dtype);   // nanobind takes ownership
}

void linear(const PackedLinear& packed, const Array& x_, const OutArray& out_, const MaybeArray& bias, bool accumulate) {
    const Matrix2 x = matrix(x_, "x"), out = matrix(out_, "out");
    require(x.cols == packed.panels.k, "x must have " + std::to_string(packed.panels.k) + " columns, not " + shape_of(x_));
    require(out.rows == x.rows && out.cols == packed.panels.n,
            "out must be [" + std::to_string(x.rows) + ", " + std::to_string(packed.panels.n) + "], not " + shape_of(out_));
    const float* b = bias ? vector<float>(*bias, "bias", "float32", packed.panels.n) : nullptr;
    nb::gil_scoped_release release;
    LinearArgs args{packed.panels, x.data, out.data, b, x.rows, x.stride, out.stride, accumulate, nullptr, 0, 0};
    if (const PackedLinear* then = packed.then)
        args.then = then->panels.data, args.then_panels = then->count(), args.then_panel_bytes = then->nbytes / then->count();
    packed.kernels.linear(args);
}

void norm(const Array& x_, const Array& weight, const MaybeArray& bias, float eps, const OutArray& out_, bool centre) {
    const Heads x = heads(x_, "x"), out = heads(out_, "out");
    require(out.rows == x.rows && out.heads == x.heads && out.dim == x.dim && out_.ndim() == x_.ndim(),
            "out must have the shape of x, " + shape_of(x_) + ", not " + shape_of(out_));
    const float* w = vector<float>(weight, "weight", "float32", x.dim);
    const float* b = bias ? vector<float>(*bias, "bias", "float32", x.dim) : nullptr;
    nb::gil_scoped_release release;
    active_kernels().norm({x.data, out.data, w, b, x.rows, x.heads, x.dim, x.stride, x.head_stride, out.stride,
                           out.head_stride, eps, centre});
}

void rotary(const OutArray& x_, const Array& positions_, const Array& cos_, const Array& sin_) {
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
    require_ids(positions, x.rows, cos.rows, "positions", "rows of cos");
    nb::gil_scoped_release release;
    active_kernels().rotary({x.data, positions, cos.data, sin.data, x.rows, x.heads, cos.cols, x.stride, x.head_stride});
}

void activation(const Array& x_, const OutArray& out_, const std::string& kind, bool gated) {
    const Matrix2 x = matrix(x_, "x"), out = matrix(out_, "out");
    require(out.rows == x.rows && x.cols == (gated ? 2 : 1) * out.cols,
            std::string("x must be [m, ") + (gated ? "2 f" : "f") + "] for an out of [m, f]: " + shape_of(x_) + " and " +
                shape_of(out_));
    Activation k;
    if (kind == "silu") k = Activation::silu;
    else if (kind == "gelu") k = Activation::gelu;
    else if (kind == "gelu_tanh") k = Activation::gelu_tanh;
    else if (kind == "relu") k = Activation::relu;
    else fail("activation '" + kind + "' is unknown: choose one of silu, gelu, gelu_tanh, relu");
    nb::gil_scoped_release release;
    active_kernels().activation({x.data, out.data, x.rows, out.cols, x.stride, out.stride, k, gated});
}

void embed(const Array& ids_, const Array& table, const OutArray& out_, float scale, bool add) {
    const Matrix2 out = matrix(out_, "out");
    const DType dtype = float_dtype(table, "table");
    require_ndim(table, 2, "table");
    require_contiguous(table, "table");
    require(dim(table, 1) == out.cols, "table and out must have the same width: " + shape_of(table) + " and " + shape_of(out_));
    const int32_t* ids = vector<int32_t>(ids_, "ids", "int32", out.rows);
    require_ids(ids, out.rows, dim(table, 0), "ids", "rows of table");
    nb::gil_scoped_release release;
    active_kernels().embed({ids, table.data(), out.data, out.rows, out.cols, out.cols, out.stride, dtype, scale, add});
}

void convert(const Array& x, const OutArray& out) {
    const DType from = float_dtype(x, "x"), to = float_dtype(out, "out");
    require(x.size() == out.size(), "x and out must have the same size: " + shape_of(x) + " and " + shape_of(out));
    require_contiguous(x, "x");
    require_contiguous(out, "out");
    nb::gil_scoped_release release;
    active_kernels().convert({x.data(), out.data(), static_cast<int64_t>(x.size()), from, to});
}

}  // namespace

void bind_layers(nb::module_& m) {
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def_prop_ro("n", [](const PackedLinear& p) { return p.panels.n; })
        .def_prop_ro("k", [](const PackedLinear& p) { return p.panels.k; })
        .def_prop_ro("dtype", [](const PackedLinear& p) { return dtype_name(p.panels.dtype); })
        .def_prop_ro("nbytes", [](const PackedLinear& p) { return p.nbytes; })
        .def("set_then", [](PackedLinear& p, const PackedLinear& then) { p.then = &then; }, nb::arg("then"), nb::keep_alive<1, 2>())
        .def_prop_ro("isa", [](const PackedLinear& p) { return p.kernels.name; });
    m.def("pack_linear", pack_linear, nb::arg("weight"));
    m.def("linear", linear, nb::arg("packed"), nb::arg("x"), nb::arg("out"), nb::arg("bias") = nb::none(),
          nb::arg("accumulate") = false);
    m.def("rms_norm",
          [](const Array& x, const Array& weight, float eps, const OutArray& out) { norm(x, weight, {}, eps, out, false); },
          nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"));
    m.def("layer_norm",
          [](const Array& x, const Array& weight, const MaybeArray& bias, float eps, const OutArray& out) {
              norm(x, weight, bias, eps, out, true);
          },
          nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("eps"), nb::arg("out"));
    m.def("rotary", rotary, nb::arg("x"), nb::arg("positions"), nb::arg("cos"), nb::arg("sin"));
    m.def("activation", activation, nb::arg("x"), nb::arg("out"), nb::arg("kind"), nb::arg("gated") = false);
    m.def("embed",
          [](const Array& ids, const Array& table, const OutArray& out, float scale) { embed(ids, table, out, scale, false); },
          nb::arg("ids"), nb::arg("table"), nb::arg("out"), nb::arg("scale") = 1.0f);
    m.def("add_rows", [](const Array& ids, const Array& table, const OutArray& out) { embed(ids, table, out, 1.0f, true); },
          nb::arg("ids"), nb::arg("table"), nb::arg("out"));
    m.def("convert", convert, nb::arg("x"), nb::arg("out"));
}

}  // namespace quire
