// The scores of all blocks: fp32, higher is harder, NaN where a block has none; and intervals of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace mlfr {

struct Scores {
    const float* data;
    uint64_t n;

    float operator[](uint64_t i) const { return data[i]; }

    // Score of block i, or NaN; throws std::invalid_argument for an infinite one.
    float checked(uint64_t i) const {
        if (std::isinf(data[i])) {
            throw std::invalid_argument("scores: block " + std::to_string(i) +
                                        " has an infinite score; legal are finite ones, and NaN for none");
        }
        return data[i];
    }
};

// How many blocks have a score. Throws std::invalid_argument for an infinite one.
inline uint64_t count_seen(Scores scores, int threads) {
    std::vector<uint64_t> seen(num_chunks(scores.n), 0);
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t count = 0;
        for (uint64_t i = first; i < last; ++i) count += !std::isnan(scores.checked(i));
        seen[chunk] = count;
    });
    return std::accumulate(seen.begin(), seen.end(), uint64_t{0});
}

constexpr size_t kMaxIntervals = 64;

// The intervals that ascending cuts make: the number of a score is how many cuts are <= it.
class Intervals {
  public:
    explicit Intervals(const std::vector<double>& cuts) : count_(cuts.size() + 1) {
        if (count_ > kMaxIntervals) throw std::invalid_argument("cuts: at most 63");
        for (size_t c = 0; c < cuts.size(); ++c) {
            if (std::isnan(cuts[c]) || (c > 0 && cuts[c - 1] > cuts[c])) {
                throw std::invalid_argument("cuts: must ascend");
            }
        }
        while ((size_t{1} << levels_) < count_) ++levels_;
        // NaN is <= nothing: it fills up the tree of a search without branches.
        cuts_.assign(size_t{1} << levels_, std::numeric_limits<float>::quiet_NaN());
        for (size_t c = 0; c < cuts.size(); ++c) cuts_[c] = round_up(cuts[c]);
    }

    size_t count() const { return count_; }

    // Of NaN: 0.
    size_t of(float score) const {
        size_t number = 0;
        for (size_t step = size_t{1} << levels_ >> 1; step > 0; step >>= 1) {
            number += cuts_[number + step - 1] <= score ? step : 0;
        }
        return number;
    }

  private:
    // The smallest float that is >= cut: comparing with it is comparing with the cut.
    static float round_up(double cut) {
        const auto nearest = static_cast<float>(cut);
        if (static_cast<double>(nearest) >= cut) return nearest;
        return std::nextafter(nearest, std::numeric_limits<float>::infinity());
    }

    size_t count_;
    int levels_ = 0;
    std::vector<float> cuts_;
};

}  // namespace mlfr
