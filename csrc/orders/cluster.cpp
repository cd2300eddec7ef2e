#include "orders/cluster.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/vector.h"
#include "orders/partition.h"
#include "orders/select.h"

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

    // Never decreases as the score rises, despite rounding: a product with a positive constant is monotonic.
    uint64_t of(float score) const {
        const double position = (static_cast<double>(score) - static_cast<double>(range_.low)) * per_unit_;
        return static_cast<uint64_t>(
            std::min(static_cast<int32_t>(position), static_cast<int32_t>(count_) - 1));
    }

    // The smallest float whose bin is at least `bin`, found by bisection, so that rounding puts no score on
    // the wrong side.
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
            run_vectorised([&] {
                for (uint64_t j = 0; j < count; ++j) {
                    const float score = scores[first + j];
                    of[j] = static_cast<uint32_t>(std::isnan(score) ? bins.count() : bins.of(score));
                }
            });
        });
    std::vector<uint64_t> position, weight;
    for (uint64_t b = 0; b < counts.size(); ++b) {
        if (counts[b] == 0) continue;
        position.push_back(b);
        weight.push_back(counts[b]);
    }
    std::vector<double> cuts;
    for (const size_t start : partition(position, weight, std::min(k, position.size()))) {
        cuts.push_back(
            bins.lower_edge((position[start - 1] + position[start] + 1) / 2));  // half way across the gap
    }
    return cuts;
}

}  // namespace

std::vector<double> cluster(Scores scores, int k, int bins, int threads) {
    if (k < 1 || k >= static_cast<int>(kMaxIntervals))
        throw std::invalid_argument("k: must lie between 1 and 63");
    if (bins < k || bins > (1 << 16)) throw std::invalid_argument("bins: must lie between k and 65536");
    const ScoreRange range = find_range(scores, threads);
    if (range.seen == 0) throw std::invalid_argument("scores: no block has one");
    return find_cuts(scores, Bins(range, static_cast<uint64_t>(bins)), static_cast<size_t>(k), threads);
}

}  // namespace mlfr
