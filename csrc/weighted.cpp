// Weighted sampling: systematic visits, and choice without replacement.
#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "order.h"
#include "select.h"
#include "shuffle.h"
#include "weights.h"

namespace mlfr {

namespace {

constexpr int kLineBits = 61;  // the line of all draws is at most 2^61 units long
constexpr int kDrawBits = 40;  // so that a unit is at most 2^-21 draws

// Seeds of the parts of an order, so that none shares a random stream with another.
enum SeedPart : uint64_t { kOffset = 2, kKeys = 3, kPasses = 16 };

// The line of systematic sampling (Madow 1949): each block owns a stretch of e_i draws, first all of cluster
// 0 by id, then of cluster 1, and so on; a block is visited once for each point offset + 0, 1, 2 ... in its
// stretch. That is floor(e_i) or ceil(e_i) times, and the same holds for the clusters. Ends of stretches are
// rounded to units of 2^-fraction_bits draws, never accumulated, so the last one is the end of the line
// exactly and the points number `draws`.
class VisitLine {
  public:
    VisitLine(const BlockWeights& weights, std::vector<uint64_t> chunk_sums, uint64_t draws, uint64_t seed)
        : clusters_(weights.clusters()), before_(std::move(chunk_sums)) {
        if (draws >> kDrawBits) throw std::invalid_argument("draws: at most 2^40 - 1");
        while ((draws >> (kLineBits - fraction_bits_)) > 0) --fraction_bits_;
        const std::vector<uint64_t> total = totals_of_clusters();
        const uint64_t length = draws << fraction_bits_;
        std::vector<uint64_t> start(clusters_ + 1, length);
        double share = 0.0;
        for (size_t c = 0; c < clusters_ && !is_last(weights, c); ++c) {
            share += weights.share(c);
            start[c + 1] = std::min(length, static_cast<uint64_t>(share * static_cast<double>(length)));
        }
        start[0] = 0;
        const uint64_t offset = derive(seed, kOffset) >> (64 - fraction_bits_);
        for (size_t c = 0; c < clusters_; ++c) {
            parts_.push_back(make_part(start[c] + offset, start[c + 1] - start[c], total[c]));
        }
    }

    // Sum of integer weights of a cluster in the chunks before this one.
    const uint64_t* before(uint64_t chunk) const { return &before_[chunk * clusters_]; }

    // Points before the place in a cluster's part of the line that a running sum of integer weights has
    // reached.
    uint64_t points(size_t cluster, uint64_t sum) const {
        const Part& part = parts_[cluster];
        const auto product = static_cast<unsigned __int128>(sum << part.shift) * part.rate;
        return (part.start + static_cast<uint64_t>(product >> 64)) >> fraction_bits_;
    }

  private:
    // A cluster's part of the line.
    struct Part {
        uint64_t start;  // in units, the offset included
        uint64_t rate;
        int shift;
    };

    // The last cluster that has a share: its part ends where the line does, however the shares were rounded.
    static bool is_last(const BlockWeights& weights, size_t cluster) {
        for (size_t c = cluster + 1; c < weights.clusters(); ++c) {
            if (weights.share(c) > 0.0) return false;
        }
        return true;
    }

    // Turns the sums of the chunks into sums of all chunks before; returns those of all.
    std::vector<uint64_t> totals_of_clusters() {
        std::vector<uint64_t> total(clusters_, 0);
        for (size_t i = 0; i < before_.size(); ++i) {
            uint64_t& sum = total[i % clusters_];
            sum += std::exchange(before_[i], sum);
        }
        return total;
    }

    // points() multiplies a sum by length / total as ceil(2^64 length / total'), total' = total << shift in
    // [2^62, 2^63). At sum = total that is `length` exactly: the excess of the ceiling, total' / 2^64, is
    // below 1.
    static Part make_part(uint64_t start, uint64_t length, uint64_t total) {
        if (length == 0 || total == 0) return {start, 0, 0};
        int shift = 0;
        while ((total << shift) < (uint64_t{1} << 62)) ++shift;
        const auto divisor = static_cast<unsigned __int128>(total << shift);
        const auto rate = ((static_cast<unsigned __int128>(length) << 64) + divisor - 1) / divisor;
        return {start, static_cast<uint64_t>(rate), shift};
    }

