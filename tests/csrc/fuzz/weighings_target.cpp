// Fuzz target of what makes blocks count differently: weights by rule and from outside, turns of copies, and
// samples drawn at random and put into an order. Illegal numbers give std::invalid_argument, results keep
// their definitions, the same for any number of threads.
#include <numeric>
#include <set>
#include <stdexcept>

#include "orders/explore.h"
#include "orders/factors.h"
#include "orders_case.h"

namespace {

using fuzz::Case;
using fuzz::Reader;
using fuzz::require;
using fuzz::sample_counts;
using fuzz::take_samples;
using fuzz::throws;
using mlfr::WeightRule;

enum class Call : uint8_t { kDraw, kPlace, kVisits, kChoice, kTemper, kTurns, kPasses, kCount };

void check_draw(const Case& input, Reader& reader) {
    const uint64_t n = input.scores.size();
    const uint64_t count = reader.take<uint8_t>() % 8 == 0 ? n / 2 + reader.take<uint8_t>() % 4
                                                           : n * reader.take<uint16_t>() / 60000;
    if (count > n) {
        uint32_t none;
        require(throws<std::invalid_argument>([&] { mlfr::draw_distinct(n, count, input.seed, 1, &none); }),
                "more than there are");
        return;
    }
    std::vector<uint32_t> drawn(count);
    const auto counts = sample_counts(input, count, [&](int threads, auto* out) {
        mlfr::draw_distinct(n, count, input.seed, threads, out);
        std::copy_n(out, count, drawn.begin());
    });
    require(std::all_of(counts.begin(), counts.end(), [](uint64_t times) { return times <= 1; }),
            "different numbers");
    if (count > n / 2) return;
    mlfr::Stream stream(input.seed, 0);  // one number after another; those that came before are left out
    std::set<uint64_t> before;
    for (const uint32_t number : drawn) {
        uint64_t next = stream.below(n);
        while (!before.insert(next).second) next = stream.below(n);
        require(number == next, "the numbers of one stream");
    }
}

void check_place(const Case& input, Reader& reader) {
    const uint64_t samples = input.scores.size(), count = samples * reader.take<uint16_t>() / 60000;
    std::vector<uint64_t> items(count), order(samples, UINT64_MAX), expected(order);
    std::iota(items.begin(), items.end(), input.seed % 1000);
    const auto place = [&] { mlfr::place_evenly(items.data(), count, samples, input.threads, order.data()); };
    require(throws<std::invalid_argument>(place) == (count > samples), "items must find a place");
    if (count > samples) return;
    for (uint64_t i = 0; i < count; ++i) expected[i * samples / count] = items[i];
    require(order == expected, "evenly spaced");
}

std::vector<float> take_factors(Reader& reader, uint64_t n) {
    const auto kind = reader.take<uint8_t>();
    if (kind < 64) return {};
    std::vector<float> few(1 + reader.take<uint8_t>() % 40), factors(n);
    for (float& factor : few) {
        const auto tag = reader.take<uint8_t>();
        factor = tag < 64 ? 0.0f : static_cast<float>(tag - 63) / 192;
        if (kind < 96 && tag % 8 == 0) factor = tag % 16 == 0 ? std::numeric_limits<float>::min() : 1e-12f;
    }
    for (uint64_t i = 0; i < n; ++i) factors[i] = few[i % few.size()];
    return factors;
}

// Weights by a rule, times factors, and the masses of the clusters.
struct Weighed {
    std::vector<double> cuts;
    std::vector<float> factors;
    mlfr::Weighing weighing;
    mlfr::Mass mass;

    Weighed(Reader& reader, uint64_t n) {
        const auto hostile = reader.take<uint8_t>();
        cuts = fuzz::take_cuts(reader, hostile >= 8);
        factors = take_factors(reader, n);
        weighing.rule = static_cast<WeightRule>(reader.take<uint8_t>() % 3);
        weighing.cap = fuzz::take_number<double>(reader);
        weighing.low = fuzz::take_number<double>(reader);
        weighing.high = fuzz::take_number<double>(reader);
        if (hostile >= 16 && !has_legal_range()) weighing.low = -1.0, weighing.high = 2.0;
        if (hostile >= 16 && !has_legal_cap()) weighing.cap = 5.0;
        weighing.factors = factors.empty() ? nullptr : factors.data();
        mass.clusters.resize(cuts.size() + 1);
        for (double& one : mass.clusters) one = reader.take<uint8_t>() / 64;
        mass.unseen = reader.take<uint8_t>() / 100;
    }

