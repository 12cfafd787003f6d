// The op `sparsify::sparse24_linear_cuda`, registered from C++ because a call through Python costs more than a small product.
//
// Only torch's stable ABI is used, so one build serves later releases too, and no CUDA header, so any C++ compiler makes it:
// the kernels (sparse24.cu) and torch's question for the current stream are C functions, handed in by
// `sparse24_set_cuda_kernels`. Output and workspace come from torch's allocator, which keeps streams apart; nothing
// synchronises, so a call can be captured into a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using PackedBytes = int64_t (*)(int64_t n, int64_t k, int64_t group_size);
using WorkspaceBytes = int64_t (*)(int64_t m, int64_t n, int64_t k, int64_t group_size, int sm_count, int config);
using Linear = int (*)(const void* x, int64_t ldx, int type, int64_t m, const void* packed, int64_t n, int64_t k,
                       int64_t group_size, int scale_type, const void* bias, void* y, void* workspace, int config,
                       int sm_count, void* stream);
using Decode = int (*)(const void* packed, int64_t n, int64_t k, int64_t group_size, int scale_type, int type,
                       void* weight, void* stream);
using CurrentStream = int32_t (*)(int32_t device, void** stream);

struct Kernels {
    PackedBytes packed_bytes = nullptr;
    WorkspaceBytes workspace_bytes = nullptr;
    Linear linear = nullptr;
    Decode decode = nullptr;
    CurrentStream current_stream = nullptr;  // null: the kernels run on the processor (tests)
    std::vector<int> sm_counts;              // of each device
    std::vector<int> dense_rows;  // of each device: from so many rows on, decode and multiply densely; 0: never
    int config = -1;              // a tile shape of the kernel; -1: as is best; -2: decode and multiply densely
};
Kernels kernels;

constexpr int kDecode = -2;

constexpr int64_t kAlignment = 16;  // bytes, of a row of x

int type_code(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::BFloat16:
            return 0;
        case ScalarType::Half:
            return 1;
        default:
            STD_TORCH_CHECK(false, "sparse24_linear_cuda: activations and bias must be bfloat16 or float16");
    }
    return -1;
}

bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0; }

