// Weighted sampling with replacement: systematic visits.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "orders/order.h"
#include "orders/shuffle.h"
#include "orders/weights.h"

namespace mlfr {

namespace {

constexpr int kLineBits = 61;    // the line of all samples is at most 2^61 units long
constexpr int kSampleBits = 40;  // so that a unit is at most 2^-21 samples

// The line of systematic sampling (Madow 1949): each block has a stretch of length e_i, first all
// blocks of cluster 0 by id, then those of cluster 1, and so on; a block is visited once for each point
// offset + 0, 1, 2 ... in its stretch. That is floor(e_i) or ceil(e_i) times, and the same holds for the
// clusters. Ends of stretches are rounded to units of 2^-fraction_bits samples, never accumulated, so the
// last one is the end of the line exactly and the points number `samples`.
class VisitLine {
  public:
    VisitLine(const Shares& shares, size_t clusters, std::vector<uint64_t> chunk_sums, uint64_t samples,
              uint64_t seed)
        : clusters_(clusters), before_(std::move(chunk_sums)) {
        if (samples >> kSampleBits) throw std::invalid_argument("samples: at most 2^40 - 1");
        while ((samples >> (kLineBits - fraction_bits_)) > 0) --fraction_bits_;
        const std::vector<uint64_t> total = totals_of_clusters();
        const uint64_t length = samples << fraction_bits_;
        std::vector<uint64_t> start(clusters_ + 1, length);
        double share = 0.0;
        for (size_t c = 0; c < clusters_ && !is_last(shares, c); ++c) {
            share += shares.of(c);
            start[c + 1] = std::min(length, static_cast<uint64_t>(share * static_cast<double>(length)));
        }
        start[0] = 0;
        const uint64_t offset = derive(seed, kOffset) >> (64 - fraction_bits_);
        for (size_t c = 0; c < clusters_; ++c) {
            parts_.push_back(make_part(start[c] + offset, start[c + 1] - start[c], total[c]));
        }
    }

    // Sums of the integer weights of each cluster in the chunks before this one; for chunk number num_chunks,
    // in all chunks.
    const uint64_t* before(uint64_t chunk) const { return &before_[chunk * clusters_]; }

    // How many points come before the position that a running sum of integer weights has reached in a
    // cluster's part of the line.
    uint64_t points(size_t cluster, uint64_t sum) const {
        const Part& part = parts_[cluster];
        const auto product = static_cast<unsigned __int128>(sum << part.shift) * part.rate;
        return (part.start + static_cast<uint64_t>(product >> 64)) >> fraction_bits_;
    }

    // A sum below which there are at most `points` points; by rounding in doubles, a little less than the
    // largest such sum.
    uint64_t sum_before_next(size_t cluster, uint64_t points) const {
        const Part& part = parts_[cluster];
        const auto units = static_cast<double>(((points + 1) << fraction_bits_) - part.start);
        return static_cast<uint64_t>(std::min(units * part.sum_per_unit * (1.0 - 0x1p-48), 0x1p63));
    }

  private:
    // A cluster's part of the line.
    struct Part {
        uint64_t start;  // in units, the offset included
        uint64_t rate;
        int shift;
        double sum_per_unit;
    };

    // The last cluster with a share: its part ends with the line, however the shares were rounded.
    bool is_last(const Shares& shares, size_t cluster) const {
        for (size_t c = cluster + 1; c < clusters_; ++c) {
            if (shares.of(c) > 0.0) return false;
        }
        return true;
    }

    // Turns the sums of each chunk into sums of all chunks before it; appends and returns those of all
    // chunks.
    std::vector<uint64_t> totals_of_clusters() {
        std::vector<uint64_t> total(clusters_, 0);
        for (size_t i = 0; i < before_.size(); ++i) {
            uint64_t& sum = total[i % clusters_];
            sum += std::exchange(before_[i], sum);
        }
        before_.insert(before_.end(), total.begin(), total.end());
        return total;
    }

