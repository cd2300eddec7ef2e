// The weights of blocks in weighted sampling.
#pragma once

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

    // Share of the draws that goes to a cluster: positive or exactly 0. The shares sum to 1, up to rounding.
    double share(size_t cluster) const { return share_[cluster]; }

    // Number of blocks in clusters of positive share.
    uint64_t drawable() const { return drawable_; }

    // Of a batch of blocks: their clusters, and the logarithms of their weights relative to their cluster's
    // heaviest block, in [-80, 0].
    void read(uint64_t first, uint64_t count, uint32_t* cluster, float* log_relative) const;

    // Of a batch of blocks: their clusters, and their relative weights as integers. Sums over all blocks stay
    // below 2^62.
    void read_integers(uint64_t first, uint64_t count, uint32_t* cluster, uint64_t* weight) const;

    // sums[chunk * clusters() + c]: sum of integer weights of cluster c in a chunk.
    std::vector<uint64_t> chunk_sums(int threads) const;

  private:
    void check(const Weighting& weighting) const;
    std::vector<uint64_t> count_blocks(int threads);
    void set_shares(std::vector<double> mass, const std::vector<uint64_t>& counts);

    Scores scores_;
    Intervals intervals_;
    float cap_;
    double unit_;                  // integer weight of a cluster's heaviest block
    std::vector<float> heaviest_;  // largest min(score, cap) of each cluster
    std::vector<double> share_;
    uint64_t drawable_ = 0;
};

}  // namespace mlfr
