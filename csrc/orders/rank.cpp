#include "orders/rank.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "orders/select.h"

namespace mlfr {

namespace {

// The scores of a chunk, divided by two bounds.
class Split {
  public:
    uint64_t none = 0;  // blocks without a score
    uint64_t below = 0, at_low = 0, at_high = 0;
    std::vector<float> between;  // without those that equal a bound
    bool infinite = false;       // whether any score is infinite

    uint64_t low_and_between() const { return at_low + between.size(); }

    void add(const float* batch, uint64_t count, float low, float high) {
        constexpr uint64_t kVectors = 2,
                           kGroup = kVectors * kLanes;  // most groups have no score near the bounds
        constexpr int32_t kInfinity = 0x7F800000, kMagnitude = 0x7FFFFFFF;
        IntVector without = {}, less = {}, endless = {};
        uint64_t j = 0;
        for (; j + kGroup <= count; j += kGroup) {
            FloatVector score[kVectors];
            std::memcpy(score, batch + j, sizeof score);
            IntVector near = {};
            for (const FloatVector& four : score) {
                IntVector bits;
                std::memcpy(&bits, &four, sizeof bits);
                without -= four != four;
                less -= four < low;
                endless |= (bits & kMagnitude) == kInfinity;
                near |= (four >= low) & (four <= high);
            }
            if (any(near)) std::for_each(batch + j, batch + j + kGroup, Near{*this, low, high});
        }
        for (uint64_t lane = 0; lane < kLanes; ++lane) {
            none += static_cast<uint32_t>(without[lane]);
            below += static_cast<uint32_t>(less[lane]);
        }
        infinite |= any(endless);
        for (; j < count; ++j) {
            none += std::isnan(batch[j]);
            below += batch[j] < low;
            infinite |= std::isinf(batch[j]);
            Near{*this, low, high}(batch[j]);
        }
    }

  private:
    struct Near {
        Split& split;
        float low, high;

        void operator()(float score) const {
            if (!(score >= low && score <= high)) return;
            if (score == low) {
                ++split.at_low;
            } else if (score == high) {
                ++split.at_high;
            } else {
                split.between.push_back(score);
            }
        }
    };

    static bool any(IntVector mask) {
        uint64_t halves[2];
        std::memcpy(halves, &mask, sizeof halves);
        return (halves[0] | halves[1]) != 0;
    }
};

// Divides every chunk. Throws std::invalid_argument for an infinite score.
std::vector<Split> split_scores(Scores scores, float low, float high, int threads) {
    auto chunks = map_chunks(scores.n, threads, [=](uint64_t begin, uint64_t end) {
        Split split;
        split.add(scores.data + begin, end - begin, low, high);
        return split;
    });
    auto is_infinite = [](const Split& split) { return split.infinite; };
    if (std::any_of(chunks.begin(), chunks.end(), is_infinite))
        count_seen(scores, threads);  // throws, and names the block
    return chunks;
}

CutChunk cut_chunk(const Split& split, float low, float high, float cut) {
    if (cut == low) return {split.none, split.below, split.at_low};
    if (cut == high) return {split.none, split.below + split.low_and_between(), split.at_high};
    CutChunk chunk{split.none, split.below + split.at_low, 0};
    for (const float score : split.between) {
        chunk.smaller += score < cut;
        chunk.ties += score == cut;
    }
    return chunk;
}

// The score at a rank, if it lies within the bounds.
std::optional<float> find_score(const std::vector<Split>& chunks, float low, float high, uint64_t rank) {
    uint64_t below = 0, at_low = 0, at_high = 0;
    std::vector<float> between;
    for (const Split& split : chunks) {
        below += split.below;
        at_low += split.at_low;
        at_high += split.at_high;
        between.insert(between.end(), split.between.begin(), split.between.end());
    }
    if (rank < below) return std::nullopt;
    rank -= below;
    if (rank < at_low) return low;
    rank -= at_low;
    if (rank < between.size()) {
        const auto nth = between.begin() + static_cast<std::ptrdiff_t>(rank);
        std::nth_element(between.begin(), nth, between.end());
        return *nth;
    }
    if (rank - between.size() < at_high) return high;
    return std::nullopt;
}

}  // namespace

RankedScore rank_score(Scores scores, const std::function<uint64_t(uint64_t)>& rank_of, int threads) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const ScoreKeys keys(scores);
    const auto guess = guess_rank(keys, rank_of);
    float low = guess ? key_float(guess->low) : kInfinity, high = guess ? key_float(guess->high) : kInfinity;
    std::vector<Split> chunks = split_scores(scores, low, high, threads);
    RankedScore result;
    result.seen = scores.n;
    for (const Split& split : chunks) result.seen -= split.none;
    if (result.seen > 0) {
        result.rank = rank_of(result.seen);
        if (const auto score = find_score(chunks, low, high, result.rank)) {
            result.score = *score + 0.0f;  // -0 is 0
        } else {
            result.score = low = high = key_float(KeyRanks(keys, threads).at(result.rank).key);
            chunks = split_scores(scores, low, high, threads);
        }
    }
    for (const Split& split : chunks) result.chunks.push_back(cut_chunk(split, low, high, result.score));
    return result;
}

}  // namespace mlfr
