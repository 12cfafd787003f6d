// Where torch's tensors on the CPU lie: pieces of malloc that are 64 bytes longer, aligned in here (sparsify/native/tensor_memory.py).
//
// torch asks posix_memalign. In version 2.36 of the GNU C library that searches for the size plus the alignment and gives the rest
// back, so a tensor never fits where one of its own size has been: what is freed between pieces that stay is lost to it. malloc finds
// such a place.
//
// torch's C++ headers and not its stable ABI: a build serves one version of torch, which is part of its name.
#include <torch/headeronly/version.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr size_t kAlignment = 64;
constexpr uint8_t kPriority = 0;  // that of torch's own, so either may replace the other

// What malloc gave stands right before what torch gets.
void release(void* given) {
    if (given != nullptr) std::free(static_cast<void**>(given)[-1]);
}

struct TensorMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t nbytes) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (nbytes == 0) return {nullptr, nullptr, &release, cpu};
        constexpr size_t beside = kAlignment + sizeof(void*);
        void* found = nbytes > SIZE_MAX - beside ? nullptr : std::malloc(nbytes + beside);
        if (found == nullptr) throw std::bad_alloc();
        const uintptr_t first = reinterpret_cast<uintptr_t>(found) + beside;
        void** given = reinterpret_cast<void**>(first - first % kAlignment);
        given[-1] = found;
        return {given, given, &release, cpu};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, std::size_t nbytes) const override {
        default_copy_data(to, from, nbytes);
    }
};

TensorMemory ours;
c10::Allocator* before = nullptr;

}  // namespace

// Tensors that are made from now on lie in memory of malloc; those that are there keep theirs. Returns 0 where it was so before.
extern "C" int sparsify_use_malloc() {
    c10::Allocator* now = c10::GetCPUAllocator();
    if (now == &ours) return 0;
    before = now;
    c10::SetCPUAllocator(&ours, kPriority);
    return 1;
}

// Tensors that are made from now on lie where they did before `sparsify_use_malloc`.
extern "C" void sparsify_use_before() {
    if (c10::GetCPUAllocator() == &ours) c10::SetCPUAllocator(before, kPriority);
}
