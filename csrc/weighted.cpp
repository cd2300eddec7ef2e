// Weighted sampling: systematic visits, and choice without replacement.
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "detmath.h"
#include "order.h"
#include "select.h"
#include "shuffle.h"

namespace mlfr {

namespace {

constexpr size_t kMaxClusters = 64;

// The probability of each block, up to a common factor: scale of its cluster x weight within it.
class BlockWeights {
  public:
    BlockWeights(Scores scores, const Weighting& weighting, int threads) : scores_(scores), cuts_(weighting.cuts) {
        const size_t clusters = cuts_.size() + 1;
        if (weighting.mass.size() != clusters) throw std::invalid_argument("mass: must have one more entry than cuts");
        if (clusters > kMaxClusters) throw std::invalid_argument("cuts: at most 63");
        for (size_t c = 1; c < cuts_.size(); ++c) {
            if (!(cuts_[c - 1] <= cuts_[c])) throw std::invalid_argument("cuts: must ascend");
        }
        cap_ = weighting.cap;
        if (!std::isfinite(cap_)) throw std::invalid_argument("cap: must be finite");
        std::vector<double> mass = weighting.mass;
        mass.push_back(weighting.unseen_mass);
        for (const double m : mass) {
            if (!(m >= 0.0 && std::isfinite(m))) throw std::invalid_argument("mass: must be finite and not negative");
        }
        count_seen(scores, threads);  // refuses infinite scores
        set_scales(mass, cluster_sums(threads));
    }

    // Cluster of a block; the last number is that of the blocks without a score.
    size_t cluster(float score) const {
        if (std::isnan(score)) return cuts_.size() + 1;
        size_t c = 0;
        while (c < cuts_.size() && cuts_[c] <= static_cast<double>(score)) ++c;
        return c;
    }

    // Probability of block i; 0 where it cannot be drawn.
    double operator()(uint64_t i) const {
        const float score = scores_[i];
        const double scale = scale_[cluster(score)];
        return scale == 0.0 ? 0.0 : scale * within(score);
    }

    uint64_t drawable() const { return drawable_; }

  private:
    double within(float score) const {
        return std::isnan(score) ? 1.0 : det_exp(std::min(static_cast<double>(score), cap_) - cap_);
    }

    struct Sums {
        double weight[kMaxClusters + 1] = {};
        uint64_t count[kMaxClusters + 1] = {};
    };

    Sums cluster_sums(int threads) const {
        std::vector<Sums> parts(num_chunks(scores_.n));
        for_chunks(scores_.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
            Sums sums;
            for (uint64_t i = first; i < last; ++i) {
                const size_t c = cluster(scores_[i]);
                sums.weight[c] += within(scores_[i]);
                ++sums.count[c];
            }
            parts[chunk] = sums;
        });
        Sums total;
        for (const Sums& part : parts) {
            for (size_t c = 0; c <= kMaxClusters; ++c) {
                total.weight[c] += part.weight[c];
                total.count[c] += part.count[c];
            }
        }
        return total;
    }

    void set_scales(const std::vector<double>& mass, const Sums& sums) {
        double total_mass = 0.0;
        for (size_t c = 0; c < mass.size(); ++c) {
            if (sums.weight[c] > 0.0) total_mass += mass[c];
        }
        if (!(total_mass > 0.0)) throw std::invalid_argument("mass: no block can be drawn");
        scale_.assign(mass.size(), 0.0);
        for (size_t c = 0; c < mass.size(); ++c) {
            if (sums.weight[c] > 0.0 && mass[c] > 0.0) {
                scale_[c] = mass[c] / total_mass / sums.weight[c];
                drawable_ += sums.count[c];
            }
        }
    }

    Scores scores_;
    std::vector<double> cuts_;
    double cap_ = 0.0;
    std::vector<double> scale_;
    uint64_t drawable_ = 0;
};

}  // namespace

