// The weights of blocks in weighted sampling.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "detmath.h"
#include "order.h"
#include "scores.h"

namespace mlfr {

// Clusters and weights of blocks. Within a cluster, weights are relative to its heaviest block, so that none
// overflows and not all underflow, and are rounded to integers, so that their sums are exact in any order.
class BlockWeights {
  public:
    // Throws std::invalid_argument for an illegal weighting, an infinite score, or where no block can be
    // drawn.
    BlockWeights(Scores scores, const Weighting& weighting, int threads);

    // Number of clusters; the last one is that of the blocks without a score.
    size_t clusters() const { return intervals_.count() + 1; }

    size_t cluster(float score) const {
        return std::isnan(score) ? intervals_.count() : intervals_.of(score);
    }

    // Share of the draws that goes to a cluster: positive or exactly 0. The shares sum to 1, up to rounding.
    double share(size_t cluster) const { return share_[cluster]; }

    // Number of blocks in clusters of positive share.
    uint64_t drawable() const { return drawable_; }

    // Logarithm of a block's weight relative to its cluster's heaviest one, in [-80, 0].
    double log_relative(float score, size_t cluster) const {
        if (std::isnan(score)) return 0.0;
        return std::max(-80.0, std::min(static_cast<double>(score), cap_) - heaviest_[cluster]);
    }

    // The relative weight as an integer. Sums over all blocks stay below 2^62.
    uint64_t integer(float score, size_t cluster) const {
        const double relative = det_exp_inside(log_relative(score, cluster));
        return static_cast<uint64_t>(static_cast<int64_t>(relative * unit_ + 0.5));
    }

    // sums[chunk * clusters() + c]: sum of integer weights of cluster c in a chunk.
    std::vector<uint64_t> chunk_sums(int threads) const;

  private:
    void check(const Weighting& weighting) const;
    std::vector<uint64_t> count_blocks(int threads);
    void set_shares(std::vector<double> mass, const std::vector<uint64_t>& counts);

    Scores scores_;
    Intervals intervals_;
    double cap_;
    double unit_;                   // integer weight of a cluster's heaviest block
    std::vector<double> heaviest_;  // largest min(score, cap) of each cluster
    std::vector<double> share_;
    uint64_t drawable_ = 0;
};

}  // namespace mlfr
