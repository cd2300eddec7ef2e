// Thresholds and percentiles of scores, and the order of what a threshold keeps.
#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

#include "common/detmath.h"
#include "orders/order.h"
#include "orders/passes.h"
#include "orders/rank.h"
#include "orders/shuffle.h"

namespace mlfr {

namespace {

// How many blocks are dropped of `seen`, at each end.
struct Dropped {
    uint64_t lowest, highest;
};

Dropped count_dropped(double drop, double drop_hardest, uint64_t seen) {
    if (seen == 0) return {0, 0};
    const uint64_t lowest = std::min(floor_share(drop, seen), seen - 1);
    return {lowest, std::min(floor_share(drop_hardest, seen), seen - 1 - lowest)};
}

// The scores at the ranks of the first and of the last block that is kept. The second is not looked for where
// nothing is dropped at that end.
struct Cuts {
    RankedScore low;
    std::optional<RankedScore> high;
};

Cuts rank_threshold(Scores scores, double drop, double drop_hardest, int threads) {
    if (!(drop >= 0.0 && drop < 1.0)) throw std::invalid_argument("drop: must be at least 0 and below 1");
    if (!(drop_hardest >= 0.0 && drop_hardest < 1.0 && drop + drop_hardest < 1.0)) {
        throw std::invalid_argument("drop_hardest: must be at least 0, and below 1 together with drop");
    }
    const auto lowest_kept = [=](uint64_t seen) { return count_dropped(drop, drop_hardest, seen).lowest; };
    const auto highest_kept = [=](uint64_t seen) {
        return seen - std::min<uint64_t>(seen, 1) - count_dropped(drop, drop_hardest, seen).highest;
    };
    std::vector<RankOf> ranks{lowest_kept};
    if (drop_hardest > 0.0) ranks.emplace_back(highest_kept);
    std::vector<RankedScore> ranked = rank_scores(scores, ranks, threads);
    Cuts cuts{std::move(ranked[0]), std::nullopt};
    if (drop_hardest > 0.0 && cuts.low.seen > 0) cuts.high = std::move(ranked[1]);
    return cuts;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// How many blocks of a chunk have a score above the cut.
uint64_t larger(const CutChunk& chunk, uint64_t blocks) {
    return blocks - chunk.none - chunk.smaller - chunk.ties;
}

uint64_t blocks_of(uint64_t chunk, uint64_t n) { return std::min(kChunk, n - chunk * kChunk); }

}  // namespace

Threshold threshold(Scores scores, double drop, double drop_hardest, int threads) {
    const auto [low, high] = rank_threshold(scores, drop, drop_hardest, threads);
    const Tail lowest{low.score, low.rank - low.smaller(), low.rank};
    if (!high) return {lowest, {kInfinity, 0, 0}, low.seen};
    const uint64_t dropped = high->seen - 1 - high->rank;
    uint64_t above = 0;
    for (uint64_t c = 0; c < high->chunks.size(); ++c)
        above += larger(high->chunks[c], blocks_of(c, scores.n));
    return {lowest, {high->score, dropped - above, dropped}, low.seen};
}

std::vector<float> percentiles(Scores scores, const std::vector<double>& shares, int threads) {
    std::vector<RankOf> ranks;
    for (const double q : shares) {
        if (!(q >= 0.0 && q <= 1.0)) throw std::invalid_argument("q: must lie between 0 and 1");
        ranks.emplace_back([q](uint64_t seen) { return std::max<uint64_t>(ceil_share(q, seen), 1) - 1; });
    }
    std::vector<float> found;
    for (const RankedScore& ranked : rank_scores(scores, ranks, threads)) {
        if (ranked.seen == 0) throw std::invalid_argument("scores: no block has one");
        found.push_back(ranked.score);
    }
    return found;
}

namespace {

// Emits the blocks that a threshold keeps, for shuffle_multiset.
class KeptBlocks {
  public:
    KeptBlocks(Scores scores, const Cuts& cuts, bool keep_unseen)
        : scores_(scores),
          low_(cuts.low.score),
          high_(cuts.high ? cuts.high->score : kInfinity),
          keep_unseen_(keep_unseen) {
        uint64_t low_left = cuts.low.rank - cuts.low.smaller();  // ties to drop, lowest ids first
        // Ties to keep, lowest ids first; where both cuts are the same score, ties that are dropped below
        // count.
        uint64_t high_left = cuts.high ? cuts.high->rank + 1 - cuts.high->smaller() : 0;
        for (uint64_t c = 0; c < cuts.low.chunks.size(); ++c) {
            const CutChunk& low = cuts.low.chunks[c];
            Chunk chunk{blocks_of(c, scores.n), std::min(low_left, low.ties), kAllTies};
            low_left -= chunk.dropped_ties;
            chunk.kept -= low.smaller + chunk.dropped_ties + (keep_unseen ? 0 : low.none);
            if (cuts.high) {
                const CutChunk& high = cuts.high->chunks[c];
                const uint64_t kept_ties = std::min(high_left, high.ties);
                high_left -= kept_ties;
                if (kept_ties < high.ties) chunk.kept_ties = kept_ties;
                chunk.kept -= larger(high, blocks_of(c, scores.n)) + (high.ties - kept_ties);
            }
            chunks_.push_back(chunk);
        }
    }

