// Fuzz target of the orders: hostile numbers give std::invalid_argument exactly where they are illegal, and
// results keep their definitions, the same for any number of threads.
#include <numeric>
#include <stdexcept>

#include "orders/cluster.h"
#include "orders_case.h"

namespace {

using fuzz::Call;
using fuzz::Case;
using fuzz::cluster_of;
using fuzz::is_rounded;
using fuzz::ranked;
using fuzz::Reader;
using fuzz::require;
using fuzz::sample_counts;
using fuzz::take_samples;
using fuzz::throws;
using fuzz::Weighting;

void check_permutation(const Case& input) {
    const uint64_t n = input.scores.size();
    const auto counts = sample_counts(
        input, n, [&](int threads, auto* out) { mlfr::permutation(n, input.seed, threads, out); });
    require(std::all_of(counts.begin(), counts.end(), [](uint64_t count) { return count == 1; }),
            "a permutation");
}

void check_visits(const Case& input, Reader& reader) {
    std::vector<uint32_t> visits(input.scores.size());
    for (uint32_t& count : visits) count = reader.take<uint8_t>() % 5;
    if (!visits.empty() && input.seed % 64 == 0)
        visits[input.seed / 64 % visits.size()] = 70000;  // two buckets
    const uint64_t samples = std::accumulate(visits.begin(), visits.end(), uint64_t{0});
    require(mlfr::sum_visits(visits.data(), visits.size(), input.threads) == samples, "sum_visits");
    const auto counts = sample_counts(input, samples, [&](int threads, auto* out) {
        mlfr::shuffle_visits(visits.data(), visits.size(), samples, input.seed, threads, out);
    });
    require(std::equal(counts.begin(), counts.end(), visits.begin()), "each block as often as asked for");
}

void check_threshold(const Case& input, Reader& reader) {
    const double drop = fuzz::take_share(reader);
    const bool keep_unseen = reader.take<uint8_t>() % 2 == 0;
    const uint64_t samples = take_samples(reader), seen = input.seen();
    const double drop_hardest = reader.take<uint8_t>() % 2 == 0 ? 0.0 : fuzz::take_share(reader);
    const bool legal = drop >= 0.0 && drop < 1.0 && drop_hardest >= 0.0 && drop_hardest < 1.0 &&
                       drop + drop_hardest < 1.0 && input.finite();
    mlfr::Threshold found{};
    const bool refused = throws<std::invalid_argument>(
        [&] { found = mlfr::threshold(input.view(), drop, drop_hardest, input.threads); });
    require(refused != legal, "threshold refuses what is illegal");
    if (!legal) return;
    const uint64_t lowest = found.lowest.dropped, highest = found.highest.dropped;
    require(found.seen == seen && (seen == 0 ? lowest + highest == 0 : lowest + highest < seen),
            "counts of a threshold");
    require(std::abs(static_cast<double>(lowest) - drop * static_cast<double>(seen)) <= 1.0 &&
                std::abs(static_cast<double>(highest) - drop_hardest * static_cast<double>(seen)) <= 1.0,
            "shares dropped");

    const std::vector<uint64_t> ids = ranked(input);
    std::vector<bool> kept(input.scores.size(), keep_unseen);
    for (uint64_t rank = 0; rank < seen; ++rank) {
        kept[ids[rank]] = rank >= lowest && rank < seen - highest;
    }
    if (seen > 0) {
        require(input.scores[ids[lowest]] == found.lowest.cut, "the cut is the lowest score that is kept");
        if (drop_hardest > 0.0) {
            require(input.scores[ids[seen - 1 - highest]] == found.highest.cut, "the highest that is kept");
        }
    }
    const auto size = static_cast<uint64_t>(std::count(kept.begin(), kept.end(), true));
    auto order = [&](uint64_t count, uint64_t seed, int threads, auto* out) {
        mlfr::order_threshold(input.view(), drop, drop_hardest, keep_unseen, count, seed, threads, out);
    };
    if (size == 0 && samples > 0) {
        uint32_t none;
        require(throws<std::invalid_argument>([&] { order(samples, 0, 1, &none); }), "nothing to draw from");
        return;
    }
    const auto counts = sample_counts(
        input, samples, [&](int threads, auto* out) { order(samples, input.seed, threads, out); });
    for (uint64_t i = 0; i < counts.size(); ++i) {
        const bool right = kept[i] ? counts[i] - samples / size <= (samples % size > 0) : counts[i] == 0;
        require(right, "complete passes over what is kept");
    }
}

void check_percentiles(const Case& input, Reader& reader) {
    std::vector<double> shares(1 + reader.take<uint8_t>() % 5);
    for (double& q : shares) q = fuzz::take_share(reader);
    const uint64_t seen = input.seen();
    const bool legal =
        std::all_of(shares.begin(), shares.end(), [](double q) { return q >= 0.0 && q <= 1.0; }) &&
        input.finite() && seen > 0;
    std::vector<float> found;
    require(throws<std::invalid_argument>(
                [&] { found = mlfr::percentiles(input.view(), shares, input.threads); }) != legal,
            "percentiles refuses what is illegal");
    if (!legal) return;
    const std::vector<uint64_t> ids = ranked(input);
    for (size_t k = 0; k < shares.size(); ++k) {
        // From 1, rounded up; decimal shares may be a little beside.
        const double rank = shares[k] * static_cast<double>(seen), most = static_cast<double>(seen);
        const auto low = static_cast<uint64_t>(std::clamp(std::ceil(rank - 1e-6), 1.0, most));
        const auto high = static_cast<uint64_t>(std::clamp(std::ceil(rank + 1e-6), 1.0, most));
        require(found[k] == input.scores[ids[low - 1]] || found[k] == input.scores[ids[high - 1]],
                "percentiles");
    }
}

bool is_legal(const Weighting& weighting) {
    auto is_mass = [](double mass) { return std::isfinite(mass) && mass >= 0.0; };
    const auto& [cuts, cap, mass] = weighting;
    return cuts.size() <= 63 && mass.clusters.size() == cuts.size() + 1 &&
           std::none_of(cuts.begin(), cuts.end(), [](double cut) { return std::isnan(cut); }) &&
           std::is_sorted(cuts.begin(), cuts.end()) && is_mass(mass.unseen) &&
           std::all_of(mass.clusters.begin(), mass.clusters.end(), is_mass) &&
           cap >= static_cast<double>(std::numeric_limits<float>::lowest());
}

// How many samples each block and each cluster can expect; nothing where the weighting is illegal.
struct Expected {
    std::vector<size_t> cluster;
    std::vector<double> block, of_cluster;

