// Weighted sampling with replacement: systematic visits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "draw_lists.h"
#include "order.h"
#include "shuffle.h"
#include "weights.h"

namespace mlfr {

namespace {

constexpr int kLineBits = 61;  // the line of all draws is at most 2^61 units long
constexpr int kDrawBits = 40;  // so that a unit is at most 2^-21 draws

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

DrawLists list_visits(uint64_t n, const BlockWeights& weights, const VisitLine& line, int threads) {
    DrawLists lists(n);
    for_chunks(n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<uint64_t> sum(line.before(chunk), line.before(chunk) + weights.clusters());
        std::vector<uint64_t> points(weights.clusters());
        for (size_t c = 0; c < sum.size(); ++c) points[c] = line.points(c, sum[c]);
        std::vector<uint32_t>& list = lists.of(chunk);
        uint32_t cluster[kBatch];
        uint64_t weight[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            weights.read_integers(first, count, cluster, weight);
            for (uint64_t j = 0; j < count; ++j) {
                const size_t c = cluster[j];
                sum[c] += weight[j];
                const uint64_t now = line.points(c, sum[c]);
                for (; points[c] < now; ++points[c]) list.push_back(static_cast<uint32_t>(first - begin + j));
            }
        });
    });
    return lists;
}

}  // namespace

template <class Id>
void order_visits(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads,
                  Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const VisitLine line(weights, weights.chunk_sums(threads), draws, seed);
    shuffle_multiset(scores.n, draws, seed, threads, list_visits(scores.n, weights, line, threads), out);
}

template void order_visits<uint32_t>(Scores, const Weighting&, uint64_t, uint64_t, int, uint32_t*);
template void order_visits<uint64_t>(Scores, const Weighting&, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
