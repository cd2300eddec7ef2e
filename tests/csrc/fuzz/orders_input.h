// The input of the orders' target, as values: scores, shares and weightings, many of them hostile.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "fuzz.h"
#include "orders/order.h"
#include "orders/weights.h"

namespace fuzz {

enum class Call : uint8_t {
    kPermutation,
    kVisits,
    kThreshold,
    kPercentiles,
    kWeightedVisits,
    kChoice,
    kCluster,
    kCount
};

// One byte for common numbers; 255 is followed by any number.
template <class Float>
Float take_number(Reader& reader) {
    using Limits = std::numeric_limits<Float>;
    const Float kSpecial[] = {Limits::quiet_NaN(),
                              Limits::quiet_NaN(),
                              Limits::infinity(),
                              -Limits::infinity(),
                              0,
                              -Float{0},
                              Limits::denorm_min(),
                              Limits::min(),
                              Limits::max(),
                              Limits::lowest(),
                              Limits::epsilon(),
                              700,
                              -81,
                              1,
                              Float{1} - Limits::epsilon() / 2,
                              1e-30f,
                              1e30f};
    constexpr uint8_t kCount = sizeof kSpecial / sizeof *kSpecial;
    const auto tag = reader.take<uint8_t>();
    if (tag < kCount) return kSpecial[tag];
    return tag == 255 ? reader.take<Float>() : static_cast<Float>(tag - 60) / 16;
}

// Legal in three of four inputs; a share of something otherwise.
inline double take_share(Reader& reader) {
    const auto tag = reader.take<uint8_t>();
    return tag < 64 ? take_number<double>(reader) : reader.take<uint16_t>() / 65536.0;
}

inline std::vector<float> take_scores(Reader& reader) {
    const auto size = reader.take<uint8_t>(), infinities = reader.take<uint8_t>(),
               tiles = reader.take<uint8_t>();
    std::vector<float> scores(size % 48);
    for (float& score : scores) {
        score = take_number<float>(reader);
        if (infinities >= 32 && std::isinf(score)) score = 2.5f;
    }
    // Repeated beyond a batch (2048), and now and then beyond a chunk (2^18) and a bucket (2^16).
    const auto place = reader.take<uint8_t>();
    size_t n = scores.size();
    if (tiles < 32 && n > 0) n = 2030 + place;
    if (tiles == 255 && place < 8 && n > 0) n = (size_t{1} << 18) + size;
    const size_t period = std::max<size_t>(1, scores.size());
    scores.resize(n);
    for (size_t i = period; i < n; ++i) scores[i] = scores[i - period];
    return scores;
}

inline std::vector<double> take_cuts(Reader& reader, bool legal) {
    const auto count = reader.take<uint8_t>();
    std::vector<double> cuts(count < 16 ? 56 + count : count % 7);
    for (double& cut : cuts) cut = take_number<double>(reader);
    if (legal) {
        for (double& cut : cuts) cut = std::isnan(cut) ? 0.5 : cut;
        std::sort(cuts.begin(), cuts.end());
    }
    return cuts;
}

// What weighted sampling is asked for.
struct Weighting {
    std::vector<double> cuts;
    double cap;
    mlfr::Mass mass;

    mlfr::BlockWeights of(mlfr::Scores scores, int threads) const { return {scores, cuts, cap, threads}; }
};

inline Weighting take_weighting(Reader& reader) {
    Weighting weighting;
    const auto hostile = reader.take<uint8_t>();
    weighting.cuts = take_cuts(reader, hostile >= 32);
    auto take_legal = [&](double otherwise) {
        const auto number = take_number<double>(reader);
        return hostile < 64 || (number >= 0.0 && number <= 1e300) ? number : otherwise;
    };
    weighting.mass.clusters.resize(weighting.cuts.size() + (hostile % 32 != 1) -
                                   (hostile % 32 == 2 && !weighting.cuts.empty()));
    for (double& mass : weighting.mass.clusters) mass = take_legal(1.0);
    weighting.mass.unseen = take_legal(0.0);
    weighting.cap = take_legal(5.0);
    return weighting;
}

inline int take_threads(Reader& reader) {
    constexpr int kThreads[] = {2, 3, 7, 0, -1, 4096};
    return kThreads[reader.take<uint8_t>() % 6];
}

}  // namespace fuzz
