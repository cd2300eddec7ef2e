#include "orders/partition.h"

#include <algorithm>
#include <limits>

namespace mlfr {

namespace {

using Wide = unsigned __int128;

// Dynamic programming: best_[j] of a layer is the least cost of the first j points in layer + 1 intervals,
// none of them empty. The last split of a best partition moves right with j (Wu 1991), so divide and conquer
// finds a layer in O(m log m). Sums of points are integers: costs of narrow intervals far from 0 lose no
// digits.
class Partition {
  public:
    Partition(const std::vector<uint64_t>& position, const std::vector<uint64_t>& weight)
        : points_(position.size()), weight_(points_ + 1), sum_(points_ + 1), squares_(points_ + 1) {
        for (size_t i = 0; i < points_; ++i) {
            const Wide moment = static_cast<Wide>(weight[i]) * position[i];
            weight_[i + 1] = weight_[i] + weight[i];
            sum_[i + 1] = sum_[i] + moment;
            squares_[i + 1] = squares_[i] + moment * position[i];
        }
    }

    std::vector<size_t> solve(size_t k) {
        best_.assign(points_ + 1, 0.0);
        for (size_t j = 1; j <= points_; ++j) best_[j] = cost(0, j);
        std::vector<std::vector<size_t>> splits(k);
        for (size_t layer = 1; layer < k; ++layer) {
            next_.assign(points_ + 1, 0.0);
            split_.assign(points_ + 1, 0);
            fill(layer + 1, points_, layer, points_ - 1);
            best_.swap(next_);
            splits[layer].swap(split_);
        }
        std::vector<size_t> starts(k - 1);
        size_t end = points_;
        for (size_t layer = k - 1; layer >= 1; --layer) end = starts[layer - 1] = splits[layer][end];
        return starts;
    }

  private:
    double cost(size_t first, size_t last) const {
        const Wide weight = weight_[last] - weight_[first];
        const Wide sum = sum_[last] - sum_[first];
        return static_cast<double>((squares_[last] - squares_[first]) * weight - sum * sum) /
               static_cast<double>(weight);
    }

    // Finds next_[j] and split_[j] for j in [low, high], whose splits lie in [split_low, split_high];
    // split_low < low.
    void fill(size_t low, size_t high, size_t split_low, size_t split_high) {
        if (low > high) return;
        const size_t middle = low + (high - low) / 2;
        next_[middle] = std::numeric_limits<double>::infinity();
        for (size_t s = split_low; s <= std::min(middle - 1, split_high); ++s) {
            const double candidate = best_[s] + cost(s, middle);
            if (candidate < next_[middle]) {
                next_[middle] = candidate;
                split_[middle] = s;
            }
        }
        const size_t split = split_[middle];
        fill(low, middle - 1, split_low, split);
        fill(middle + 1, high, split, split_high);
    }

    size_t points_;
    std::vector<uint64_t> weight_;
    std::vector<Wide> sum_, squares_;
    std::vector<double> best_, next_;
    std::vector<size_t> split_;
};

}  // namespace

std::vector<size_t> partition(const std::vector<uint64_t>& position, const std::vector<uint64_t>& weight,
                              size_t k) {
    return Partition(position, weight).solve(k);
}

}  // namespace mlfr