// Every block gets a stretch of e_i in fixed point on a line of length `draws`, and is visited once for each point
// offset + k that falls into it. Integer sums make the points the same however the line is cut into chunks.
template <class Id>
void order_visits(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads, Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    if (draws >= uint64_t{1} << 47) throw std::invalid_argument("draws: too many");
    const int fraction_bits = draws < (uint64_t{1} << 31) ? 32 : 16;
    const uint64_t length = draws << fraction_bits;
    const double unit = static_cast<double>(length);
    auto stretch = [&](uint64_t i) { return static_cast<uint64_t>(weights(i) * unit); };

    const uint64_t chunks = num_chunks(scores.n);
    std::vector<uint64_t> start(chunks);
    std::vector<uint64_t> last_of(chunks, std::numeric_limits<uint64_t>::max());  // last drawable block of a chunk
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t sum = 0;
        for (uint64_t i = first; i < last; ++i) {
            const uint64_t part = stretch(i);
            sum += part;
            if (part > 0) last_of[chunk] = i;
        }
        start[chunk] = sum;
    });
    std::exclusive_scan(start.begin(), start.end(), start.begin(), uint64_t{0});
    uint64_t last_drawable = std::numeric_limits<uint64_t>::max();
    for (const uint64_t candidate : last_of) {
        if (candidate != std::numeric_limits<uint64_t>::max()) last_drawable = candidate;
    }
    const uint64_t offset = derive(seed, 2) >> (64 - fraction_bits);

    std::vector<uint32_t> visits(scores.n);
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        uint64_t position = start[chunk];
        // Points before the end of block i - 1. Rounding may leave the line a little short or long: it ends at its
        // length, with the last drawable block.
        auto points_before = [&](uint64_t i) {
            const uint64_t end = i > last_drawable ? length : std::min(position, length);
            return (end + offset) >> fraction_bits;
        };
        uint64_t points = points_before(first);
        for (uint64_t i = first; i < last; ++i) {
            position += stretch(i);
            const uint64_t now = points_before(i + 1);
            visits[i] = static_cast<uint32_t>(now - points);
            points = now;
        }
    });
    shuffle_visits(visits.data(), scores.n, draws, seed, threads, out);
}

// Exponential keys (Efraimidis & Spirakis 2006): the k smallest of -ln(u_i) / w_i are a weighted choice without
// replacement. The order of the keys is biased, so what was chosen is shuffled.
template <class Id>
void order_choice(Scores scores, const Weighting& weighting, uint64_t draws, uint64_t seed, int threads, Id* out) {
    const BlockWeights weights(scores, weighting, threads);
    const uint64_t kept = weights.drawable();
    std::vector<uint32_t> keys(scores.n);
    const uint64_t uniform_seed = derive(seed, 3);
    for_chunks(scores.n, threads, [&](uint64_t, uint64_t first, uint64_t last) {
        for (uint64_t i = first; i < last; ++i) {
            const double weight = weights(i);
            if (weight == 0.0) {
                keys[i] = kNoKey;
                continue;
            }
            const double uniform = (static_cast<double>(derive(uniform_seed, i) >> 11) + 0.5) * 0x1p-53;
            const double key = -det_log(uniform) / weight;
            keys[i] = float_key(static_cast<float>(std::min(key, 3e38)));
        }
    });
    auto key_of = [&keys](uint64_t i) { return keys[i]; };
    uint64_t pass = 0;
    const KeyFilter drawable(scores.n, kNoKey, 0, Side::kBelow, threads, key_of);
    for (; draws >= kept; draws -= kept, out += kept) {
        shuffle_multiset(scores.n, kept, derive(seed, 16 + pass++), threads, drawable, out);
    }
    if (draws == 0) return;
    const Cut cut = key_at_rank(scores.n, draws - 1, threads, key_of);
    const KeyFilter chosen(scores.n, cut.key, draws - cut.below, Side::kBelow, threads, key_of);
    shuffle_multiset(scores.n, draws, derive(seed, 16 + pass), threads, chosen, out);
}

#define MLFR_INSTANTIATE(Id)                                                                      \
    template void order_visits<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*);       \
    template void order_choice<Id>(Scores, const Weighting&, uint64_t, uint64_t, int, Id*);
MLFR_INSTANTIATE(uint32_t)
MLFR_INSTANTIATE(uint64_t)

}  // namespace mlfr
