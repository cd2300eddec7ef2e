#include "cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "detmath.h"
#include "partition.h"
#include "select.h"

namespace mlfr {

namespace {

// Bins of equal width between the lowest and the highest score.
class Bins {
  public:
    Bins(ScoreRange range, uint64_t count) : range_(range), count_(count) {
        const double width = static_cast<double>(range.high) - static_cast<double>(range.low);
        per_unit_ = width > 0.0 ? static_cast<double>(count) / width : 0.0;
    }

    uint64_t count() const { return count_; }

    // Never falls with the score, rounding included: a product by a positive constant is monotonic.
    uint64_t of(float score) const {
        const double place = (static_cast<double>(score) - static_cast<double>(range_.low)) * per_unit_;
        return static_cast<uint64_t>(std::min(static_cast<int32_t>(place), static_cast<int32_t>(count_) - 1));
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
    ScoreRange range_;
    uint64_t count_;
    double per_unit_;
};

std::vector<double> find_cuts(Scores scores, const Bins& bins, size_t k, int threads) {
    const std::vector<uint64_t> counts =
        histogram(scores.n, bins.count(), threads, [&](uint64_t first, uint64_t count, uint32_t* of) {
            for (uint64_t j = 0; j < count; ++j) {
                const float score = scores[first + j];
                of[j] = static_cast<uint32_t>(std::isnan(score) ? bins.count() : bins.of(score));
            }
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

// exp(min(score, cap)) of a batch; where one is beyond the range of fp32's exponential, of all in fp64.
void exponentiate(const float* scores, uint64_t count, double cap, float* capped, double* exponentials) {
    constexpr float kLargest = 80.0f;
    const auto limit = static_cast<float>(std::min(cap, 1e30));
    for (uint64_t j = 0; j < count; ++j) capped[j] = std::min(scores[j], limit);
    const ScoreRange range = find_range(capped, count);
    if (range.seen > 0 && (range.low < -kLargest || range.high > kLargest)) {
        for (uint64_t j = 0; j < count; ++j) {
            exponentials[j] = det_exp(std::min(static_cast<double>(scores[j]), cap));
        }
        return;
    }
    for (uint64_t j = 0; j < count; ++j) exponentials[j] = static_cast<double>(det_expf(capped[j]));
}

std::vector<Moments> sum_moments(Scores scores, const Intervals& intervals, double low, double cap,
                                 int threads) {
    std::vector<std::vector<Moments>> parts(num_chunks(scores.n));
    const size_t k = intervals.count();
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        // The last cluster is that of blocks without a score.
        std::vector<Moments> tables(kTables * (k + 1));
        uint32_t number[kBatch];
        float capped[kBatch];
        double perplexity[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const float* batch = scores.data + first;
            intervals.read(batch, count, static_cast<uint32_t>(k), number);
            exponentiate(batch, count, cap, capped, perplexity);
            for (uint64_t j = 0; j < count; ++j) {
                tables[kTables * number[j] + j % kTables].add(static_cast<double>(batch[j]) - low,
                                                              perplexity[j]);
            }
        });
        parts[chunk].resize(k);
        for (size_t c = 0; c < kTables * k; ++c) parts[chunk][c / kTables].merge(tables[c]);
    });
    std::vector<Moments> total(k);
    for (const auto& part : parts) {
        for (size_t c = 0; c < k; ++c) total[c].merge(part[c]);
    }
    return total;
}

}  // namespace

Clusters cluster(Scores scores, int k, int bins, double cap, int threads) {
    if (k < 1 || k >= static_cast<int>(kMaxIntervals))
        throw std::invalid_argument("k: must lie between 1 and 63");
    if (bins < k || bins > (1 << 16)) throw std::invalid_argument("bins: must lie between k and 65536");
    if (std::isnan(cap)) throw std::invalid_argument("cap: must be a number");
    const ScoreRange range = find_range(scores, threads);
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
