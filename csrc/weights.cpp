#include "weights.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace mlfr {

namespace {

double integer_unit(uint64_t n) {
    int bits = 52;
    while (bits > 0 && (n >> (62 - bits)) > 0) --bits;
    return static_cast<double>(uint64_t{1} << bits);
}

}  // namespace

BlockWeights::BlockWeights(Scores scores, const Weighting& weighting, int threads)
    : scores_(scores),
      intervals_(weighting.cuts),
      cap_(static_cast<float>(weighting.cap)),
      unit_(integer_unit(scores.n)) {
    check(weighting);
    std::vector<double> mass = weighting.mass;
    mass.push_back(weighting.unseen_mass);
    set_shares(std::move(mass), count_blocks(threads));
}

void BlockWeights::check(const Weighting& weighting) const {
    if (weighting.mass.size() != intervals_.count()) {
        throw std::invalid_argument("mass: must have one more entry than cuts");
    }
    if (!(cap_ > -std::numeric_limits<float>::infinity())) {
        throw std::invalid_argument("cap: must be finite, or +inf for none");
    }
    auto legal = [](double mass) { return mass >= 0.0 && std::isfinite(mass); };
    if (!std::all_of(weighting.mass.begin(), weighting.mass.end(), legal)) {
        throw std::invalid_argument("mass: must be finite and not negative");
    }
    if (!legal(weighting.unseen_mass))
        throw std::invalid_argument("unseen_mass: must be finite and not negative");
}

// Counts the blocks of each cluster and finds its heaviest one.
std::vector<uint64_t> BlockWeights::count_blocks(int threads) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const size_t k = clusters();
    const uint64_t chunks = num_chunks(scores_.n);
    std::vector<uint64_t> counts(chunks * k, 0);
    std::vector<float> highest(chunks * k, -kInfinity);
    std::vector<float> lowest(chunks, kInfinity);  // to find an infinite one
    for_chunks(scores_.n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<uint64_t> count(kTables * k, 0);
        std::vector<float> high(kTables * k, -kInfinity);
        uint32_t cluster[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t size) {
            const float* scores = scores_.data + first;
            const ScoreRange range = find_range(scores, size);
            lowest[chunk] = std::min(lowest[chunk], range.low);
            if (k == 2) {  // one interval, and the blocks without a score
                count[0] += range.seen;
                count[kTables] += size - range.seen;
                high[0] = std::max(high[0], range.high);
                return;
            }
            intervals_.read(scores, size, static_cast<uint32_t>(k - 1), cluster);
            for (uint64_t j = 0; j < size; ++j) {
                const size_t c = kTables * cluster[j] + j % kTables;
                ++count[c];
                high[c] = high[c] < scores[j] ? scores[j] : high[c];
            }
        });
        for (size_t c = 0; c < kTables * k; ++c) {
            counts[chunk * k + c / kTables] += count[c];
            float& highest_here = highest[chunk * k + c / kTables];
            highest_here = std::max(highest_here, high[c]);
        }
    });
    std::vector<uint64_t> total(k, 0);
    heaviest_.assign(k, -kInfinity);
    for (uint64_t part = 0; part < chunks * k; ++part) {
        total[part % k] += counts[part];
        heaviest_[part % k] = std::max(heaviest_[part % k], highest[part]);
    }
    const bool is_infinite = std::count(heaviest_.begin(), heaviest_.end(), kInfinity) > 0 ||
                             std::count(lowest.begin(), lowest.end(), -kInfinity) > 0;
    if (is_infinite) count_seen(scores_, threads);  // names the block
    for (float& heaviest : heaviest_) heaviest = std::min(heaviest, cap_);
    heaviest_[k - 1] = 0.0f;  // of blocks without a score
    return total;
}

void BlockWeights::read(uint64_t first, uint64_t count, uint32_t* cluster, float* log_relative) const {
    const float* scores = scores_.data + first;
    if (intervals_.count() == 1) {  // nothing to look up
        const float heaviest = heaviest_[0], cap = cap_;
        for (uint64_t j = 0; j < count; ++j) {
            const float relative = std::max(-80.0f, std::min(scores[j], cap) - heaviest);
            log_relative[j] = std::isnan(scores[j]) ? 0.0f : relative;
            cluster[j] = std::isnan(scores[j]);
        }
        return;
    }
    intervals_.read(scores, count, static_cast<uint32_t>(clusters() - 1), cluster);
    for (uint64_t j = 0; j < count; ++j) {
        const float score = std::isnan(scores[j]) ? 0.0f : std::min(scores[j], cap_);
        log_relative[j] = std::max(-80.0f, score - heaviest_[cluster[j]]);
    }
}

void BlockWeights::set_shares(std::vector<double> mass, const std::vector<uint64_t>& counts) {
    double total = 0.0;
    for (size_t c = 0; c < mass.size(); ++c) {
        if (counts[c] == 0) mass[c] = 0.0;
        total += mass[c];
    }
    if (!(total > 0.0))
        throw std::invalid_argument("mass: no block can be drawn, no cluster that has mass has blocks");
    if (!std::isfinite(total)) throw std::invalid_argument("mass: too large");
    for (size_t c = 0; c < mass.size(); ++c) {
        share_.push_back(mass[c] / total);
        if (share_[c] > 0.0) drawable_ += counts[c];
    }
}

void BlockWeights::read_integers(uint64_t first, uint64_t count, uint32_t* cluster, uint64_t* weight) const {
    float relative[kBatch];
    read(first, count, cluster, relative);
    for (uint64_t j = 0; j < count; ++j) relative[j] = det_expf(relative[j]);
    for (uint64_t j = 0; j < count; ++j) {
        weight[j] =
            static_cast<uint64_t>(static_cast<int64_t>(static_cast<double>(relative[j]) * unit_ + 0.5));
    }
}

std::vector<uint64_t> BlockWeights::chunk_sums(int threads) const {
    const size_t k = clusters();
    std::vector<uint64_t> sums(num_chunks(scores_.n) * k, 0);
    for_chunks(scores_.n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        std::vector<uint64_t> sum(kTables * k, 0);
        uint32_t cluster[kBatch];
        uint64_t weight[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            read_integers(first, count, cluster, weight);
            for (uint64_t j = 0; j < count; ++j) sum[kTables * cluster[j] + j % kTables] += weight[j];
        });
        for (size_t c = 0; c < kTables * k; ++c) sums[chunk * k + c / kTables] += sum[c];
    });
    return sums;
}

}  // namespace mlfr
