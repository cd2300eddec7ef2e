#include "orders/rank.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "common/vector.h"
#include "orders/select.h"

namespace mlfr {

namespace {

// The scores of a chunk that are near a rank, and how many there are below.
struct Window {
    uint64_t below = 0, at_low = 0, at_high = 0;
    std::vector<float> between;  // without those that equal a bound

    uint64_t low_and_between() const { return at_low + between.size(); }

    void add_near(float score, float low, float high) {
        if (!(score >= low && score <= high)) return;
        if (score == low) {
            ++at_low;
        } else if (score == high) {
            ++at_high;
        } else {
            between.push_back(score);
        }
    }
};

// Two scores between which the one at a rank probably lies; where there is no guess, above all scores.
struct Bounds {
    float low = std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
};

// Eight at a time: one register with AVX2, two without.
constexpr uint64_t kWide = 8;
using WideFloat = float __attribute__((vector_size(32)));
using WideInt = int32_t __attribute__((vector_size(32)));

// The scores of a chunk, divided by the bounds of K ranks.
template <size_t K>
class Split {
  public:
    uint64_t none = 0;  // blocks without a score
    Window windows[K];
    bool infinite = false;  // whether any score is infinite

    void add(const float* batch, uint64_t count, const Bounds (&bounds)[K]) {
        run_vectorised([&] { add_here(batch, count, bounds); });
    }

  private:
    static constexpr uint64_t kVectors = 2, kGroup = kVectors * kWide;  // most have no score near a bound
    static constexpr uint64_t kPending = 1008;

    void add_here(const float* batch, uint64_t count, const Bounds (&bounds)[K]) {
        constexpr int32_t kMagnitude = 0x7FFFFFFF;
        WideFloat low[K], high[K], largest = {};
        WideInt without = {}, less[K] = {};
        for (size_t k = 0; k < K; ++k) {
            low[k] = WideFloat{} + bounds[k].low;
            high[k] = WideFloat{} + bounds[k].high;
        }
        float pending[kPending + kGroup];
        uint64_t size = 0, j = 0;
        for (; j + kGroup <= count; j += kGroup) {
            WideInt near[kVectors] = {};
            for (uint64_t v = 0; v < kVectors; ++v) {
                WideFloat score, magnitude;
                std::memcpy(&score, batch + j + v * kWide, sizeof score);
                WideInt bits;
                std::memcpy(&bits, &score, sizeof bits);
                bits &= kMagnitude;
                std::memcpy(&magnitude, &bits, sizeof bits);
                largest = magnitude > largest ? magnitude : largest;  // NaN fails every comparison
                without -= score != score;
                for (size_t k = 0; k < K; ++k) {
                    const WideInt below = score < low[k];
                    less[k] -= below;
                    near[v] |= ~below & (score <= high[k]);
                }
            }
            const WideInt all = near[0] | near[1];
            uint64_t words[sizeof all / 8];
            std::memcpy(words, &all, sizeof all);
            if ((words[0] | words[1] | words[2] | words[3]) == 0) continue;
            int32_t is_near[kGroup];
            std::memcpy(is_near, near, sizeof near);
            for (uint64_t i = 0; i < kGroup; ++i) {  // without branches, which nothing could predict
                pending[size] = batch[j + i];
                size += is_near[i] & 1;
            }
            if (size < kPending) continue;
            add_near(pending, size, bounds);
            size = 0;
        }
        add_near(pending, size, bounds);
        for (uint64_t lane = 0; lane < kWide; ++lane) {
            none += static_cast<uint32_t>(without[lane]);
            infinite |= std::isinf(largest[lane]);
            for (size_t k = 0; k < K; ++k) windows[k].below += static_cast<uint32_t>(less[k][lane]);
        }
        for (uint64_t i = j; i < count; ++i) {
            none += std::isnan(batch[i]);
            infinite |= std::isinf(batch[i]);
            for (size_t k = 0; k < K; ++k) windows[k].below += batch[i] < bounds[k].low;
        }
        add_near(batch + j, count - j, bounds);
    }

