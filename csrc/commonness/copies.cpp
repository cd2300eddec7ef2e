#include "commonness/copies.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "commonness/sketch.h"
#include "io/file.h"

namespace mlfr {
namespace {

struct Keyed {
    uint64_t key;
    uint32_t id;

    bool operator<(const Keyed& other) const { return key != other.key ? key < other.key : id < other.id; }
};

using Signature = std::array<uint16_t, kBins>;
using Edge = std::pair<uint32_t, uint32_t>;

constexpr uint32_t kRows = 4, kBands = kBins / kRows;
// Bands that are looked at before their edges are united: a constant, so that what is known already, and need
// not be compared, does not depend on the number of threads.
constexpr uint32_t kBandsAtOnce = 4;
constexpr uint64_t kItemsRead = 4096;
// Items of a band's bucket that others are compared with. One that resembles none of them becomes a further
// one: a bucket of any size costs so many comparisons for each of its items.
constexpr uint64_t kLeaders = 32;

static_assert(sizeof(uint64_t) == kRows * sizeof(uint16_t), "a band is one key");
static_assert(kBands % kBandsAtOnce == 0);

// Sorts in parts, and merges these pair by pair.
void sort_keyed(std::vector<Keyed>& items, int threads) {
    constexpr uint64_t kParts = 16;
    const auto bound = [&](uint64_t part) {
        return items.begin() + static_cast<int64_t>(items.size() * part / kParts);
    };
    parallel_for(kParts, threads, [&](uint64_t part) { std::sort(bound(part), bound(part + 1)); });
    for (uint64_t width = 1; width < kParts; width *= 2) {
        parallel_for(kParts / (2 * width), threads, [&](uint64_t pair) {
            const uint64_t first = 2 * width * pair;
            std::inplace_merge(bound(first), bound(first + width), bound(first + 2 * width));
        });
    }
}

// The end of the run of equal keys that begins at `first`.
uint64_t end_of_run(const std::vector<Keyed>& items, uint64_t first) {
    uint64_t last = first + 1;
    while (last < items.size() && items[last].key == items[first].key) ++last;
    return last;
}

class Clusters {
  public:
    Clusters(const std::string& path, uint64_t n, double threshold, uint32_t* root)
        : file_(path), root_(root), n_(n) {
        if (file_.size() != n * sizeof(Signature)) {
            throw std::invalid_argument(path + ": does not hold a signature for each item");
        }
        agreeing_ = static_cast<uint32_t>(std::ceil(threshold * kBins - 1e-9));
        for (uint64_t i = 0; i < n; ++i) {
            if (root[i] == i) members_.push_back(static_cast<uint32_t>(i));
        }
    }

    void join(uint32_t first_band, int threads) {
        std::array<std::vector<Keyed>, kBandsAtOnce> bands;
        for (auto& band : bands) band.resize(members_.size());
        read_keys(first_band, threads, bands);
        std::array<std::vector<Edge>, kBandsAtOnce> edges;
        parallel_for(kBandsAtOnce, threads, [&](uint64_t i) {
            std::sort(bands[i].begin(), bands[i].end());
            edges[i] = find_edges(bands[i]);
        });
        for (const auto& found : edges) {
            for (const auto& [a, b] : found) unite(a, b);
        }
        for (uint64_t i = 0; i < n_; ++i) root_[i] = root_[root_[i]];  // a root is the lowest of its cluster
    }

  private:
    void read_keys(uint32_t first_band, int threads,
                   std::array<std::vector<Keyed>, kBandsAtOnce>& bands) const {
        const auto open = file_.open();
        parallel_for((n_ + kItemsRead - 1) / kItemsRead, threads, [&](uint64_t task) {
            const uint64_t first = task * kItemsRead, last = std::min(n_, first + kItemsRead);
            std::vector<Signature> signatures(last - first);
            open->read(first * sizeof(Signature), signatures.data(), signatures.size() * sizeof(Signature));
            auto member = std::lower_bound(members_.begin(), members_.end(), first);
            for (; member != members_.end() && *member < last; ++member) {
                const uint16_t* rows = signatures[*member - first].data() + first_band * kRows;
                for (uint32_t band = 0; band < kBandsAtOnce; ++band) {
                    Keyed& item = bands[band][static_cast<uint64_t>(member - members_.begin())];
                    std::memcpy(&item.key, rows + band * kRows, sizeof item.key);
                    item.id = *member;
                }
            }
        });
    }

    Signature signature(uint32_t id, const OpenFile& open) const {
        Signature result;
        open.read(id * sizeof(Signature), result.data(), sizeof result);
        return result;
    }

    std::vector<Edge> find_edges(const std::vector<Keyed>& band) const {
        std::vector<Edge> edges;
        const auto open = file_.open();
        for (uint64_t first = 0, last; first < band.size(); first = last) {
            last = end_of_run(band, first);
            const auto joined = [&](const Keyed& item) { return root_[item.id] == root_[band[first].id]; };
            const auto begin = band.begin() + static_cast<int64_t>(first);
            if (std::all_of(begin, begin + static_cast<int64_t>(last - first), joined)) continue;
            compare_bucket(band, first, last, *open, edges);
        }
        return edges;
    }

    void compare_bucket(const std::vector<Keyed>& band, uint64_t first, uint64_t last, const OpenFile& open,
                        std::vector<Edge>& edges) const {
        std::vector<std::pair<uint32_t, Signature>> leaders;
        for (uint64_t i = first; i < last; ++i) {
            const uint32_t id = band[i].id;
            const Signature own = signature(id, open);
            bool resembles = false;
            for (const auto& [leader, other] : leaders) {
                const bool known = root_[leader] == root_[id];
                if (!known && !similar(own, other)) continue;
                resembles = true;
                if (!known) edges.emplace_back(leader, id);
            }
            if (!resembles && leaders.size() < kLeaders) leaders.emplace_back(id, own);
        }
    }

    bool similar(const Signature& a, const Signature& b) const {
        uint32_t equal = 0;
        for (uint32_t bin = 0; bin < kBins; ++bin) equal += a[bin] == b[bin];
        return equal >= agreeing_;
    }

    uint32_t find(uint32_t id) const {
        while (root_[id] != id) id = root_[id];
        return id;
    }

    void unite(uint32_t a, uint32_t b) {
        a = find(a);
        b = find(b);
        root_[std::max(a, b)] = std::min(a, b);
    }

    File file_;
    uint32_t* root_;
    uint64_t n_;
    uint32_t agreeing_ = 0;
    std::vector<uint32_t> members_;  // one of each exact copy, ascending
};

}  // namespace

void exact_copies(const uint64_t* hashes, uint64_t n, int threads, uint32_t* representative,
                  uint32_t* count) {
    std::vector<Keyed> items(n);
    for (uint64_t i = 0; i < n; ++i) items[i] = {hashes[i], static_cast<uint32_t>(i)};
    sort_keyed(items, threads);
    for (uint64_t first = 0, last; first < n; first = last) {
        last = end_of_run(items, first);
        for (uint64_t i = first; i < last; ++i) {
            representative[items[i].id] = items[first].id;
            count[items[i].id] = static_cast<uint32_t>(last - first);
        }
    }
}

void near_copies(const std::string& signatures, uint64_t n, double threshold, int threads,
                 uint32_t* representative) {
    Clusters clusters(signatures, n, threshold, representative);
    for (uint32_t band = 0; band < kBands; band += kBandsAtOnce) clusters.join(band, threads);
}

}  // namespace mlfr