    Expected(const Case& input, const Weighting& weighting) {
        if (!is_legal(weighting) || !input.finite()) return;
        std::vector<double> mass = weighting.mass.clusters;
        mass.push_back(weighting.mass.unseen);
        const size_t k = mass.size();
        std::vector<double> highest(k, -std::numeric_limits<double>::infinity()), sum(k, 0.0);
        std::vector<double> capped;
        const auto cap = static_cast<double>(static_cast<float>(weighting.cap));
        for (const float score : input.scores) {
            const size_t c = cluster_of(weighting.cuts, score, k - 1);
            cluster.push_back(c);
            capped.push_back(std::isnan(score) ? 0.0 : std::min(static_cast<double>(score), cap));
            highest[c] = std::max(highest[c], capped.back());
        }
        for (size_t i = 0; i < capped.size(); ++i) {
            block.push_back(std::exp(std::max(-80.0, capped[i] - highest[cluster[i]])));
            sum[cluster[i]] += block[i];
        }
        double total = 0.0;
        for (size_t c = 0; c < k; ++c) total += sum[c] > 0.0 ? mass[c] : 0.0;
        if (!(total > 0.0 && std::isfinite(total))) {
            block.clear();
            return;
        }
        for (size_t c = 0; c < k; ++c) of_cluster.push_back(sum[c] > 0.0 ? mass[c] / total : 0.0);
        for (size_t i = 0; i < block.size(); ++i) block[i] *= of_cluster[cluster[i]] / sum[cluster[i]];
    }

