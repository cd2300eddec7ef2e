// Exact order statistics of 32-bit keys by a two-level radix histogram: two passes, no sorting, any number of
// threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace mlfr {

constexpr uint32_t kNoKey = 0xFFFFFFFFu;  // an item that takes no part

// Maps a float to a key of the same order; NaN has no key, and -0 is 0.
inline uint32_t float_key(float value) {
    if (std::isnan(value)) return kNoKey;
    value += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

inline float key_float(uint32_t key) {
    const uint32_t bits = (key & 0x80000000u) ? key & 0x7FFFFFFFu : ~key;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// How many items of [0, n) have each bin_of(i); an item of bin `bins` is not counted.
template <class BinOf>
std::vector<uint64_t> histogram(uint64_t n, uint64_t bins, int threads, BinOf bin_of) {
    std::vector<uint64_t> total(bins, 0);
    std::mutex lock;
    constexpr uint64_t kStride = 16 * kChunk;  // few merges; counts of a part fit 32 bits
    parallel_for(n / kStride + 1, threads, [&](uint64_t part) {
        std::vector<uint32_t> counts(bins + 1, 0);
        const uint64_t first = part * kStride;
        const uint64_t last = first + std::min(kStride, n - first);
        for (uint64_t i = first; i < last; ++i) ++counts[bin_of(i)];
        std::lock_guard<std::mutex> guard(lock);
        for (uint64_t b = 0; b < bins; ++b) total[b] += counts[b];
    });
    return total;
}

struct Cut {
    uint32_t key;    // the key at the asked rank
    uint64_t below;  // how many keys are smaller
};

// The key of rank `rank` (from 0) among the keys other than kNoKey; rank must be below their number.
template <class KeyOf>
Cut key_at_rank(uint64_t n, uint64_t rank, int threads, KeyOf key_of) {
    constexpr uint32_t kHalf = 1 << 16;
    auto locate = [](const std::vector<uint64_t>& counts, uint64_t& rank) {
        uint32_t b = 0;
        while (rank >= counts.at(b)) rank -= counts[b++];
        return b;
    };
    uint64_t rest = rank;
    const auto highs = histogram(n, kHalf, threads, [&](uint64_t i) {
        const uint32_t key = key_of(i);
        return key == kNoKey ? kHalf : key >> 16;
    });
    const uint32_t high = locate(highs, rest);
    const auto lows = histogram(n, kHalf, threads, [&](uint64_t i) {
        const uint32_t key = key_of(i);
        return key == kNoKey || key >> 16 != high ? kHalf : key & (kHalf - 1);
    });
    const uint32_t low = locate(lows, rest);
    return {(high << 16) | low, rank - rest};
}

enum class Side { kBelow, kAbove };

// One side of a cut: below it are the smaller keys and the first `quota` (in the order of ids) that equal it,
// above it all others. An emitter for shuffle_multiset.
template <class KeyOf>
class KeyFilter {
  public:
    KeyFilter(uint64_t n, uint32_t cut, uint64_t quota, Side side, int threads, KeyOf key_of)
        : cut_(cut), quota_(quota), side_(side), ties_before_(num_chunks(n)), key_of_(key_of) {
        for_chunks(n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
            uint64_t ties = 0;
            for (uint64_t i = first; i < last; ++i) ties += key_of_(i) == cut_;
            ties_before_[chunk] = ties;
        });
        std::exclusive_scan(ties_before_.begin(), ties_before_.end(), ties_before_.begin(), uint64_t{0});
    }

    template <class Sink>
    void operator()(uint64_t chunk, uint64_t first, uint64_t last, Sink&& sink) const {
        uint64_t ties = ties_before_[chunk];
        for (uint64_t i = first; i < last; ++i) {
            const uint32_t key = key_of_(i);
            const bool below = key < cut_ || (key == cut_ && ties++ < quota_);
            if (below == (side_ == Side::kBelow)) sink(i);
        }
    }

  private:
    uint32_t cut_;
    uint64_t quota_;
    Side side_;
    std::vector<uint64_t> ties_before_;
    KeyOf key_of_;
};

}  // namespace mlfr
