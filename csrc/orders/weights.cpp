#include "orders/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "common/detmath.h"
#include "common/vector.h"

namespace mlfr {

namespace {

// The largest power of 2, at most 2^50, whose n-fold is at most 2^62.
double integer_unit(uint64_t n) {
    int bits = 50;
    while (bits > 0 && (n >> (62 - bits)) > 0) --bits;
    return static_cast<double>(uint64_t{1} << bits);
}

}  // namespace

// Counts the blocks of a cluster, or of its part in a chunk.
struct BlockWeights::Tally {
    uint64_t count = 0;
    uint64_t sum = 0;  // of integer weights

    void add(uint64_t more, uint64_t weights) {
        count += more;
        sum += weights;
    }
};

BlockWeights::BlockWeights(Scores scores, const std::vector<double>& cuts, const Weighing& weighing,
                           int threads)
    : scores_(scores),
      intervals_(cuts),
      weighing_(weighing),
      cap_(static_cast<float>(weighing.cap)),
      low_(static_cast<float>(weighing.low)),
      high_(static_cast<float>(weighing.high)),
      per_unit_(high_ > low_ ? 1.0f / (high_ - low_) : 0.0f),
      unit_(integer_unit(scores.n)),
      reference_(intervals_.count() + (weighing.factors ? 2 : 1), 0.0f),
      counts_(reference_.size(), 0) {
    if (!(cap_ > -std::numeric_limits<float>::infinity())) {
        throw std::invalid_argument("cap: must be finite, or +inf for none");
    }
    if (!(high_ >= low_ && std::isfinite(high_ - low_))) {
        throw std::invalid_argument("low, high: must ascend, and differ by a finite number");
    }
    const ScoreRange range = find_range(scores, threads);
    if (weighing.rule == WeightRule::kPerplexity) {
        for (size_t c = 0; c < intervals_.count(); ++c) {
            reference_[c] = std::min({cap_, range.high, intervals_.upper_edge(c)});
        }
    }
    if (intervals_.count() == 1 && !weighing.factors) {
        counts_ = {range.seen, scores.n - range.seen};
    } else {
        tally_all(threads);
    }
}

// Fills counts_ and sums_. Where a cluster ends well below its upper edge, its reference is lowered first.
void BlockWeights::tally_all(int threads) {
    std::vector<Tally> chunks = tally(threads);
    if (weighing_.rule == WeightRule::kPerplexity && !are_heavy(chunks)) {
        const std::vector<float> heaviest = find_heaviest(threads);
        auto near = [](float reference, float block) { return reference - block <= 1.0f; };
        if (!std::equal(reference_.begin(), reference_.end(), heaviest.begin(), near)) {
            reference_ = heaviest;
            chunks = tally(threads);
        }
    }
    for (size_t i = 0; i < chunks.size(); ++i) {
        counts_[i % clusters()] += chunks[i].count;
        sums_.push_back(chunks[i].sum);
    }
}

// Whether the mean weight of every cluster is not much below the weight of its reference.
bool BlockWeights::are_heavy(const std::vector<Tally>& chunks) const {
    std::vector<Tally> all(clusters());
    for (size_t i = 0; i < chunks.size(); ++i) all[i % clusters()].add(chunks[i].count, chunks[i].sum);
    return std::all_of(all.begin(), all.end(), [this](const Tally& cluster) {
        return static_cast<double>(cluster.sum) * 64 >= static_cast<double>(cluster.count) * unit_;
    });
}

// Sums by chunk and cluster.
std::vector<BlockWeights::Tally> BlockWeights::tally(int threads) const {
    const size_t k = clusters();
    std::vector<Tally> chunks(num_chunks(scores_.n) * k);
    for_chunks(scores_.n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<Tally> tables(kTables * k);
        uint32_t cluster[kBatch];
        uint64_t weight[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            read_integers(first, count, cluster, weight);
            for (uint64_t j = 0; j < count; ++j) tables[kTables * cluster[j] + j % kTables].add(1, weight[j]);
        });
        for (size_t c = 0; c < kTables * k; ++c) {
            chunks[chunk * k + c / kTables].add(tables[c].count, tables[c].sum);
        }
    });
    return chunks;
}

// The largest capped score of each cluster; 0 for the blocks that are in none by their score.
std::vector<float> BlockWeights::find_heaviest(int threads) const {
    const size_t k = clusters();
    const std::vector<float> none(k, -std::numeric_limits<float>::infinity());
    const auto chunks = map_chunks(scores_.n, threads, [&](uint64_t begin, uint64_t end) {
        std::vector<float> heaviest = none;
        uint32_t cluster[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            read_clusters(first, count, cluster);
            for (uint64_t j = 0; j < count; ++j) {
                float& most = heaviest[cluster[j]];
                most = std::max(most, std::min(scores_[first + j], cap_));
            }
        });
        return heaviest;
    });
    std::vector<float> heaviest = none;
    for (const std::vector<float>& part : chunks) {
        for (size_t c = 0; c < k; ++c) heaviest[c] = std::max(heaviest[c], part[c]);
    }
    std::fill(heaviest.begin() + static_cast<std::ptrdiff_t>(unseen()), heaviest.end(), 0.0f);
    return heaviest;
}

std::vector<double> BlockWeights::means(int threads) const {
    const std::vector<uint64_t> sums = chunk_sums(threads);
    std::vector<uint64_t> total(clusters(), 0);
    for (size_t i = 0; i < sums.size(); ++i) total[i % clusters()] += sums[i];
    std::vector<double> means(clusters(), 0.0);
    for (size_t c = 0; c < clusters(); ++c) {
        if (counts_[c] == 0) continue;
        const double relative = static_cast<double>(total[c]) / unit_ / static_cast<double>(counts_[c]);
        means[c] = relative * det_exp(static_cast<double>(reference_[c]));
    }
    return means;
}