    // points() multiplies a sum by length / total as ceil(2^64 length / total'), total' = total << shift in
    // [2^62, 2^63). At sum = total that is `length` exactly: the excess of the ceiling, total' / 2^64, is
    // below 1.
    static Part make_part(uint64_t start, uint64_t length, uint64_t total) {
        if (length == 0 || total == 0) return {start, 0, 0, std::numeric_limits<double>::infinity()};
        int shift = 0;
        while ((total << shift) < (uint64_t{1} << 62)) ++shift;
        const auto divisor = static_cast<unsigned __int128>(total << shift);
        const auto rate = ((static_cast<unsigned __int128>(length) << 64) + divisor - 1) / divisor;
        const double sum_per_unit = static_cast<double>(total) / static_cast<double>(length);
        return {start, static_cast<uint64_t>(rate), shift, sum_per_unit};
    }

    size_t clusters_;
    int fraction_bits_ = 32;
    std::vector<uint64_t> before_;
    std::vector<Part> parts_;
};

// Emits the visits of all blocks for shuffle_multiset, without memory for them.
class WeightedVisits {
  public:
    WeightedVisits(const BlockWeights& weights, const VisitLine& line) : weights_(weights), line_(line) {}

    uint64_t count(uint64_t chunk) const {
        uint64_t count = 0;
        for (size_t c = 0; c < weights_.clusters(); ++c) {
            count += line_.points(c, line_.before(chunk + 1)[c]) - line_.points(c, line_.before(chunk)[c]);
        }
        return count;
    }

    // Throws std::invalid_argument, and never emits more than count(chunk), where scores have changed.
    template <class Sink>
    void operator()(uint64_t chunk, uint64_t begin, uint64_t end, Sink&& sink) const {
        const uint64_t* last_sum = line_.before(chunk + 1);
        std::vector<Progress> parts(weights_.clusters());
        for (size_t c = 0; c < parts.size(); ++c) {
            const uint64_t sum = line_.before(chunk)[c], points = line_.points(c, sum);
            parts[c] = {sum, points, line_.sum_before_next(c, points)};
        }
        uint32_t cluster[kBatch], offsets[kBatch];
        uint64_t weight[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            weights_.read_integers(first, count, cluster, weight);
            uint64_t pending = 0;
            for (uint64_t j = 0; j < count; ++j) {
                const size_t c = cluster[j];
                Progress& part = parts[c];
                part.sum += weight[j];
                if (part.sum < part.next) continue;
                require(part.sum <= last_sum[c]);
                const uint64_t points = line_.points(c, part.sum);
                for (; part.points < points; ++part.points) {
                    offsets[pending++] = static_cast<uint32_t>(first - begin + j);
                    if (pending < kBatch) continue;
                    sink(offsets, pending);
                    pending = 0;
                }
                part.next = line_.sum_before_next(c, points);
            }
            sink(offsets, pending);
        });
        for (size_t c = 0; c < parts.size(); ++c) require(parts[c].sum == last_sum[c]);
    }

  private:
    // How far the blocks so far reach in the part of their cluster.
    struct Progress {
        uint64_t sum;     // of integer weights
        uint64_t points;  // points before it
        uint64_t next;    // there is no further point as long as the sum is below this
    };

    static void require(bool as_before) {
        if (!as_before) throw std::invalid_argument("scores: they changed after their weights were made");
    }

    const BlockWeights& weights_;
    const VisitLine& line_;
};

}  // namespace

template <class Id>
void order_visits(const BlockWeights& weights, const Mass& mass, uint64_t samples, uint64_t seed, int threads,
                  Id* out) {
    const Shares shares(weights, mass);
    const VisitLine line(shares, weights.clusters(), weights.chunk_sums(threads), samples, seed);
    shuffle_multiset(weights.blocks(), samples, seed, threads, WeightedVisits(weights, line), out);
}

template void order_visits<uint32_t>(const BlockWeights&, const Mass&, uint64_t, uint64_t, int, uint32_t*);
template void order_visits<uint64_t>(const BlockWeights&, const Mass&, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
