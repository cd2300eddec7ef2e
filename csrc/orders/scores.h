// The scores of all blocks (fp32, higher is harder, NaN where a block has none), and intervals of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"

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
    const auto seen = map_chunks(scores.n, threads, [scores](uint64_t first, uint64_t last) {
        uint64_t count = 0;
        for (uint64_t i = first; i < last; ++i) count += !std::isnan(scores.checked(i));
        return count;
    });
    return std::accumulate(seen.begin(), seen.end(), uint64_t{0});
}

struct ScoreRange {
    float low = std::numeric_limits<float>::infinity();
    float high = -std::numeric_limits<float>::infinity();
    uint64_t seen = 0;

    void merge(const ScoreRange& other) {
        low = std::min(low, other.low);
        high = std::max(high, other.high);
        seen += other.seen;
    }
};

// Some loops over scores are written with vector types, since compilers do not vectorize comparisons in which
// NaN may occur.
constexpr uint64_t kLanes = 4;
using FloatVector = float __attribute__((vector_size(16)));
using IntVector = int32_t __attribute__((vector_size(16)));

// Range and number of the scores among `count`, which is below 2^32.
inline ScoreRange find_range(const float* scores, uint64_t count) {
    ScoreRange range;
    FloatVector low = FloatVector{} + range.low, high = FloatVector{} + range.high;
    uint64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
        FloatVector score;
        std::memcpy(&score, scores + j, sizeof score);
        low = score < low ? score : low;  // NaN fails every comparison
        high = score > high ? score : high;
    }
    auto take = [&range](float lowest, float highest) {
        range.low = lowest < range.low ? lowest : range.low;
        range.high = highest > range.high ? highest : range.high;
    };
    for (uint64_t lane = 0; lane < kLanes; ++lane) take(low[lane], high[lane]);
    for (; j < count; ++j) take(scores[j], scores[j]);
    uint32_t seen = 0;
    for (j = 0; j < count; ++j) seen += !std::isnan(scores[j]);
    range.seen = seen;
    return range;
}

// Range and number of all scores. Throws std::invalid_argument for an infinite one.
inline ScoreRange find_range(Scores scores, int threads) {
    const auto parts = map_chunks(scores.n, threads, [scores](uint64_t first, uint64_t last) {
        return find_range(scores.data + first, last - first);
    });
    ScoreRange range;
    for (const ScoreRange& part : parts) range.merge(part);
    if (range.seen > 0 && (std::isinf(range.low) || std::isinf(range.high))) count_seen(scores, threads);
    return range;
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
        // No score is >= NaN, so NaN can fill up the tree of a search without branches.
        cuts_.assign(size_t{1} << levels_, std::numeric_limits<float>::quiet_NaN());
        for (size_t c = 0; c < cuts.size(); ++c) cuts_[c] = round_up(cuts[c]);
    }

    size_t count() const { return count_; }

    // The upper bound (exclusive) of the scores of an interval; infinite for the last one.
    float upper_edge(size_t number) const {
        return number + 1 < count_ ? cuts_[number] : std::numeric_limits<float>::infinity();
    }

    // The number of the interval of a score; 0 for NaN.
    size_t of(float score) const {
        size_t number = 0;
        for (size_t step = size_t{1} << levels_ >> 1; step > 0; step >>= 1) {
            number += cuts_[number + step - 1] <= score ? step : 0;
        }
        return number;
    }

    // The numbers of the intervals of a batch of scores; `of_none` for NaN.
    void read(const float* scores, uint64_t count, uint32_t of_none, uint32_t* numbers) const {
        uint64_t j = 0;
        if (levels_ <= 4) {                   // with few cuts, comparing with all of them is faster
            constexpr uint64_t kVectors = 2;  // so that each hides the latency of the other
            const IntVector none = IntVector{} + static_cast<int32_t>(of_none);
            for (; j + kVectors * kLanes <= count; j += kVectors * kLanes) {
                FloatVector score[kVectors];
                IntVector number[kVectors] = {};
                std::memcpy(score, scores + j, sizeof score);
                for (size_t c = 0; c + 1 < count_; ++c) {
                    const FloatVector cut = FloatVector{} + cuts_[c];
                    for (uint64_t v = 0; v < kVectors; ++v) number[v] -= cut <= score[v];
                }
                for (uint64_t v = 0; v < kVectors; ++v) number[v] = score[v] == score[v] ? number[v] : none;
                std::memcpy(numbers + j, number, sizeof number);
            }
        }
        for (; j < count; ++j) {
            numbers[j] = std::isnan(scores[j]) ? of_none : static_cast<uint32_t>(of(scores[j]));
        }
    }

  private:
    // The smallest float that is >= cut: scores compare with it as they do with the cut.
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