void BlockWeights::read_clusters(uint64_t first, uint64_t count, uint32_t* cluster) const {
    const float* scores = scores_.data + first;
    if (intervals_.count() == 1) {  // all scores are in the same interval
        for (uint64_t j = 0; j < count; ++j) cluster[j] = std::isnan(scores[j]);
    } else {
        intervals_.read(scores, count, static_cast<uint32_t>(unseen()), cluster);
    }
}

void BlockWeights::read_logarithms(uint64_t first, uint64_t count, const uint32_t* cluster,
                                   float* log_relative) const {
    const float* scores = scores_.data + first;
    const float cap = cap_;
    if (intervals_.count() == 1) {
        const float reference = reference_[0];
        for (uint64_t j = 0; j < count; ++j) log_relative[j] = reference;
    } else {
        for (uint64_t j = 0; j < count; ++j) log_relative[j] = reference_[cluster[j]];
    }
    for (uint64_t j = 0; j < count; ++j) {
        const float relative = std::max(-80.0f, std::min(scores[j], cap) - log_relative[j]);
        log_relative[j] = std::isnan(scores[j]) ? 0.0f : relative;
    }
}

// Multiplies relative weights by the factors of their blocks; the product of positive ones stays positive.
void BlockWeights::apply_factors(uint64_t first, uint64_t count, uint32_t* cluster, float* relative) const {
    const float* factors = weighing_.factors + first;
    const auto excluded = static_cast<uint32_t>(clusters() - 1);
    for (uint64_t j = 0; j < count; ++j) {
        const float product = relative[j] * factors[j];
        const float least = factors[j] > 0.0f ? std::numeric_limits<float>::denorm_min() : 0.0f;
        relative[j] = std::max(product, least);
        cluster[j] = factors[j] > 0.0f ? cluster[j] : excluded;
    }
}

void BlockWeights::read_here(uint64_t first, uint64_t count, uint32_t* cluster, float* relative) const {
    const float* scores = scores_.data + first;
    read_clusters(first, count, cluster);
    if (weighing_.rule == WeightRule::kPerplexity) {
        read_logarithms(first, count, cluster, relative);
        if (!weighing_.factors) return;
        for (uint64_t j = 0; j < count; ++j) relative[j] = det_expf(relative[j]);
    } else if (weighing_.rule == WeightRule::kCapped) {
        const float low = low_, width = high_ - low_, slope = per_unit_ * (1.0f - 1.0f / kCappedRatio);
        for (uint64_t j = 0; j < count; ++j) {
            const float above = std::min(std::max(0.0f, scores[j] - low), width);  // 0 without a score
            relative[j] = std::isnan(scores[j]) ? 1.0f : 1.0f / kCappedRatio + above * slope;
        }
    } else {
        std::fill_n(relative, count, 1.0f);
    }
    if (weighing_.factors) apply_factors(first, count, cluster, relative);
}

void BlockWeights::read(uint64_t first, uint64_t count, uint32_t* cluster, float* relative) const {
    run_vectorised([&] { read_here(first, count, cluster, relative); });
}

void BlockWeights::read_integers(uint64_t first, uint64_t count, uint32_t* cluster, uint64_t* weight) const {
    run_vectorised([&] {
        float relative[kBatch];
        read_here(first, count, cluster, relative);
        if (logarithmic()) {
            for (uint64_t j = 0; j < count; ++j) relative[j] = det_expf(relative[j]);
        }
        constexpr double kRound = 0x1p52;  // adding it leaves the nearest integer in the low bits
        for (uint64_t j = 0; j < count; ++j) {
            const double shifted = static_cast<double>(relative[j]) * unit_ + kRound;
            uint64_t bits;
            std::memcpy(&bits, &shifted, sizeof bits);
            weight[j] = bits & ((uint64_t{1} << 52) - 1);
        }
        if (!weighing_.factors) return;
        for (uint64_t j = 0; j < count; ++j) {  // no cluster that can be drawn weighs nothing
            weight[j] = std::max<uint64_t>(weight[j], relative[j] > 0.0f);
        }
    });
}

std::vector<uint64_t> BlockWeights::chunk_sums(int threads) const {
    if (!sums_.empty()) return sums_;
    std::vector<uint64_t> sums;
    for (const Tally& part : tally(threads)) sums.push_back(part.sum);
    return sums;
}

Shares::Shares(const BlockWeights& weights, const Mass& mass) : share_(mass.clusters) {
    if (mass.clusters.size() != weights.unseen()) {
        throw std::invalid_argument("mass: must have one more entry than cuts");
    }
    auto legal = [](double value) { return value >= 0.0 && std::isfinite(value); };
    if (!std::all_of(mass.clusters.begin(), mass.clusters.end(), legal)) {
        throw std::invalid_argument("mass: must be finite and not negative");
    }
    if (!legal(mass.unseen)) throw std::invalid_argument("unseen_mass: must be finite and not negative");
    share_.push_back(mass.unseen);
    share_.resize(weights.clusters(), 0.0);  // what is not drawn
    double total = 0.0;
    for (size_t c = 0; c < share_.size(); ++c) {
        if (weights.counts()[c] == 0) share_[c] = 0.0;
        total += share_[c];
    }
    if (!(total > 0.0))
        throw std::invalid_argument("mass: no block can be drawn: none that is kept has a weight above 0");
    if (!std::isfinite(total)) throw std::invalid_argument("mass: too large");
    for (size_t c = 0; c < share_.size(); ++c) {
        share_[c] /= total;
        if (share_[c] == 0.0) continue;
        ++drawn_;
        drawable_ += weights.counts()[c];
    }
}

}  // namespace mlfr
