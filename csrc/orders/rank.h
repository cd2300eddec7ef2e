// The scores at ranks.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "orders/scores.h"

namespace mlfr {

// How many blocks of a chunk have no score, a lower score than the cut, and a score that equals the cut.
struct CutChunk {
    uint64_t none, smaller, ties;
};

// The score at a rank (from 0), and how many blocks lie below it.
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

// The wanted rank among as many scores as its argument says; below their number, if that is not 0.
using RankOf = std::function<uint64_t(uint64_t)>;

// Finds the score at each rank. Throws std::invalid_argument for an infinite score. Takes one pass over the
// scores for up to three ranks, and three more for a rank whose score a sample of them does not bound.
std::vector<RankedScore> rank_scores(Scores scores, const std::vector<RankOf>& ranks, int threads);

}  // namespace mlfr
