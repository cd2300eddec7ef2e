// Clusters of blocks, and the weights of blocks in weighted sampling.
#pragma once

#include <cstdint>
#include <vector>

#include "orders/order.h"
#include "orders/scores.h"

namespace mlfr {

// The cluster of a block is the number of ascending cuts <= its score; the last cluster is that of blocks
// without a score. The weight of a block is exp(min(score, cap)), or 1 without a score. The scores must not
// change meanwhile.
//
// Weights are handled relative to a reference of the cluster, at most e times the weight of its heaviest
// block, so that none overflows and not all underflow, and rounded to integers, so that their sums are exact
// in any order.
class BlockWeights {
  public:
    // Throws std::invalid_argument for illegal cuts or cap, or an infinite score.
    BlockWeights(Scores scores, const std::vector<double>& cuts, double cap, int threads);

    uint64_t blocks() const { return scores_.n; }

    // Number of clusters.
    size_t clusters() const { return counts_.size(); }

    // Blocks of each cluster.
    const std::vector<uint64_t>& counts() const { return counts_; }

    // Mean weight of the blocks of each cluster, to 3e-7 (relative); 0 for an empty cluster.
    std::vector<double> means(int threads) const;

    // Computes the clusters of a batch of blocks, and the logarithms of their weights relative to the
    // reference of their cluster, in [-80, 0].
    void read(uint64_t first, uint64_t count, uint32_t* cluster, float* log_relative) const;

    // Computes the clusters of a batch of blocks, and their relative weights as integers. Sums over all
    // blocks stay below 2^62.
    void read_integers(uint64_t first, uint64_t count, uint32_t* cluster, uint64_t* weight) const;

    // Returns sums[chunk * clusters() + c], the sum of the integer weights of cluster c in a chunk.
    std::vector<uint64_t> chunk_sums(int threads) const;

  private:
    struct Tally;

    void read_here(uint64_t first, uint64_t count, uint32_t* cluster, float* log_relative) const;
    std::vector<Tally> tally(int threads) const;
    void tally_all(int threads);
    bool are_heavy(const std::vector<Tally>& chunks) const;
    std::vector<float> find_heaviest(int threads) const;

    Scores scores_;
    Intervals intervals_;
    float cap_;
    double unit_;  // integer weight of a block that weighs as much as its cluster's reference
    std::vector<float> reference_;  // for each cluster, a capped score
    std::vector<uint64_t> counts_;
    std::vector<uint64_t> sums_;  // see chunk_sums; empty for a single interval, which may not need them
};

// The shares of the samples that the clusters get.
class Shares {
  public:
    // Throws std::invalid_argument for an illegal mass, or where no block can be drawn.
    Shares(const BlockWeights& weights, const Mass& mass);

    // Positive or exactly 0. The shares sum to 1, up to rounding.
    double of(size_t cluster) const { return share_[cluster]; }

    // Number of blocks in clusters of positive share.
    uint64_t drawable() const { return drawable_; }

    // Number of clusters of positive share.
    size_t drawn() const { return drawn_; }

  private:
    std::vector<double> share_;
    uint64_t drawable_ = 0;
    size_t drawn_ = 0;
};

}  // namespace mlfr