    __attribute__((noinline)) void add_near(const float* scores, uint64_t count, const Bounds (&bounds)[K]) {
        for (uint64_t i = 0; i < count; ++i) {
            for (size_t k = 0; k < K; ++k) windows[k].add_near(scores[i], bounds[k].low, bounds[k].high);
        }
    }
};

// Divides every chunk. Throws std::invalid_argument for an infinite score.
template <size_t K>
std::vector<Split<K>> split_scores(Scores scores, const Bounds (&bounds)[K], int threads) {
    auto chunks = map_chunks(scores.n, threads, [&](uint64_t begin, uint64_t end) {
        Split<K> split;
        split.add(scores.data + begin, end - begin, bounds);
        return split;
    });
    auto is_infinite = [](const Split<K>& split) { return split.infinite; };
    if (std::any_of(chunks.begin(), chunks.end(), is_infinite))
        count_seen(scores, threads);  // throws, and names the block
    return chunks;
}

CutChunk cut_chunk(uint64_t none, const Window& window, Bounds bounds, float cut) {
    if (cut == bounds.low) return {none, window.below, window.at_low};
    if (cut == bounds.high) return {none, window.below + window.low_and_between(), window.at_high};
    CutChunk chunk{none, window.below + window.at_low, 0};
    for (const float score : window.between) {
        chunk.smaller += score < cut;
        chunk.ties += score == cut;
    }
    return chunk;
}

template <size_t K>
std::vector<CutChunk> cut_chunks(const std::vector<Split<K>>& chunks, size_t k, Bounds bounds, float cut) {
    std::vector<CutChunk> cuts;
    for (const Split<K>& split : chunks) cuts.push_back(cut_chunk(split.none, split.windows[k], bounds, cut));
    return cuts;
}

// The score at a rank, if it lies within the bounds.
template <size_t K>
std::optional<float> find_score(const std::vector<Split<K>>& chunks, size_t k, Bounds bounds, uint64_t rank) {
    uint64_t below = 0, at_low = 0, at_high = 0;
    std::vector<float> between;
    for (const Split<K>& split : chunks) {
        const Window& window = split.windows[k];
        below += window.below;
        at_low += window.at_low;
        at_high += window.at_high;
        between.insert(between.end(), window.between.begin(), window.between.end());
    }
    if (rank < below) return std::nullopt;
    rank -= below;
    if (rank < at_low) return bounds.low;
    rank -= at_low;
    if (rank < between.size()) {
        const auto nth = between.begin() + static_cast<std::ptrdiff_t>(rank);
        std::nth_element(between.begin(), nth, between.end());
        return *nth;
    }
    if (rank - between.size() < at_high) return bounds.high;
    return std::nullopt;
}

// Ranks K scores in one pass, and others where the guess at one was wrong.
template <size_t K>
void rank_at_once(Scores scores, const RankOf* ranks, int threads, RankedScore* results) {
    const ScoreKeys keys(scores);
    KeySample sample(keys);
    Bounds bounds[K];
    for (size_t k = 0; k < K; ++k) {
        if (const auto guess = sample.guess(ranks[k])) {
            bounds[k] = {key_float(guess->low), key_float(guess->high)};
        }
    }
    const std::vector<Split<K>> chunks = split_scores(scores, bounds, threads);
    uint64_t seen = scores.n;
    for (const Split<K>& split : chunks) seen -= split.none;
    std::optional<KeyRanks<ScoreKeys>> exact;
    for (size_t k = 0; k < K; ++k) {
        RankedScore& result = results[k];
        result.seen = seen;
        if (seen > 0) {
            result.rank = ranks[k](seen);
            const auto score = find_score(chunks, k, bounds[k], result.rank);
            if (!score) {
                if (!exact) exact.emplace(keys, threads);
                result.score = key_float(exact->at(result.rank).key);
                const Bounds both[1] = {{result.score, result.score}};
                result.chunks = cut_chunks(split_scores(scores, both, threads), 0, both[0], result.score);
                continue;
            }
            result.score = *score + 0.0f;  // -0 is 0
        }
        result.chunks = cut_chunks(chunks, k, bounds[k], result.score);
    }
}

}  // namespace

std::vector<RankedScore> rank_scores(Scores scores, const std::vector<RankOf>& ranks, int threads) {
    std::vector<RankedScore> results(ranks.size());
    for (size_t k = 0; k < ranks.size(); k += 3) {
        switch (std::min<size_t>(3, ranks.size() - k)) {
            case 1:
                rank_at_once<1>(scores, &ranks[k], threads, &results[k]);
                break;
            case 2:
                rank_at_once<2>(scores, &ranks[k], threads, &results[k]);
                break;
            default:
                rank_at_once<3>(scores, &ranks[k], threads, &results[k]);
        }
    }
    return results;
}

}  // namespace mlfr