    bool legal() const { return !block.empty(); }
};

void check_weighted_visits(const Case& input, Reader& reader) {
    const Weighting weighting = fuzz::take_weighting(reader);
    const uint64_t samples = take_samples(reader);
    const Expected expected(input, weighting);
    auto draw = [&](uint64_t number, int threads, auto* out) {
        mlfr::order_visits(weighting.of(input.view(), threads), weighting.mass, number, input.seed, threads,
                           out);
    };
    uint32_t none;
    if (!expected.legal() || samples == 0) {
        require(throws<std::invalid_argument>([&] { draw((uint64_t{1} << 40) + samples, 1, &none); }),
                "order_visits refuses what is illegal");
    }
    if (!expected.legal()) return;
    const auto counts =
        sample_counts(input, samples, [&](int threads, auto* out) { draw(samples, threads, out); });
    std::vector<uint64_t> of_cluster(expected.of_cluster.size(), 0);
    const auto all = static_cast<double>(samples);
    for (uint64_t i = 0; i < counts.size(); ++i) {
        of_cluster[expected.cluster[i]] += counts[i];
        require(is_rounded(counts[i], all * expected.block[i]), "visits of a block");
        if (expected.of_cluster[expected.cluster[i]] == 0.0)
            require(counts[i] == 0, "no visits without mass");
    }
    for (size_t c = 0; c < of_cluster.size(); ++c) {
        require(is_rounded(of_cluster[c], all * expected.of_cluster[c]), "visits of a cluster");
    }
}

void check_choice(const Case& input, Reader& reader) {
    const Weighting weighting = fuzz::take_weighting(reader);
    const uint64_t samples = take_samples(reader);
    const Expected expected(input, weighting);
    auto choose = [&](int threads, auto* out) {
        mlfr::order_choice(weighting.of(input.view(), threads), weighting.mass, samples, input.seed, threads,
                           out);
    };
    if (!expected.legal()) {
        uint32_t none;
        require(throws<std::invalid_argument>([&] { choose(1, &none); }),
                "order_choice refuses what is illegal");
        return;
    }
    auto drawable = [&](size_t cluster) { return expected.of_cluster[cluster] > 0.0; };
    const auto all =
        static_cast<uint64_t>(std::count_if(expected.cluster.begin(), expected.cluster.end(), drawable));
    const auto counts = sample_counts(input, samples, choose);
    for (uint64_t i = 0; i < counts.size(); ++i) {
        const bool right =
            drawable(expected.cluster[i]) ? counts[i] - samples / all <= (samples % all > 0) : counts[i] == 0;
        require(right, "complete passes, then none twice");
    }
}

void check_cluster(const Case& input, Reader& reader) {
    const auto kind = reader.take<uint8_t>();
    const int k = kind < 16 ? reader.take<int>() : reader.take<uint8_t>() % 70;
    const int bins = kind % 16 < 2 ? reader.take<int>() : reader.take<uint16_t>() % 4200;
    const double cap = fuzz::take_number<double>(reader);
    const uint64_t seen = input.seen();
    const bool legal = k >= 1 && k <= 63 && bins >= k && bins <= 65536 && input.finite() && seen > 0;
    std::vector<double> cuts;
    require(throws<std::invalid_argument>(
                [&] { cuts = mlfr::cluster(input.view(), k, bins, input.threads); }) != legal,
            "cluster refuses what is illegal");
    if (!legal) return;
    const size_t size = cuts.size() + 1;
    require(size <= static_cast<size_t>(k), "at most k clusters");
    require(std::adjacent_find(cuts.begin(), cuts.end(), std::greater_equal<>()) == cuts.end(),
            "cuts ascend");
    std::vector<uint64_t> counts(size + 1, 0);
    for (const float score : input.scores) ++counts[cluster_of(cuts, score, size)];
    require(std::find(counts.begin(), counts.end() - 1, 0u) == counts.end() - 1, "no cluster is empty");
    if (!(cap >= static_cast<double>(std::numeric_limits<float>::lowest()))) return;
    const mlfr::BlockWeights weights(input.view(), cuts, cap, input.threads);
    require(weights.counts() == counts, "counts are those of the cuts");
    for (const double mean : weights.means(input.threads)) {
        require(mean >= 0.0 && std::isfinite(mean), "mean perplexity");
    }
}

}  // namespace

namespace fuzz {

Bytes make_input(mlfr::Stream& random) { return random_bytes(random, 16, 160); }

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Reader reader(data, size);
    const auto call = static_cast<Call>(reader.take<uint8_t>() % static_cast<uint8_t>(Call::kCount));
    const int threads = fuzz::take_threads(reader);
    const auto seed = reader.take<uint64_t>();
    const Case input{fuzz::take_scores(reader), threads, seed};
    if (call == Call::kPermutation) check_permutation(input);
    if (call == Call::kVisits) check_visits(input, reader);
    if (call == Call::kThreshold) check_threshold(input, reader);
    if (call == Call::kPercentiles) check_percentiles(input, reader);
    if (call == Call::kWeightedVisits) check_weighted_visits(input, reader);
    if (call == Call::kChoice) check_choice(input, reader);
    if (call == Call::kCluster) check_cluster(input, reader);
    return 0;
}
