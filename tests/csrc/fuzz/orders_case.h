// What the targets of the orders share: scores to order, and how the samples of an order are counted.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "orders_input.h"

namespace fuzz {

// Now and then many.
inline uint64_t take_samples(Reader& reader) {
    const uint64_t number = reader.take<uint16_t>();
    return number < 4096 ? 5 * number : number % 300;
}

struct Case {
    std::vector<float> scores;
    int threads;
    uint64_t seed;

    mlfr::Scores view() const { return {scores.data(), scores.size()}; }
    uint64_t seen() const {
        return static_cast<uint64_t>(
            std::count_if(scores.begin(), scores.end(), [](float score) { return !std::isnan(score); }));
    }
    bool finite() const {
        return std::none_of(scores.begin(), scores.end(), [](float score) { return std::isinf(score); });
    }
};

// Draws by make(threads, out) with both types of ids and two numbers of threads; how often each block was
// drawn.
template <class Make>
std::vector<uint64_t> sample_counts(const Case& input, uint64_t samples, Make make) {
    std::vector<uint32_t> ids(samples);
    std::vector<uint64_t> wide(samples);
    make(1, ids.data());
    make(input.threads, wide.data());
    require(std::equal(ids.begin(), ids.end(), wide.begin()),
            "neither threads nor the type of ids change an order");
    require(mlfr::order_hash(ids.data(), samples, 1) == mlfr::order_hash(wide.data(), samples, input.threads),
            "order_hash");
    std::vector<uint64_t> counts(input.scores.size(), 0);
    for (const uint32_t id : ids) {
        require(id < counts.size(), "ids are those of blocks");
        ++counts[id];
    }
    return counts;
}

// Blocks that have a score, the lowest first, equal ones by id.
inline std::vector<uint64_t> ranked(const Case& input) {
    std::vector<uint64_t> ids;
    for (uint64_t i = 0; i < input.scores.size(); ++i) {
        if (!std::isnan(input.scores[i])) ids.push_back(i);
    }
    std::stable_sort(ids.begin(), ids.end(),
                     [&](uint64_t a, uint64_t b) { return input.scores[a] < input.scores[b]; });
    return ids;
}

inline size_t cluster_of(const std::vector<double>& cuts, float score, size_t of_none) {
    if (std::isnan(score)) return of_none;
    return static_cast<size_t>(std::count_if(cuts.begin(), cuts.end(),
                                             [&](double cut) { return cut <= static_cast<double>(score); }));
}

// Whether a count is an expectation rounded up or down, but for errors of single precision.
inline bool is_rounded(uint64_t count, double expected) {
    return std::abs(static_cast<double>(count) - expected) <= 1.0 + 1e-3 + 1e-4 * expected;
}

}  // namespace fuzz