    size_t clusters_;
    int fraction_bits_ = 32;
    std::vector<uint64_t> before_;
    std::vector<Part> parts_;
};

std::unique_ptr<uint32_t[]> count_visits(uint64_t n, const BlockWeights& weights, const VisitLine& line,
                                         int threads) {
    std::unique_ptr<uint32_t[]> visits(new uint32_t[n]);
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<uint64_t> sum(line.before(chunk), line.before(chunk) + weights.clusters());
        std::vector<uint64_t> points(weights.clusters());
        for (size_t c = 0; c < sum.size(); ++c) points[c] = line.points(c, sum[c]);
        uint32_t cluster[kBatch];
        uint64_t weight[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            weights.read_integers(first, count, cluster, weight);
            uint64_t most = 0;
            for (uint64_t j = 0; j < count; ++j) {
                const size_t c = cluster[j];
                sum[c] += weight[j];
                const uint64_t now = line.points(c, sum[c]);
                const uint64_t visited = now - std::exchange(points[c], now);
                most |= visited;
                visits[first + j] = static_cast<uint32_t>(visited);
            }
            if (most >> 32) {
                throw std::invalid_argument("draws: a block would be drawn more than 2^32 - 1 times");
            }
        });
    });
    return visits;
}

// What divides a block's weight relative to its cluster's heaviest block to give its weight in the corpus, up
// to a common factor: at least 1; 0 where the cluster has no share.
std::vector<double> corpus_factors(const BlockWeights& weights, int threads) {
    const size_t k = weights.clusters();
    std::vector<double> factor(k, 0.0);
    const std::vector<uint64_t> sums = weights.chunk_sums(threads);
    for (size_t i = 0; i < sums.size(); ++i) factor[i % k] += static_cast<double>(sums[i]);
    double smallest = std::numeric_limits<double>::infinity();
    for (size_t c = 0; c < k; ++c) {
        factor[c] = weights.share(c) > 0.0 ? factor[c] / weights.share(c) : 0.0;
        if (factor[c] > 0.0) smallest = std::min(smallest, factor[c]);
    }
    for (double& f : factor) f /= smallest;
    return factor;
}

// Exponential keys (Efraimidis & Spirakis 2006): the k smallest of E_i / w_i, E_i standard exponential
// numbers, are a weighted choice without replacement. In fp32 there are few ties, which go by id; keys beyond
// its range are all its largest number.
std::unique_ptr<uint32_t[]> exponential_keys(uint64_t n, const BlockWeights& weights, uint64_t seed,
                                             int threads) {
    std::vector<float> factors;
    for (const double factor : corpus_factors(weights, threads)) {
        factors.push_back(static_cast<float>(std::min(factor, 1e38)));
    }
    std::unique_ptr<uint32_t[]> keys(new uint32_t[n]);
    for_chunks(n, threads, [&](uint64_t, uint64_t begin, uint64_t end) {
        uint32_t cluster[kBatch];
        float log_relative[kBatch], factor[kBatch], uniform[kBatch], rest[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {  // short loops: vector instructions
            weights.read(first, count, cluster, log_relative);
            for (uint64_t j = 0; j < count; ++j) factor[j] = factors[cluster[j]];
            for (uint64_t j = 0; j < count; ++j) {
                const Uniform draw(derive(seed, first + j));
                uniform[j] = draw.number;
                rest[j] = draw.rest;
            }
            for (uint64_t j = 0; j < count; ++j) {
                const float number = det_exponential(uniform[j], rest[j]);
                const float key = number * factor[j] * det_expf(-log_relative[j]);
                const float finite = std::min(key, std::numeric_limits<float>::max());
                keys[first + j] = factor[j] == 0.0f ? kNoKey : float_key(finite);
            }
        });
    });
    return keys;
}

}  // namespace

template <class Id>
void order_visits(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const VisitLine line(weights, weights.chunk_sums(threads), draws, seed);
    const auto visits = count_visits(scores.n, weights, line, threads);
    shuffle_visits(visits.get(), scores.n, draws, seed, threads, out);
}

// The order of the keys is biased towards heavy blocks, so what was chosen is shuffled.
template <class Id>
void order_choice(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const auto keys = exponential_keys(scores.n, weights, derive(seed, kKeys), threads);
    const StoredKeys stored(keys.get(), scores.n);
    const uint64_t all = weights.drawable();
    uint64_t pass = 0;
    if (draws >= all) {
        const KeyFilter drawable(stored, kNoKey, 0, Side::kBelow, threads);
        for (; draws >= all; draws -= all, out += all) {
            shuffle_multiset(scores.n, all, derive(seed, kPasses + pass++), threads, drawable, out);
        }
    }
    if (draws == 0) return;
    const Cut cut = KeyRanks(stored, threads).at(draws - 1);
    const KeyFilter chosen(stored, cut.key, draws - cut.below, Side::kBelow, threads);
    shuffle_multiset(scores.n, draws, derive(seed, kPasses + pass), threads, chosen, out);
}

#define MLFR_INSTANTIATE(Id)                                                                \
    template void order_visits<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*); \
    template void order_choice<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
