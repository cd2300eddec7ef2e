// Clusters of blocks, and the weights of blocks in weighted sampling.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "orders/order.h"
#include "orders/scores.h"

namespace mlfr {

enum class WeightRule { kPerplexity, kUniform, kCapped };

constexpr float kCappedRatio = 3.0f;

// How much a block weighs by its score. Without a score it weighs 1, times its factor.
struct Weighing {
    WeightRule rule = WeightRule::kPerplexity;
    // kPerplexity: exp(min(score, cap)).
    double cap = std::numeric_limits<double>::infinity();
    // kCapped: 1 up to the score `low`, kCappedRatio from `high` on, linear between.
    double low = 0.0, high = 0.0;
    // A further factor of each block, in [0, 1]; a block of 0 is not drawn. Null: 1.
    const float* factors = nullptr;
};

// The cluster of a block is the number of ascending cuts <= its score; the cluster after those is that of
// blocks without a score, and with factors, one more is that of the blocks whose factor is 0. Neither the
// scores nor the factors must change meanwhile.
//
// Weights are handled relative to a reference of the cluster, at most e times the weight of its heaviest
// block, so that none overflows and not all underflow, and rounded to integers, so that their sums are exact
// in any order.
class BlockWeights {
  public:
    // Throws std::invalid_argument for illegal cuts or weighing, or an infinite score.
    BlockWeights(Scores scores, const std::vector<double>& cuts, const Weighing& weighing, int threads);

    BlockWeights(Scores scores, const std::vector<double>& cuts, double cap, int threads)
        : BlockWeights(scores, cuts, Weighing{WeightRule::kPerplexity, cap, 0.0, 0.0, nullptr}, threads) {}

    uint64_t blocks() const { return scores_.n; }

    // Number of clusters.
    size_t clusters() const { return counts_.size(); }

    // The number of the cluster of blocks without a score.
    size_t unseen() const { return intervals_.count(); }

    // Whether `read` gives logarithms of the relative weights, or the relative weights themselves.
    bool logarithmic() const { return weighing_.rule == WeightRule::kPerplexity && !weighing_.factors; }

    // Blocks of each cluster.
    const std::vector<uint64_t>& counts() const { return counts_; }

    // Mean weight of the blocks of each cluster, to 3e-7 (relative); 0 for an empty cluster.
    std::vector<double> means(int threads) const;

    // Computes the clusters of a batch of blocks, and their weights relative to the reference of their
    // cluster: as logarithms in [-80, 0], or in [0, 1], see `logarithmic`.
    void read(uint64_t first, uint64_t count, uint32_t* cluster, float* relative) const;

    // Computes the clusters of a batch of blocks, and their relative weights as integers. Sums over all
    // blocks stay below 2^62.
    void read_integers(uint64_t first, uint64_t count, uint32_t* cluster, uint64_t* weight) const;

    // Returns sums[chunk * clusters() + c], the sum of the integer weights of cluster c in a chunk.
    std::vector<uint64_t> chunk_sums(int threads) const;

  private:
    struct Tally;

    void read_here(uint64_t first, uint64_t count, uint32_t* cluster, float* relative) const;
    void read_clusters(uint64_t first, uint64_t count, uint32_t* cluster) const;
    void read_logarithms(uint64_t first, uint64_t count, const uint32_t* cluster, float* log_relative) const;
    void apply_factors(uint64_t first, uint64_t count, uint32_t* cluster, float* relative) const;
    std::vector<Tally> tally(int threads) const;
    void tally_all(int threads);
    bool are_heavy(const std::vector<Tally>& chunks) const;
    std::vector<float> find_heaviest(int threads) const;

    Scores scores_;
    Intervals intervals_;
    Weighing weighing_;
    float cap_, low_, high_;
    float per_unit_;  // kCapped: 1 / (high - low), or 0 where they are equal
    double unit_;     // integer weight of a block that weighs as much as its cluster's reference
    std::vector<float> reference_;  // for each cluster, a capped score
    std::vector<uint64_t> counts_;
    // See chunk_sums; empty for a single interval without factors, which may not need them.
    std::vector<uint64_t> sums_;
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