    uint64_t count(uint64_t chunk) const { return chunks_[chunk].kept; }

    template <class Sink>
    void operator()(uint64_t number, uint64_t begin, uint64_t end, Sink&& sink) const {
        const Chunk& chunk = chunks_[number];
        const float low = low_, high = high_;
        const bool unseen = keep_unseen_;
        if (chunk.dropped_ties > 0 || chunk.kept_ties != kAllTies) {  // few chunks have ties to divide
            uint64_t low_left = chunk.dropped_ties, high_left = chunk.kept_ties;
            choose(begin, end, sink, [=](float score) mutable {
                const bool dropped = (score == low) & (low_left > 0);
                low_left -= dropped;
                const bool beyond = (score == high) & (high_left == 0);
                high_left -= (score == high) & !beyond;
                return ((score >= low) & (score <= high) & !dropped & !beyond) | (unseen & (score != score));
            });
        } else if (high < kInfinity && unseen) {
            choose(begin, end, sink, [=](float score) { return !((score < low) | (score > high)); });
        } else if (high < kInfinity) {
            choose(begin, end, sink, [=](float score) { return (score >= low) & (score <= high); });
        } else if (unseen) {
            choose(begin, end, sink, [=](float score) { return !(score < low); });
        } else {
            choose(begin, end, sink, [=](float score) { return score >= low; });
        }
    }

  private:
    static constexpr uint64_t kAllTies = UINT64_MAX;

    struct Chunk {
        uint64_t kept;          // blocks
        uint64_t dropped_ties;  // at the lower cut
        uint64_t kept_ties;     // at the upper cut
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
    float low_, high_;
    bool keep_unseen_;
    std::vector<Chunk> chunks_;
};

}  // namespace

template <class Id>
void order_threshold(Scores scores, double drop, double drop_hardest, bool keep_unseen, uint64_t samples,
                     uint64_t seed, int threads, Id* out) {
    const Cuts cuts = rank_threshold(scores, drop, drop_hardest, threads);
    const Dropped dropped = count_dropped(drop, drop_hardest, cuts.low.seen);
    const uint64_t kept = (keep_unseen ? scores.n : cuts.low.seen) - dropped.lowest - dropped.highest;
    if (kept == 0 && samples > 0)
        throw std::invalid_argument("scores: no block has one, so none can be drawn");
    const KeptBlocks blocks(scores, cuts, keep_unseen);
    fill_passes(
        kept, samples,
        [&](uint64_t pass, uint64_t count, Id* to) {
            shuffle_multiset(scores.n, kept, derive(seed, pass), threads, blocks, to, count);
        },
        out);
}

template void order_threshold<uint32_t>(Scores, double, double, bool, uint64_t, uint64_t, int, uint32_t*);
template void order_threshold<uint64_t>(Scores, double, double, bool, uint64_t, uint64_t, int, uint64_t*);

}  // namespace mlfr