// torch.nn.functional.linear
Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias)};
    const bool done = torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS;
    STD_TORCH_CHECK(done, "sparse24_linear_cuda: the dense product of the decoded weight failed");
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor sparse24_linear_cuda(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                            int64_t out_features, int64_t group_size, int64_t scale_type) {
    STD_TORCH_CHECK(kernels.linear != nullptr, "sparse24_linear_cuda: the kernels are not loaded");
    const bool on_gpu = kernels.current_stream != nullptr;
    STD_TORCH_CHECK(x.is_cuda() == on_gpu,
                    "sparse24_linear_cuda: x is not on the device that the kernels were built for");
    STD_TORCH_CHECK(same_device(x, packed) && (!bias || same_device(x, *bias)),
                    "sparse24_linear_cuda: x, weight and bias must be on the same device");
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims > 0, "sparse24_linear_cuda: x must have at least one dimension");
    const int64_t k = x.size(dims - 1);
    std::vector<int64_t> shape(dims);
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < dims; ++i) rows *= shape[i] = x.size(i);
    shape[dims - 1] = out_features;

    const int device = on_gpu ? x.get_device_index() : 0;
    STD_TORCH_CHECK(device >= 0 && device < static_cast<int>(kernels.sm_counts.size()),
                    "sparse24_linear_cuda: this device was not there when the kernels were loaded");
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    void* stream = nullptr;
    if (on_gpu) {
        guard.emplace(device);
        STD_TORCH_CHECK(kernels.current_stream(device, &stream) == 0, "sparse24_linear_cuda: no current CUDA stream");
    }

    const int type = type_code(x);
    STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == out_features && type_code(*bias) == type),
                    "sparse24_linear_cuda: bias must be contiguous, with one value per output, in the type of x");
    STD_TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && aligned(packed) &&
                        packed.numel() == kernels.packed_bytes(out_features, k, group_size),
                    "sparse24_linear_cuda: x, weight and out_features do not belong together");
    // Rows may lie apart, as slices of a larger tensor do, where the kernel can read them in whole 16-byte pieces.
    const bool strided = dims == 2 && x.stride(1) == 1 && x.stride(0) >= k && x.stride(0) % (kAlignment / 2) == 0;
    Tensor input = strided || x.is_contiguous() ? x : torch::stable::contiguous(x);
    if (!aligned(input)) input = torch::stable::clone(torch::stable::contiguous(input));
    const int64_t ldx = dims == 2 && rows > 1 ? input.stride(0) : k;

    if (rows == 0) return torch::stable::new_empty(x, shape);
    if (kernels.config == kDecode ||
        (kernels.config == -1 && kernels.dense_rows[device] > 0 && rows >= kernels.dense_rows[device])) {
        Tensor weight = torch::stable::new_empty(x, {out_features, k});
        const int status = kernels.decode(packed.const_data_ptr(), out_features, k, group_size,
                                          static_cast<int>(scale_type), type, weight.mutable_data_ptr(), stream);
        STD_TORCH_CHECK(status == 0, "sparse24_linear_cuda: the weight could not be decoded, status ", status);
        return dense_linear(x, weight, bias);
    }
    Tensor y = torch::stable::new_empty(x, shape);
    const int sm_count = kernels.sm_counts[device];
    const int64_t bytes = kernels.workspace_bytes(rows, out_features, k, group_size, sm_count, kernels.config);
    STD_TORCH_CHECK(bytes >= 0, "sparse24_linear_cuda: the kernel does not serve this shape");
    std::optional<Tensor> workspace;
    if (bytes > 0) workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    const int status =
        kernels.linear(input.const_data_ptr(), ldx, type, rows, packed.const_data_ptr(), out_features, k, group_size,
                       static_cast<int>(scale_type), bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                       workspace ? workspace->mutable_data_ptr() : nullptr, kernels.config, sm_count, stream);
    STD_TORCH_CHECK(status != 1, "sparse24_linear_cuda: the kernel does not serve these arguments");
    STD_TORCH_CHECK(status == 0, "sparse24_linear_cuda: CUDA refused to launch the kernel");
    return y;
}

}  // namespace

// The functions of sparse24.cu, torch's aoti_torch_get_current_cuda_stream (or null, see above), and for every device its number
// of multiprocessors and from how many rows on a weight is decoded (0: never).
extern "C" void sparse24_set_cuda_kernels(void* packed_bytes, void* workspace_bytes, void* linear, void* decode,
                                          void* current_stream, const int* sm_counts, const int* dense_rows,
                                          int devices) {
    kernels.packed_bytes = reinterpret_cast<PackedBytes>(packed_bytes);
    kernels.workspace_bytes = reinterpret_cast<WorkspaceBytes>(workspace_bytes);
    kernels.linear = reinterpret_cast<Linear>(linear);
    kernels.decode = reinterpret_cast<Decode>(decode);
    kernels.current_stream = reinterpret_cast<CurrentStream>(current_stream);
    kernels.sm_counts.assign(sm_counts, sm_counts + devices);
    kernels.dense_rows.assign(dense_rows, dense_rows + devices);
}

// Forces one of the kernel's tile shapes or, with -2, decoding, for checks and measurements; -1 takes what is best again.
extern "C" void sparse24_set_cuda_config(int config) { kernels.config = config; }

STABLE_TORCH_LIBRARY_FRAGMENT(sparsify, m) {
    m.def(
        "sparse24_linear_cuda(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, SymInt group_size, int "
        "scale_type)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsify, CUDA, m) { m.impl("sparse24_linear_cuda", TORCH_BOX(&sparse24_linear_cuda)); }
// Reached only where the kernels run on the processor; otherwise the check above says what is wrong.
STABLE_TORCH_LIBRARY_IMPL(sparsify, CPU, m) { m.impl("sparse24_linear_cuda", TORCH_BOX(&sparse24_linear_cuda)); }
