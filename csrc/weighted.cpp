// Weighted sampling: systematic visits, and choice without replacement.
#include <limits>
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

std::vector<uint32_t> count_visits(Scores scores, const BlockWeights& weights, const VisitLine& line,
                                   int threads) {
    std::vector<uint32_t> visits(scores.n);
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        std::vector<uint64_t> sum(line.before(chunk), line.before(chunk) + weights.clusters());
        std::vector<uint64_t> points(weights.clusters());
        for (size_t c = 0; c < sum.size(); ++c) points[c] = line.points(c, sum[c]);
        for (uint64_t i = first; i < last; ++i) {
            const size_t c = weights.cluster(scores[i]);
            sum[c] += weights.integer(scores[i], c);
            const uint64_t now = line.points(c, sum[c]);
            const uint64_t count = now - std::exchange(points[c], now);
            if (count >> 32)
                throw std::invalid_argument("draws: a block would be drawn more than 2^32 - 1 times");
            visits[i] = static_cast<uint32_t>(count);
        }
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

// Exponential keys (Efraimidis & Spirakis 2006): the k smallest of -ln(u_i) / w_i are a weighted choice
// without replacement. Rounding a key to fp32 leaves few ties, which go by id; keys beyond its range are all
// its largest number.
std::vector<uint32_t> exponential_keys(Scores scores, const BlockWeights& weights, uint64_t seed,
                                       int threads) {
    const std::vector<double> factor = corpus_factors(weights, threads);
    std::vector<uint32_t> keys(scores.n);
    for_chunks(scores.n, threads, [&](uint64_t, uint64_t first, uint64_t last) {
        for (uint64_t i = first; i < last; ++i) {
            const size_t c = weights.cluster(scores[i]);
            if (factor[c] == 0.0) {
                keys[i] = kNoKey;
                continue;
            }
            const double uniform =
                (static_cast<double>(static_cast<int64_t>(derive(seed, i) >> 12)) + 0.5) * 0x1p-52;
            const double key =
                -det_log(uniform) * factor[c] * det_exp_inside(-weights.log_relative(scores[i], c));
            keys[i] = float_key(
                static_cast<float>(std::min(key, static_cast<double>(std::numeric_limits<float>::max()))));
        }
    });
    return keys;
}

}  // namespace

template <class Id>
void order_visits(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const VisitLine line(weights, weights.chunk_sums(threads), draws, seed);
    const std::vector<uint32_t> visits = count_visits(scores, weights, line, threads);
    shuffle_visits(visits.data(), scores.n, draws, seed, threads, out);
}

// The order of the keys is biased towards heavy blocks, so what was chosen is shuffled.
template <class Id>
void order_choice(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const std::vector<uint32_t> keys = exponential_keys(scores, weights, derive(seed, kKeys), threads);
    auto key_of = [&keys](uint64_t i) { return keys[i]; };
    const uint64_t all = weights.drawable();
    uint64_t pass = 0;
    if (draws >= all) {
        const KeyFilter drawable(scores.n, kNoKey, 0, Side::kBelow, threads, key_of);
        for (; draws >= all; draws -= all, out += all) {
            shuffle_multiset(scores.n, all, derive(seed, kPasses + pass++), threads, drawable, out);
        }
    }
    if (draws == 0) return;
    const Cut cut = key_at_rank(scores.n, draws - 1, threads, key_of);
    const KeyFilter chosen(scores.n, cut.key, draws - cut.below, Side::kBelow, threads, key_of);
    shuffle_multiset(scores.n, draws, derive(seed, kPasses + pass), threads, chosen, out);
}

#define MLFR_INSTANTIATE(Id)                                                                \
    template void order_visits<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*); \
    template void order_choice<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)
#undef MLFR_INSTANTIATE

}  // namespace mlfr
