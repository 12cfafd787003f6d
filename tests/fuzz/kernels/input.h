// What the fuzzers of kernels/cpu have in common: numbers taken off libFuzzer's input, and memory that ends where it should.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

#define EXPECT(condition)                                                                  \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                  \
        }                                                                                  \
    } while (0)

// The bytes of one input, taken from the front; zeros when they have run out.
class Input {
  public:
    Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    uint8_t byte() { return size_ ? (--size_, *data_++) : 0; }
    // A number of `least` ... `most`, from two bytes.
    int64_t number(int64_t least, int64_t most) {
        const int64_t high = byte();
        return least + (high << 8 | byte()) % (most - least + 1);
    }
    template <size_t N>
    int64_t one_of(const int64_t (&values)[N]) {
        return values[byte() % N];
    }
    bool yes() { return byte() & 1; }

    // Fills memory with what is left of the input, again and again, each time changed a little.
    void fill(void* to, size_t bytes) {
        uint32_t state = 2463534242u + byte();
        for (size_t i = 0; i < bytes; ++i) {
            state ^= state << 13, state ^= state >> 17, state ^= state << 5;
            static_cast<uint8_t*>(to)[i] = uint8_t(size_ ? data_[i % size_] ^ (i < size_ ? 0 : state) : state);
        }
    }
    // The same as finite numbers around 1. size: 4 for fp32, 2 for others; top: the upper byte of such a number.
    void numbers(void* to, size_t bytes, size_t size, int top) {
        fill(to, bytes);
        for (size_t i = size - 1; i < bytes; i += size) {
            uint8_t& upper = static_cast<uint8_t*>(to)[i];
            upper = uint8_t((upper & 0x80) | top);
        }
    }
    size_t left() const { return size_; }
    const uint8_t* rest() const { return data_; }

  private:
    const uint8_t* data_;
    size_t size_;
};

// Memory that the sanitizer watches, or, since it does not see masked vectors and AMX tiles, memory at the end of a page that
// an unreadable one follows.
class Memory {
  public:
    Memory(bool guarded, size_t bytes, bool aligned = false) : bytes_(bytes) {
        if (guarded) {
            mapped_ = (bytes + kPage - 1) / kPage * kPage + kPage;
            start_ = static_cast<uint8_t*>(
                mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (start_ == MAP_FAILED || mprotect(start_ + mapped_ - kPage, kPage, PROT_NONE)) std::abort();
            data_ = start_ + mapped_ - kPage - bytes;
        } else {
            void* found = nullptr;
            if (aligned ? posix_memalign(&found, 64, bytes) : !(found = std::malloc(bytes ? bytes : 1))) std::abort();
            data_ = static_cast<uint8_t*>(found);
        }
        std::memset(data_, 0, bytes);
    }
    ~Memory() {
        if (start_)
            munmap(start_, mapped_);
        else
            std::free(data_);
    }
    Memory(const Memory&) = delete;

    uint8_t* data() const { return data_; }
    float* floats() const { return reinterpret_cast<float*>(data_); }
    size_t bytes() const { return bytes_; }

  private:
    static constexpr size_t kPage = 4096;
    size_t bytes_, mapped_ = 0;
    uint8_t* start_ = nullptr;
    uint8_t* data_ = nullptr;
};

// The level of SPARSIFY_CPU_LEVEL by its number, -1 where it is not set: each input then chooses its own.
inline int forced_level() {
    const char* const names[] = {"portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"};
    const char* const asked = std::getenv("SPARSIFY_CPU_LEVEL");
    for (int level = 0; asked && level < 6; ++level)
        if (!std::strcmp(asked, names[level])) return level;
    return -1;
}
