// The score at a rank.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "orders/scores.h"

namespace mlfr {

// The blocks of a chunk that have no score, a lower one than the cut, and the same.
struct CutChunk {
    uint64_t none, smaller, ties;
};

// The score at a rank (from 0), and how the blocks lie to it.
struct RankedScore {
    float score = -std::numeric_limits<float>::infinity();
    uint64_t rank = 0, seen = 0;  // seen: blocks that have a score; without any, the score is -inf
    std::vector<CutChunk> chunks;

    uint64_t smaller() const {
        uint64_t sum = 0;
        for (const CutChunk& chunk : chunks) sum += chunk.smaller;
        return sum;
    }
};

// The score at the rank that rank_of(seen) says. Throws std::invalid_argument for an infinite score. One pass
// over the scores, where a sample leads near the rank; four otherwise.
RankedScore rank_score(Scores scores, const std::function<uint64_t(uint64_t)>& rank_of, int threads);

}  // namespace mlfr
