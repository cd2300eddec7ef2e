#include "cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "detmath.h"
#include "partition.h"
#include "select.h"

namespace mlfr {

float percentile(Scores scores, double q, int threads) {
    if (!(q >= 0.0 && q <= 1.0)) throw std::invalid_argument("q: must lie between 0 and 1");
    const uint64_t seen = count_seen(scores, threads);
    if (seen == 0) throw std::invalid_argument("scores: no block has one");
    const uint64_t rank = std::max<uint64_t>(ceil_share(q, seen), 1);
    return key_float(
        key_at_rank(scores.n, rank - 1, threads, [&](uint64_t i) { return float_key(scores[i]); }).key);
}

namespace {

struct Range {
    float low = std::numeric_limits<float>::infinity();
    float high = -std::numeric_limits<float>::infinity();
    uint64_t seen = 0;
};

Range find_range(Scores scores, int threads) {
    std::vector<Range> parts(num_chunks(scores.n));
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        Range range;
        for (uint64_t i = first; i < last; ++i) {
            const float score = scores.checked(i);  // NaN fails every comparison
            range.low = score < range.low ? score : range.low;
            range.high = score > range.high ? score : range.high;
            range.seen += !std::isnan(score);
        }
        parts[chunk] = range;
    });
    Range range;
    for (const Range& part : parts) {
        range.low = std::min(range.low, part.low);
        range.high = std::max(range.high, part.high);
        range.seen += part.seen;
    }
    return range;
}

// Bins of equal width between the lowest and the highest score.
class Bins {
  public:
    Bins(Range range, uint64_t count) : range_(range), count_(count) {
        const double width = static_cast<double>(range.high) - static_cast<double>(range.low);
        per_unit_ = width > 0.0 ? static_cast<double>(count) / width : 0.0;
    }

    uint64_t count() const { return count_; }

    // Never falls with the score, rounding included: a product by a positive constant is monotonic.
    uint64_t of(float score) const {
        const double place = (static_cast<double>(score) - static_cast<double>(range_.low)) * per_unit_;
        return std::min(static_cast<uint64_t>(static_cast<int64_t>(place)), count_ - 1);
    }

    // The smallest float whose bin is at least `bin`, found by bisection, so that rounding moves no score
    // across.
    float lower_edge(uint64_t bin) const {
        uint32_t low = float_key(range_.low), high = float_key(range_.high);
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            if (of(key_float(middle)) >= bin) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return key_float(low);
    }

  private:
    Range range_;
    uint64_t count_;
    double per_unit_;
};

std::vector<double> find_cuts(Scores scores, const Bins& bins, size_t k, int threads) {
    const std::vector<uint64_t> counts = histogram(scores.n, bins.count(), threads, [&](uint64_t i) {
        return std::isnan(scores[i]) ? bins.count() : bins.of(scores[i]);
    });
    std::vector<uint64_t> place, weight;
    for (uint64_t b = 0; b < counts.size(); ++b) {
        if (counts[b] == 0) continue;
        place.push_back(b);
        weight.push_back(counts[b]);
    }
    std::vector<double> cuts;
    for (const size_t start : partition(place, weight, std::min(k, place.size()))) {
        cuts.push_back(
            bins.lower_edge((place[start - 1] + place[start] + 1) / 2));  // half way across the gap
    }
    return cuts;
}

// Sums over the blocks of a cluster; scores count from the lowest one, which loses fewer digits.
struct Moments {
    uint64_t count = 0;
    double sum = 0.0, squares = 0.0, perplexity = 0.0;

    void add(double score, double perplexity_of_score) {
        ++count;
        sum += score;
        squares += score * score;
        perplexity += perplexity_of_score;
    }
    void merge(const Moments& other) {
        count += other.count;
        sum += other.sum;
        squares += other.squares;
        perplexity += other.perplexity;
    }
};

std::vector<Moments> sum_moments(Scores scores, const Intervals& intervals, double low, double cap,
                                 int threads) {
    std::vector<std::vector<Moments>> parts(num_chunks(scores.n));
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        std::vector<Moments> moments(intervals.count());
        for (uint64_t i = first; i < last; ++i) {
            if (std::isnan(scores[i])) continue;
            const double score = scores[i];
            moments[intervals.of(scores[i])].add(score - low, det_exp(std::min(score, cap)));
        }
        parts[chunk] = std::move(moments);
    });
    std::vector<Moments> total(intervals.count());
    for (const auto& part : parts) {
        for (size_t c = 0; c < total.size(); ++c) total[c].merge(part[c]);
    }
    return total;
}

}  // namespace

Clusters cluster(Scores scores, int k, int bins, double cap, int threads) {
    if (k < 1 || k >= static_cast<int>(kMaxIntervals))
        throw std::invalid_argument("k: must lie between 1 and 63");
    if (bins < k || bins > (1 << 16)) throw std::invalid_argument("bins: must lie between k and 65536");
    if (std::isnan(cap)) throw std::invalid_argument("cap: must be a number");
    const Range range = find_range(scores, threads);
    if (range.seen == 0) throw std::invalid_argument("scores: no block has one");

    Clusters result;
    result.cuts =
        find_cuts(scores, Bins(range, static_cast<uint64_t>(bins)), static_cast<size_t>(k), threads);
    result.unseen = scores.n - range.seen;
    double distance = 0.0;
    for (const Moments& sums : sum_moments(scores, Intervals(result.cuts), range.low, cap, threads)) {
        const auto count = static_cast<double>(sums.count);
        result.counts.push_back(static_cast<int64_t>(sums.count));
        result.mean_perplexity.push_back(sums.perplexity / count);
        distance += std::max(0.0, sums.squares - sums.sum * sums.sum / count);
    }
    result.mse = distance / static_cast<double>(range.seen);
    return result;
}

}  // namespace mlfr
