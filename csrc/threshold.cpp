// Thresholds and percentiles of scores, and the order of what a threshold keeps.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "detmath.h"
#include "order.h"
#include "select.h"
#include "shuffle.h"

namespace mlfr {

namespace {

// How the scores of a chunk lie to two bounds.
class Split {
  public:
    uint64_t none = 0;  // blocks without a score
    uint64_t below = 0, at_low = 0, at_high = 0;
    std::vector<float> between;  // both bounds excluded
    bool infinite = false;       // one of them is

    uint64_t low_and_between() const { return at_low + between.size(); }

    void add(const float* batch, uint64_t count, float low, float high) {
        constexpr uint64_t kVectors = 2, kGroup = kVectors * kLanes;  // most groups have none near the bounds
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

// By chunk. Throws std::invalid_argument for an infinite score.
std::vector<Split> split_scores(Scores scores, float low, float high, int threads) {
    std::vector<Split> chunks(num_chunks(scores.n));
    for_chunks(scores.n, threads, [&](uint64_t chunk, uint64_t begin, uint64_t end) {
        chunks[chunk].add(scores.data + begin, end - begin, low, high);
    });
    auto is_infinite = [](const Split& split) { return split.infinite; };
    if (std::any_of(chunks.begin(), chunks.end(), is_infinite))
        count_seen(scores, threads);  // names the block
    return chunks;
}

// The blocks of a chunk that have no score, a lower one than the cut, and the same.
struct CutChunk {
    uint64_t none, smaller, ties;
};

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

// The score at a rank (from 0).
struct RankedScore {
    float score = -std::numeric_limits<float>::infinity();
    uint64_t rank = 0, seen = 0;  // seen: blocks that have a score; without any, the score is -inf
    std::vector<CutChunk> chunks;

    uint64_t smaller() const {
        uint64_t sum = 0;
        for (const CutChunk& chunk : chunks) sum += chunk.smaller;
        return sum;
    }
};

// The score of a rank among splits, where it lies within the bounds.
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
        const auto place = between.begin() + static_cast<std::ptrdiff_t>(rank);
        std::nth_element(between.begin(), place, between.end());
        return *place;
    }
    if (rank - between.size() < at_high) return high;
    return std::nullopt;
}

// The score at the rank that rank_of(seen) says. Throws std::invalid_argument for an infinite score. One pass
// over the scores, where a sample leads near the rank; three otherwise.
template <class RankOf>
RankedScore rank_score(Scores scores, RankOf rank_of, int threads) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const ScoreKeys keys(scores);
    const auto guess = guess_rank(keys, rank_of);
    float low = guess ? key_float(guess->low) : kInfinity, high = guess ? key_float(guess->high) : kInfinity;
    std::vector<Split> chunks = split_scores(scores, low, high, threads);
    RankedScore found;
    found.seen = scores.n;
    for (const Split& split : chunks) found.seen -= split.none;
    if (found.seen > 0) {
        found.rank = rank_of(found.seen);
        if (const auto score = find_score(chunks, low, high, found.rank)) {
            found.score = *score + 0.0f;  // -0 is 0
        } else {
            found.score = low = high = key_float(KeyRanks(keys, threads).at(found.rank).key);
            chunks = split_scores(scores, low, high, threads);
        }
    }
    for (const Split& split : chunks) found.chunks.push_back(cut_chunk(split, low, high, found.score));
    return found;
}

RankedScore rank_threshold(Scores scores, double drop, int threads) {
    if (!(drop >= 0.0 && drop < 1.0)) throw std::invalid_argument("drop: must be at least 0 and below 1");
    auto dropped = [drop](uint64_t seen) {
        return std::min(floor_share(drop, seen), seen - std::min<uint64_t>(seen, 1));
    };
    return rank_score(scores, dropped, threads);
}

}  // namespace

// Blocks of lower rank than the cut are dropped.
Threshold threshold(Scores scores, double drop, int threads) {
    const RankedScore cut = rank_threshold(scores, drop, threads);
    return {cut.score, cut.rank - cut.smaller(), cut.rank, cut.seen};
}

float percentile(Scores scores, double q, int threads) {
    if (!(q >= 0.0 && q <= 1.0)) throw std::invalid_argument("q: must lie between 0 and 1");
    auto rank = [q](uint64_t seen) { return std::max<uint64_t>(ceil_share(q, seen), 1) - 1; };
    const RankedScore found = rank_score(scores, rank, threads);
    if (found.seen == 0) throw std::invalid_argument("scores: no block has one");
    return found.score;
}

