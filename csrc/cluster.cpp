#include "cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "detmath.h"
#include "select.h"

namespace mlfr {

float percentile(Scores scores, double q, int threads) {
    if (!(q >= 0.0 && q <= 1.0)) throw std::invalid_argument("q: must lie between 0 and 1");
    const uint64_t seen = count_seen(scores, threads);
    if (seen == 0) throw std::invalid_argument("scores: no block has one");
    const auto rank = static_cast<uint64_t>(std::ceil(q * static_cast<double>(seen)));
    const Cut cut = key_at_rank(scores.n, std::max<uint64_t>(rank, 1) - 1, threads,
                                [&](uint64_t i) { return float_key(scores[i]); });
    return key_float(cut.key);
}

namespace {

struct Bins {
    double low, width;
    std::vector<uint64_t> counts;

    size_t of(float score) const {
        if (width == 0.0) return 0;
        const auto bin = static_cast<size_t>((static_cast<double>(score) - low) / width);
        return std::min(bin, counts.size() - 1);
    }
};

Bins fill_bins(Scores scores, int bins, int threads) {
    struct Part {
        float low = std::numeric_limits<float>::infinity(), high = -low;
        std::vector<uint32_t> counts;
    };
    std::vector<Part> parts(num_chunks(scores.n));
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        for (uint64_t i = first; i < last; ++i) {
            if (std::isnan(scores[i])) continue;
            parts[chunk].low = std::min(parts[chunk].low, scores[i]);
            parts[chunk].high = std::max(parts[chunk].high, scores[i]);
        }
    });
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (const Part& part : parts) {
        low = std::min(low, static_cast<double>(part.low));
        high = std::max(high, static_cast<double>(part.high));
    }
    Bins result{low, (high - low) / bins, std::vector<uint64_t>(static_cast<size_t>(bins), 0)};
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        parts[chunk].counts.assign(static_cast<size_t>(bins), 0);
        for (uint64_t i = first; i < last; ++i) {
            if (!std::isnan(scores[i])) ++parts[chunk].counts[result.of(scores[i])];
        }
    });
    for (const Part& part : parts) {
        for (size_t b = 0; b < result.counts.size(); ++b) result.counts[b] += part.counts[b];
    }
    return result;
}

// Exact k-means of weighted points in ascending order. best[j] of a layer is the least cost of the first j points; the
// split that reaches it moves right with j (Wu 1991), so divide and conquer finds a layer in O(m log m).
class IntervalPartition {
  public:
    IntervalPartition(const std::vector<double>& x, const std::vector<double>& weight)
        : weight_(x.size() + 1), sum_(x.size() + 1), squares_(x.size() + 1) {
        for (size_t i = 0; i < x.size(); ++i) {
            weight_[i + 1] = weight_[i] + weight[i];
            sum_[i + 1] = sum_[i] + weight[i] * x[i];
            squares_[i + 1] = squares_[i] + weight[i] * x[i] * x[i];
        }
    }

    // First points of the intervals 1 ... k-1.
    std::vector<size_t> solve(size_t k) {
        const size_t m = weight_.size() - 1;
        std::vector<double> best(m + 1);
        for (size_t j = 0; j <= m; ++j) best[j] = cost(0, j);
        std::vector<std::vector<size_t>> split(k, std::vector<size_t>(m + 1, 0));
        for (size_t layer = 1; layer < k; ++layer) {
            std::vector<double> next(m + 1, 0.0);
            improve(best, next, split[layer], 1, m, 0, m);
            best = next;
        }
        std::vector<size_t> starts(k - 1);
        size_t end = m;
        for (size_t layer = k - 1; layer >= 1; --layer) end = starts[layer - 1] = split[layer][end];
        return starts;
    }

  private:
    double cost(size_t first, size_t last) const {
        const double weight = weight_[last] - weight_[first];
        if (weight <= 0.0) return 0.0;
        const double sum = sum_[last] - sum_[first];
        return std::max(0.0, squares_[last] - squares_[first] - sum * sum / weight);
    }

