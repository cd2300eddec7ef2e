// For ThreadSanitizer: all orders with several threads, and several threads that read from the same open
// files.
//
//     threads BLOCKS FOLDER
#include <cstdio>
#include <fstream>
#include <functional>
#include <thread>

#include "fuzz.h"
#include "io/dataset.h"
#include "orders/cluster.h"
#include "orders/explore.h"
#include "orders/factors.h"
#include "orders/order.h"
#include "orders/weights.h"

namespace {

using fuzz::require;
using mlfr::Scores;

std::vector<float> make_scores(uint64_t n) {
    std::vector<float> scores(n);
    for (uint64_t i = 0; i < n; ++i) scores[i] = static_cast<float>(mlfr::mix(i) % 6000) / 1000.0f;
    for (uint64_t i = 0; i < n; i += 37) scores[i] = std::numeric_limits<float>::quiet_NaN();
    return scores;
}

// Hashes of all orders and statistics.
std::vector<uint64_t> call_all(const std::vector<float>& scores, int threads) {
    const Scores view{scores.data(), scores.size()};
    const uint64_t n = view.n, seed = 7;
    const mlfr::BlockWeights weights(view, {1.0, 3.0}, 5.0, threads);
    const mlfr::Mass mass{{1.0, 2.0, 3.0}, 0.5};
    std::vector<uint64_t> found;
    std::vector<uint32_t> ids(n);
    auto add = [&](uint64_t samples) { found.push_back(mlfr::order_hash(ids.data(), samples, threads)); };
    mlfr::permutation(n, seed, threads, ids.data());
    add(n);
    const std::vector<uint32_t> visits(n, 1);
    mlfr::shuffle_visits(visits.data(), n, mlfr::sum_visits(visits.data(), n, threads), seed, threads,
                         ids.data());
    add(n);
    mlfr::order_threshold(view, 0.3, 0.2, true, n, seed, threads, ids.data());
    add(n);
    std::vector<float> factors(n);
    for (uint64_t i = 0; i < n; ++i) factors[i] = static_cast<float>(i % 5);
    mlfr::temper_weights(factors.data(), n, 0.7, 1.5, threads, factors.data());
    std::vector<uint32_t> weighted(n);
    mlfr::visits_in_passes(factors.data(), n, 3, 2, seed, threads, weighted.data());
    found.push_back(mlfr::order_hash(weighted.data(), n, threads));
    const mlfr::Weighing capped{mlfr::WeightRule::kCapped, 5.0, 0.5, 4.0, factors.data()};
    const mlfr::BlockWeights weighed(view, {1.0, 3.0}, capped, threads);
    mlfr::order_choice(weighed, mass, n / 3, seed, threads, ids.data());
    add(n / 3);
    mlfr::order_visits(weights, mass, n / 3, seed, threads, ids.data());
    add(n / 3);
    mlfr::order_choice(weights, mass, n / 3, seed, threads, ids.data());
    add(n / 3);
    for (const float score : mlfr::percentiles(view, {0.9, 0.1, 0.5, 0.2}, threads)) {
        found.push_back(static_cast<uint64_t>(score * 1e6f));
    }
    mlfr::draw_distinct(n, n / 5, seed, threads, ids.data());
    add(n / 5);
    std::vector<uint32_t> order(n, 0);
    mlfr::place_evenly(ids.data(), n / 5, n, threads, order.data());
    found.push_back(mlfr::order_hash(order.data(), n, threads));
    const std::vector<double> cuts = mlfr::cluster(view, 8, 4096, threads);
    for (const double cut : cuts) found.push_back(static_cast<uint64_t>(cut * 1e9));
    const mlfr::BlockWeights clusters(view, cuts, 5.0, threads);
    found.insert(found.end(), clusters.counts().begin(), clusters.counts().end());
    for (const double mean : clusters.means(threads)) found.push_back(static_cast<uint64_t>(mean * 1e9));
    return found;
}

// A task that fails on every thread: one error, always that of the lowest block.
void check_errors(std::vector<float> scores, int threads) {
    for (uint64_t i = 5; i < scores.size(); i += 1000) scores[i] = std::numeric_limits<float>::infinity();
    try {
        mlfr::threshold({scores.data(), scores.size()}, 0.5, 0.0, threads);
        require(false, "an infinite score is refused");
    } catch (const std::invalid_argument& error) {
        require(std::string(error.what()).find("block 5 ") != std::string::npos, "the lowest block is named");
    }
}

template <class Value>
void write(std::ofstream& file, Value value) {
    file.write(reinterpret_cast<const char*>(&value), sizeof value);
}

// `count` documents of one sequence of 4 tokens (int32) each; token i is i.
void write_dataset(const std::string& prefix, int32_t count) {
    std::ofstream idx(prefix + ".idx", std::ios::binary), bin(prefix + ".bin", std::ios::binary);
    idx.write("MMIDIDX\0\0", 9);
    write<uint64_t>(idx, 1);
    write<uint8_t>(idx, 4);
    write<uint64_t>(idx, count);
    write<uint64_t>(idx, count + 1);
    for (int32_t i = 0; i < count; ++i) write<int32_t>(idx, 4);
    for (int32_t i = 0; i < count; ++i) write<int64_t>(idx, 16 * int64_t{i});
    for (int32_t i = 0; i <= count; ++i) write<int64_t>(idx, i);
    for (int32_t i = 0; i < 4 * count; ++i) write<int32_t>(bin, i);
}

void check_reads(const mlfr::IndexFile& index, const mlfr::TokenFile& tokens, uint64_t seed) {
    constexpr uint64_t kRows = 40, kLength = 9;
    mlfr::Stream random(seed, 0);
    std::vector<int64_t> starts(kRows);
    std::vector<int32_t> out(kRows * kLength);
    for (int round = 0; round < 100; ++round) {
        const uint64_t document = random.below(index.num_documents());
        require(index.token_offset(document) == 4 * document, "token_offset");
        require(index.sequence_lengths(document, document + 1).at(0) == 4, "sequence_lengths");
        for (auto& start : starts)
            start = static_cast<int64_t>(random.below(index.num_tokens() - kLength + 1));
        tokens.read(starts.data(), kRows, kLength, 3, out.data());
        for (uint64_t i = 0; i < out.size(); ++i) {
            require(out[i] == starts[i / kLength] + static_cast<int64_t>(i % kLength), "tokens");
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "arguments: BLOCKS FOLDER\n"), 2;
    const std::vector<float> scores = make_scores(std::strtoull(argv[1], nullptr, 10));
    const std::vector<uint64_t> found = call_all(scores, 2);
    require(call_all(scores, 7) == found, "threads change no order");
    check_errors(scores, 7);

    const std::string prefix = std::string(argv[2]) + "/threads";
    write_dataset(prefix, 1000);
    const mlfr::IndexFile index(prefix + ".idx");
    const mlfr::TokenFile tokens(prefix + ".bin", index.item_size(), index.num_tokens());
    std::vector<std::thread> readers;
    for (uint64_t r = 0; r < 4; ++r)
        readers.emplace_back(check_reads, std::cref(index), std::cref(tokens), r);
    for (auto& reader : readers) reader.join();
    std::printf("%zu results alike with 2 and 7 threads\n", found.size());
}