namespace {

// What a threshold keeps. An emitter for shuffle_multiset.
class KeptBlocks {
  public:
    KeptBlocks(Scores scores, const RankedScore& cut, bool keep_unseen)
        : scores_(scores), cut_(cut.score), keep_unseen_(keep_unseen) {
        uint64_t ties_left = cut.rank - cut.smaller();  // to drop, lowest ids first
        for (size_t c = 0; c < cut.chunks.size(); ++c) {
            const CutChunk& chunk = cut.chunks[c];
            const uint64_t dropped_ties = std::min(ties_left, chunk.ties);
            ties_left -= dropped_ties;
            const uint64_t blocks = std::min(kChunk, scores.n - c * kChunk);
            const uint64_t dropped = chunk.smaller + dropped_ties + (keep_unseen ? 0 : chunk.none);
            chunks_.push_back({blocks - dropped, dropped_ties});
        }
    }

    uint64_t count(uint64_t chunk) const { return chunks_[chunk].kept; }

    template <class Sink>
    void operator()(uint64_t number, uint64_t begin, uint64_t end, Sink&& sink) const {
        const Chunk& chunk = chunks_[number];
        const float cut = cut_;
        if (chunk.dropped_ties == 0 && keep_unseen_) {
            choose(begin, end, sink, [=](float score) { return !(score < cut); });
        } else if (chunk.dropped_ties == 0) {
            choose(begin, end, sink, [=](float score) { return score >= cut; });
        } else {  // few chunks have blocks that equal the cut exactly
            uint64_t left = chunk.dropped_ties;
            choose(begin, end, sink, [left, cut, unseen = keep_unseen_](float score) mutable {
                const bool dropped = (score == cut) & (left > 0);
                left -= dropped;
                return ((score >= cut) & !dropped) | (unseen & (score != score));
            });
        }
    }

  private:
    struct Chunk {
        uint64_t kept;  // blocks
        uint64_t dropped_ties;
    };

    template <class Sink, class IsKept>
    void choose(uint64_t begin, uint64_t end, Sink& sink, IsKept is_kept) const {
        uint32_t offsets[kBatch];
        for_batches(begin, end, [&](uint64_t first, uint64_t count) {
            const float* batch = scores_.data + first;
            const auto base = static_cast<uint32_t>(first - begin);
            uint32_t chosen = 0;
            for (uint32_t j = 0; j < count; ++j) {  // without branches, which nothing could predict
                offsets[chosen] = base + j;
                chosen += is_kept(batch[j]);
            }
            sink(offsets, chosen);
        });
    }

    Scores scores_;
    float cut_;
    bool keep_unseen_;
    std::vector<Chunk> chunks_;
};

// Whole passes of `size` draws and a part of one. one_pass(number, out) writes a pass.
template <class Id, class OnePass>
void fill_with_passes(uint64_t size, uint64_t draws, OnePass one_pass, Id* out) {
    uint64_t number = 0;
    for (; size > 0 && draws >= size; draws -= size, out += size) one_pass(number++, out);
    if (draws > 0) {
        const std::unique_ptr<Id[]> last(new Id[size]);
        one_pass(number, last.get());
        std::copy_n(last.get(), draws, out);
    }
}

}  // namespace

template <class Id>
void order_threshold(Scores scores, double drop, bool keep_unseen, uint64_t draws, uint64_t seed, int threads,
                     Id* out) {
    const RankedScore cut = rank_threshold(scores, drop, threads);
    const uint64_t kept = (keep_unseen ? scores.n : cut.seen) - cut.rank;
    if (kept == 0 && draws > 0) throw std::invalid_argument("scores: no block has one, so none can be drawn");
    const KeptBlocks blocks(scores, cut, keep_unseen);
    fill_with_passes(
        kept, draws,
        [&](uint64_t pass, Id* to) {
            shuffle_multiset(scores.n, kept, derive(seed, pass), threads, blocks, to);
        },
        out);
}

template void order_threshold<uint32_t>(Scores, double, bool, uint64_t, uint64_t, int, uint32_t*);
template void order_threshold<uint64_t>(Scores, double, bool, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
