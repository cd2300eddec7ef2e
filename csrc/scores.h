// The scores of all blocks: fp32, higher is harder, NaN where a block has none.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace mlfr {

struct Scores {
    const float* data;
    uint64_t n;

    float operator[](uint64_t i) const { return data[i]; }
};

// How many blocks have a score. Throws std::invalid_argument for an infinite one.
inline uint64_t count_seen(Scores scores, int threads) {
    std::vector<uint64_t> seen(num_chunks(scores.n), 0);
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t count = 0;
        for (uint64_t i = first; i < last; ++i) {
            if (std::isinf(scores[i])) {
                throw std::invalid_argument("scores: block " + std::to_string(i) + " has an infinite score");
            }
            count += !std::isnan(scores[i]);
        }
        seen[chunk] = count;
    });
    uint64_t total = 0;
    for (const uint64_t count : seen) total += count;
    return total;
}

}  // namespace mlfr
