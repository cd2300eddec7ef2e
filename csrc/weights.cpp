#include "weights.h"

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
    : scores_(scores), intervals_(weighting.cuts), cap_(weighting.cap), unit_(integer_unit(scores.n)) {
    check(weighting);
    std::vector<double> mass = weighting.mass;
    mass.push_back(weighting.unseen_mass);
    set_shares(std::move(mass), count_blocks(threads));
}

void BlockWeights::check(const Weighting& weighting) const {
    if (weighting.mass.size() != intervals_.count()) {
        throw std::invalid_argument("mass: must have one more entry than cuts");
    }
    if (!(cap_ > -std::numeric_limits<double>::infinity())) {
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
    const size_t k = clusters();
    const uint64_t chunks = num_chunks(scores_.n);
    std::vector<uint64_t> counts(chunks * k, 0);
    std::vector<float> highest(chunks * k, -std::numeric_limits<float>::infinity());
    for_chunks(scores_.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        std::vector<uint64_t> count(k, 0);
        std::vector<float> high(k, -std::numeric_limits<float>::infinity());
        for (uint64_t i = first; i < last; ++i) {
            const float score = scores_.checked(i);
            const size_t c = cluster(score);
            ++count[c];
            high[c] = high[c] < score ? score : high[c];
        }
        std::copy(count.begin(), count.end(), &counts[chunk * k]);
        std::copy(high.begin(), high.end(), &highest[chunk * k]);
    });
    std::vector<uint64_t> total(k, 0);
    heaviest_.assign(k, -std::numeric_limits<double>::infinity());
    for (uint64_t part = 0; part < chunks * k; ++part) {
        total[part % k] += counts[part];
        heaviest_[part % k] =
            std::max(heaviest_[part % k], std::min(static_cast<double>(highest[part]), cap_));
    }
    return total;
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

std::vector<uint64_t> BlockWeights::chunk_sums(int threads) const {
    const size_t k = clusters();
    std::vector<uint64_t> sums(num_chunks(scores_.n) * k, 0);
    for_chunks(scores_.n, threads, [&](uint64_t chunk, uint64_t first, uint64_t last) {
        std::vector<uint64_t> sum(k, 0);
        for (uint64_t i = first; i < last; ++i) {
            const size_t c = cluster(scores_[i]);
            sum[c] += integer(scores_[i], c);
        }
        std::copy(sum.begin(), sum.end(), &sums[chunk * k]);
    });
    return sums;
}

}  // namespace mlfr
