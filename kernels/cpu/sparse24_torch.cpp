// The op `sparsify::sparse24_linear_cpu`, registered from C++ because a call through Python costs as much as a small product.
//
// Only torch's stable ABI is used, so one build serves later releases too. The product itself is a plain C function of
// another library (sparse24.cpp), handed in by `sparse24_set_kernel`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Kernel = int (*)(const void* packed, int64_t packed_bytes, const void* x, int type, int64_t rows, int64_t k,
                       int64_t ldx, const void* bias, int bias_type, void* y, int64_t n, int options);
Kernel kernel = nullptr;

int type_code(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::BFloat16:
            return 0;
        case ScalarType::Half:
            return 1;
        case ScalarType::Float:
            return 2;
        default:
            STD_TORCH_CHECK(false, "sparse24_linear_cpu: activations and bias must be bfloat16, float16 or float32");
    }
    return -1;
}

Tensor sparse24_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           int64_t out_features) {
    STD_TORCH_CHECK(kernel != nullptr, "sparse24_linear_cpu: the kernel is not loaded");
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims > 0, "sparse24_linear_cpu: x must have at least one dimension");
    const int64_t k = x.size(dims - 1);
    std::vector<int64_t> shape(dims);
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < dims; ++i) rows *= shape[i] = x.size(i);
    shape[dims - 1] = out_features;
    const bool strided = dims == 2 && x.stride(1) == 1 && x.stride(0) >= k;
    const Tensor input = strided || x.is_contiguous() ? x : torch::stable::contiguous(x);
    STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == out_features),
                    "sparse24_linear_cpu: bias must be contiguous, with one value per output");
    // The kernel checks a weight against its size in bytes; these make numel() that size.
    STD_TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == ScalarType::Byte,
                    "sparse24_linear_cpu: weight must be the contiguous bytes that the back end prepared");
    Tensor y = torch::stable::new_empty(input, shape);
    const int status = kernel(weight.const_data_ptr(), weight.numel(), input.const_data_ptr(), type_code(input), rows,
                              k, strided ? input.stride(0) : k, bias ? bias->const_data_ptr() : nullptr,
                              bias ? type_code(*bias) : 0, y.mutable_data_ptr(), out_features, 0);
    STD_TORCH_CHECK(status != 1, "sparse24_linear_cpu: x, weight and out_features do not belong together");
    STD_TORCH_CHECK(status != 2, "sparse24_linear_cpu: this processor cannot run the forced level");
    STD_TORCH_CHECK(status == 0, "sparse24_linear_cpu: out of memory");
    return y;
}

}  // namespace

extern "C" void sparse24_set_kernel(void* function) { kernel = reinterpret_cast<Kernel>(function); }

STABLE_TORCH_LIBRARY_FRAGMENT(sparsify, m) {
    m.def("sparse24_linear_cpu(Tensor x, Tensor weight, Tensor? bias, SymInt out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsify, CPU, m) { m.impl("sparse24_linear_cpu", TORCH_BOX(&sparse24_linear_cpu)); }