    bool legal() const {
        return cuts.size() <= 63 && std::is_sorted(cuts.begin(), cuts.end()) &&
               std::none_of(cuts.begin(), cuts.end(), [](double cut) { return std::isnan(cut); }) &&
               has_legal_range() && has_legal_cap();
    }

    mlfr::BlockWeights of(const Case& input, int threads) const {
        return {input.view(), cuts, weighing, threads};
    }

    // Relative to the same reference in each cluster, `highest`, with perplexity.
    double weight(float score, double factor, double highest) const {
        if (std::isnan(score) || weighing.rule == WeightRule::kUniform) return factor;
        if (weighing.rule == WeightRule::kPerplexity) {
            return factor * std::exp(std::max(-80.0, capped(score) - highest));
        }
        const double low = static_cast<float>(weighing.low), width = static_cast<float>(weighing.high) - low;
        const double above = std::clamp(static_cast<double>(score) - low, 0.0, width);
        return factor * (1.0 + (width > 0.0 ? 2.0 * above / width : 0.0)) / 3.0;
    }

    double capped(float score) const {
        return std::min(static_cast<double>(score), static_cast<double>(static_cast<float>(weighing.cap)));
    }

  private:
    bool has_legal_range() const {
        const auto low = static_cast<float>(weighing.low), high = static_cast<float>(weighing.high);
        return high >= low && std::isfinite(high - low);
    }
    bool has_legal_cap() const {
        return static_cast<float>(weighing.cap) > -std::numeric_limits<float>::infinity();
    }
};

// How many samples each block can expect; nothing where none can be drawn.
struct Expected {
    std::vector<double> block;
    uint64_t drawable = 0;
    bool exact = true;  // whether integer weights are fine enough for all clusters