    void improve(const std::vector<double>& best, std::vector<double>& next, std::vector<size_t>& split, size_t low,
                 size_t high, size_t split_low, size_t split_high) const {
        if (low > high) return;
        const size_t middle = low + (high - low) / 2;
        next[middle] = std::numeric_limits<double>::infinity();
        for (size_t s = split_low; s <= std::min(middle, split_high); ++s) {
            const double candidate = best[s] + cost(s, middle);
            if (candidate < next[middle]) {
                next[middle] = candidate;
                split[middle] = s;
            }
        }
        improve(best, next, split, low, middle - 1, split_low, split[middle]);
        improve(best, next, split, middle + 1, high, split[middle], split_high);
    }

    std::vector<double> weight_, sum_, squares_;
};

std::vector<double> find_cuts(const Bins& bins, int k) {
    std::vector<double> centre, weight;
    std::vector<size_t> number;
    for (size_t b = 0; b < bins.counts.size(); ++b) {
        if (bins.counts[b] == 0) continue;
        centre.push_back(static_cast<double>(b) - 0.5 * static_cast<double>(bins.counts.size()));
        weight.push_back(static_cast<double>(bins.counts[b]));
        number.push_back(b);
    }
    std::vector<double> cuts;
    const size_t clusters = std::min(static_cast<size_t>(k), centre.size());
    for (const size_t start : IntervalPartition(centre, weight).solve(clusters)) {
        // Half way between the occupied bins on both sides, so that rounding moves no score across.
        cuts.push_back(bins.low + bins.width * 0.5 * static_cast<double>(number[start - 1] + 1 + number[start]));
    }
    return cuts;
}

struct Moments {
    uint64_t count = 0;
    double sum = 0.0, squares = 0.0, perplexity = 0.0;
};

}  // namespace

Clusters cluster(Scores scores, int k, int bins, double cap, int threads) {
    if (k < 1 || k > 63) throw std::invalid_argument("k: must lie between 1 and 63");
    if (bins < k || bins > (1 << 16)) throw std::invalid_argument("bins: must lie between k and 65536");
    const uint64_t seen = count_seen(scores, threads);
    if (seen == 0) throw std::invalid_argument("scores: no block has one");
    const Bins filled = fill_bins(scores, bins, threads);
    Clusters result{find_cuts(filled, k), {}, {}, scores.n - seen, 0.0};

    const size_t clusters = result.cuts.size() + 1;
    std::vector<std::vector<Moments>> parts(num_chunks(scores.n), std::vector<Moments>(clusters));
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        for (uint64_t i = first; i < last; ++i) {
            if (std::isnan(scores[i])) continue;
            const double score = scores[i];
            const auto c = std::upper_bound(result.cuts.begin(), result.cuts.end(), score) - result.cuts.begin();
            Moments& moments = parts[chunk][static_cast<size_t>(c)];
            const double shifted = score - filled.low;
            ++moments.count;
            moments.sum += shifted;
            moments.squares += shifted * shifted;
            moments.perplexity += det_exp(std::min(score, cap));
        }
    });
    double distance = 0.0;
    for (size_t c = 0; c < clusters; ++c) {
        Moments total;
        for (const auto& part : parts) {
            total.count += part[c].count;
            total.sum += part[c].sum;
            total.squares += part[c].squares;
            total.perplexity += part[c].perplexity;
        }
        const auto count = static_cast<double>(total.count);
        result.counts.push_back(static_cast<int64_t>(total.count));
        result.mean_perplexity.push_back(total.count ? total.perplexity / count : 0.0);
        if (total.count) distance += std::max(0.0, total.squares - total.sum * total.sum / count);
    }
    result.mse = distance / static_cast<double>(seen);
    return result;
}

}  // namespace mlfr
