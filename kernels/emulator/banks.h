// Shared memory has 32 banks of 4 bytes that serve one row each at a time (CUDA C++ Programming Guide, "Shared memory"): what the
// lanes of a warp access together takes as many passes as one bank has different words to serve. Nothing here is refused; it
// is counted, because a layout without conflicts is a property of the source that no GPU is needed to see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace emulator {

// The accesses of one kind by one warp, for as long as its lanes run independently: the n-th of every lane belong together.
class WarpAccesses {
  public:
    void add(int lane, size_t offset) {
        const size_t index = next_[lane]++;
        if (index == accesses_.size()) accesses_.push_back({});
        accesses_[index].lanes |= 1u << lane;
        accesses_[index].offsets[lane] = offset;
    }

    // Passes beyond those that the bytes alone need, of all accesses since the last call.
    uint64_t take_conflicts(size_t bytes) {
        if (accesses_.empty()) return 0;
        uint64_t conflicts = 0;
        for (const Access& access : accesses_) conflicts += conflicts_of(access, bytes);
        accesses_.clear();
        std::fill(next_, next_ + 32, size_t(0));
        return conflicts;
    }

  private:
    struct Access {
        uint32_t lanes = 0;
        size_t offsets[32];
    };

    // 128 bytes are a pass: 32 lanes of up to 4 bytes, 16 of 8 or 8 of 16.
    static uint64_t conflicts_of(const Access& access, size_t bytes) {
        const int together = bytes <= 4 ? 32 : int(128 / bytes);
        uint64_t conflicts = 0;
        for (int first = 0; first < 32; first += together) {
            std::vector<size_t> words;
            for (int lane = first; lane < first + together; ++lane) {
                if (!(access.lanes >> lane & 1)) continue;
                const size_t begin = access.offsets[lane] / 4, end = (access.offsets[lane] + bytes + 3) / 4;
                for (size_t word = begin; word < end; ++word) words.push_back(word);
            }
            std::sort(words.begin(), words.end());
            words.erase(std::unique(words.begin(), words.end()), words.end());
            uint64_t in_bank[32] = {}, most = 1;
            for (const size_t word : words) most = std::max(most, ++in_bank[word % 32]);
            conflicts += most - 1;
        }
        return conflicts;
    }

    std::vector<Access> accesses_;
    size_t next_[32] = {};
};

}  // namespace emulator