    Expected(const Case& input, const Weighed& weighed) {
        if (!weighed.legal() || !input.finite()) return;
        std::vector<double> mass = weighed.mass.clusters;
        mass.push_back(weighed.mass.unseen);
        mass.push_back(0.0);  // of blocks whose factor is 0
        const size_t k = mass.size(), n = input.scores.size();
        std::vector<size_t> cluster(n);
        std::vector<double> highest(k, -std::numeric_limits<double>::infinity()), sum(k, 0.0);
        std::vector<uint64_t> counts(k, 0);
        for (size_t i = 0; i < n; ++i) {
            const bool excluded = !weighed.factors.empty() && weighed.factors[i] == 0.0f;
            const size_t by_score = fuzz::cluster_of(weighed.cuts, input.scores[i], k - 2);
            cluster[i] = excluded ? k - 1 : by_score;
            ++counts[cluster[i]];
            if (!std::isnan(input.scores[i])) {
                highest[by_score] = std::max(highest[by_score], weighed.capped(input.scores[i]));
            }
        }
        for (size_t i = 0; i < n; ++i) {
            const double factor = weighed.factors.empty() ? 1.0 : static_cast<double>(weighed.factors[i]);
            const size_t by_score = fuzz::cluster_of(weighed.cuts, input.scores[i], k - 2);
            block.push_back(weighed.weight(input.scores[i], factor, highest[by_score]));
            sum[cluster[i]] += block[i];
        }
        double total = 0.0;
        for (size_t c = 0; c < k; ++c) total += counts[c] > 0 ? mass[c] : 0.0;
        if (total == 0.0) {
            block.clear();
            return;
        }
        for (size_t c = 0; c < k; ++c) {
            if (mass[c] == 0.0 || counts[c] == 0) continue;
            drawable += counts[c];
            exact &= sum[c] > 1e-6 * static_cast<double>(counts[c]);
        }
        for (size_t i = 0; i < n; ++i) {
            const double share = mass[cluster[i]] / total;
            block[i] = share == 0.0 ? 0.0 : block[i] * share / sum[cluster[i]];
        }
    }
};

void check_visits(const Case& input, Reader& reader) {
    const Weighed weighed(reader, input.scores.size());
    const uint64_t samples = take_samples(reader);
    const Expected expected(input, weighed);
    const auto draw = [&](int threads, auto* out) {
        mlfr::order_visits(weighed.of(input, threads), weighed.mass, samples, input.seed, threads, out);
    };
    if (expected.block.empty()) {
        std::vector<uint32_t> none(samples);
        require(throws<std::invalid_argument>([&] { draw(1, none.data()); }),
                "what cannot be drawn is refused");
        return;
    }
    if (!expected.exact) {
        std::vector<uint32_t> any(samples);
        if (throws<std::invalid_argument>([&] { draw(1, any.data()); })) return;
    }
    const auto counts = sample_counts(input, samples, draw);
    for (uint64_t i = 0; i < counts.size(); ++i) {
        if (expected.block[i] == 0.0) require(counts[i] == 0, "what does not count is not visited");
        if (!expected.exact) continue;
        require(fuzz::is_rounded(counts[i], static_cast<double>(samples) * expected.block[i]),
                "visits by weight");
    }
}

void check_choice(const Case& input, Reader& reader) {
    const Weighed weighed(reader, input.scores.size());
    const uint64_t samples = take_samples(reader);
    const Expected expected(input, weighed);
    const auto choose = [&](int threads, auto* out) {
        mlfr::order_choice(weighed.of(input, threads), weighed.mass, samples, input.seed, threads, out);
    };
    if (expected.block.empty()) {
        std::vector<uint32_t> none(samples);
        require(throws<std::invalid_argument>([&] { choose(1, none.data()); }),
                "what cannot be chosen is refused");
        return;
    }
    if (!expected.exact) {
        std::vector<uint32_t> any(samples);
        if (throws<std::invalid_argument>([&] { choose(1, any.data()); })) return;
    }
    const auto counts = sample_counts(input, samples, choose);
    for (uint64_t i = 0; i < counts.size(); ++i) {
        const uint64_t least = samples / expected.drawable, more = samples % expected.drawable > 0;
        const bool right = expected.block[i] > 0.0 ? counts[i] - least <= more : counts[i] == 0;
        require(right, "complete passes, then none twice");
    }
}

void check_temper(const Case& input, Reader& reader) {
    std::vector<float> weights = input.scores;
    const auto kind = reader.take<uint8_t>();
    for (float& weight : weights) {
        if (kind >= 32) weight = std::isfinite(weight) ? std::abs(weight) : 0.0f;
    }
    const double power =
        kind % 16 == 1 ? fuzz::take_number<double>(reader) : (1 + reader.take<uint8_t>()) / 16.0;
    const double cap =
        kind % 16 == 2 ? fuzz::take_number<double>(reader) : 1.0 + reader.take<uint8_t>() / 16.0;
    const auto is_weight = [](float weight) { return weight >= 0.0f && std::isfinite(weight); };
    const bool legal =
        power > 0.0 && power <= 16.0 && cap >= 1.0 &&
        std::all_of(weights.begin(), weights.end(), is_weight) &&
        std::any_of(weights.begin(), weights.end(), [](float weight) { return weight > 0.0f; });
    const uint64_t n = weights.size();
    std::vector<float> found(n), again(n);
    const auto temper = [&](int threads, std::vector<float>& out) {
        mlfr::temper_weights(weights.data(), n, power, cap, threads, out.data());
    };
    require(throws<std::invalid_argument>([&] { temper(1, found); }) != legal, "illegal weights are refused");
    if (!legal) return;
    temper(input.threads, again);
    require(found == again, "threads change no weight");
    const double largest = *std::max_element(weights.begin(), weights.end());
    std::vector<double> expected(n);
    for (uint64_t i = 0; i < n; ++i) {
        const double raised = std::pow(static_cast<double>(weights[i]) / largest, power);
        const double least = weights[i] > 0.0f ? static_cast<double>(std::numeric_limits<float>::min()) : 0.0;
        expected[i] = std::max(raised, least);
    }
    const double mean = std::accumulate(expected.begin(), expected.end(), 0.0) / static_cast<double>(n);
    const double most = std::min(1.0, cap * mean);
    for (uint64_t i = 0; i < n; ++i) {
        const double right = std::min(expected[i], most) / most;
        require((found[i] > 0.0f) == (weights[i] > 0.0f) && found[i] <= 1.0f, "in [0, 1], 0 where it was");
        require(std::abs(static_cast<double>(found[i]) - right) <= 2e-5 * right, "tempered and capped");
    }
}

void check_passes(const Case& input, Reader& reader) {
    const uint64_t n = input.scores.size(), first = reader.take<uint32_t>() / 2;
    const std::vector<float> factors = take_factors(reader, n);
    if (factors.empty()) return;
    std::vector<uint64_t> total(n, 0);
    std::vector<uint32_t> visits(n);
    for (uint64_t passes = 0, more = 1; passes < 40; more = 1 + reader.take<uint8_t>() % 5) {
        mlfr::visits_in_passes(factors.data(), n, first + passes, more, input.seed, input.threads,
                               visits.data());
        passes += more;
        for (uint64_t i = 0; i < n; ++i) {
            const uint64_t exact = passes * static_cast<uint64_t>(static_cast<double>(factors[i]) * 0x1p32);
            total[i] += visits[i];
            require(total[i] == exact >> 32 || total[i] == (exact + 0xFFFFFFFFu) >> 32, "rounded up or down");
        }
    }
}

void check_turns(const Case& input, Reader& reader) {
    const uint64_t n = input.scores.size(), first = reader.take<uint64_t>();
    const bool logarithmic = reader.take<uint8_t>() % 2 == 0;
    const std::vector<float> factors = take_factors(reader, n);
    const auto most = 1u + reader.take<uint8_t>() % 12;
    std::vector<uint32_t> groups(n);
    for (uint64_t i = 0; i < n; ++i) groups[i] = static_cast<uint32_t>(mlfr::mix(input.seed + i) % most);
    std::vector<uint64_t> copies(most, 0);
    const auto is_drawn = [&](uint64_t i) { return factors.empty() || factors[i] > 0.0f; };
    for (uint64_t i = 0; i < n; ++i) copies[groups[i]] += is_drawn(i);
    const uint64_t turns =
        n > 64
            ? 1
            : std::max<uint64_t>(
                  1, std::accumulate(copies.begin(), copies.end(), uint64_t{1}, [](uint64_t a, uint64_t b) {
                      return b == 0 ? a : std::min<uint64_t>(std::lcm(a, b), 5000);
                  }));
    std::vector<uint64_t> total(n, 0);
    std::vector<uint32_t> visits(n);
    for (uint64_t turn = 0; turn < std::min<uint64_t>(turns, 200); ++turn) {
        mlfr::take_turns(groups.data(), factors.empty() ? nullptr : factors.data(), n, first + turn,
                         logarithmic, visits.data());
        std::vector<uint64_t> counted(most, 0);
        for (uint64_t i = 0; i < n; ++i) {
            require(visits[i] <= is_drawn(i), "0 or 1, and 0 for what does not count");
            counted[groups[i]] += visits[i];
            total[i] += visits[i];
        }
        for (uint32_t group = 0; group < most; ++group) {
            uint64_t wanted = copies[group] > 0;
            for (uint64_t size = copies[group]; logarithmic && size > 1; size /= 2) ++wanted;
            require(counted[group] == wanted, "as many of each group as asked for");
        }
    }
    if (turns > 200 || n > 64 || first > UINT64_MAX - 200) return;
    for (uint64_t i = 0; i < n; ++i) {
        for (uint64_t j = i + 1; j < n; ++j) {
            if (groups[i] != groups[j] || !is_drawn(i) || !is_drawn(j)) continue;
            require(total[i] == total[j], "each copy has its turn");
        }
    }
}

}  // namespace

namespace fuzz {

Bytes make_input(mlfr::Stream& random) { return random_bytes(random, 16, 240); }

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Reader reader(data, size);
    const auto call = static_cast<Call>(reader.take<uint8_t>() % static_cast<uint8_t>(Call::kCount));
    const int threads = fuzz::take_threads(reader);
    const auto seed = reader.take<uint64_t>();
    const Case input{fuzz::take_scores(reader), threads, seed};
    if (call == Call::kDraw) check_draw(input, reader);
    if (call == Call::kPlace) check_place(input, reader);
    if (call == Call::kVisits) check_visits(input, reader);
    if (call == Call::kChoice) check_choice(input, reader);
    if (call == Call::kTemper) check_temper(input, reader);
    if (call == Call::kTurns) check_turns(input, reader);
    if (call == Call::kPasses) check_passes(input, reader);
    return 0;
}
