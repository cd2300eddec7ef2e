// Fuzz target of csrc/commonness: token files of every type and spans anywhere in them are read or refused,
// copies are those of brute force over the tokens, and threads change nothing.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "commonness/copies.h"
#include "commonness/ngrams.h"
#include "commonness/sketch.h"
#include "memory_file.h"

namespace {

using fuzz::Bytes;
using fuzz::Reader;
using fuzz::require;
using fuzz::throws;
using mlfr::Spans;

constexpr int kCodes[] = {1, 2, 3, 4, 5, 8, 6, 0};  // the last two are no integers
constexpr uint64_t kSizes[] = {1, 1, 2, 4, 8, 2, 4, 1};

// Tokens in a file, and spans of it: documents one after another, copies of earlier ones among them, and now
// and then a span that lies anywhere.
struct Corpus {
    std::vector<int64_t> tokens, starts, lengths;
    std::vector<std::vector<int64_t>> texts;  // of the spans
    uint64_t type;
    bool inside = true;  // whether all spans lie in the file

    explicit Corpus(Reader& reader) : type(reader.take<uint8_t>() % 64) {
        type = type < 8 ? type : type % 6;
        const auto alphabet = 1 + reader.take<uint8_t>() % 24, hostile = int{reader.take<uint8_t>()};
        const uint64_t documents = reader.take<uint8_t>() % 24;
        for (uint64_t d = 0; d < documents; ++d) {
            const auto kind = reader.take<uint8_t>();
            const auto begin = static_cast<int64_t>(tokens.size());
            if (kind < 96 && d > 0) {
                copy(kind % d, kind % 3);
            } else {
                const uint64_t length = kind % 16 == 0 ? reader.take<uint8_t>() * 4 : kind % 40;
                const auto seed = reader.take<uint16_t>();
                for (uint64_t i = 0; i < length; ++i) {
                    tokens.push_back(static_cast<int64_t>(mlfr::mix(seed * 4096ull + i) %
                                                          static_cast<uint64_t>(alphabet)));
                }
            }
            starts.push_back(begin);
            lengths.push_back(static_cast<int64_t>(tokens.size()) - begin);
            texts.emplace_back(tokens.begin() + begin, tokens.end());
        }
        if (hostile < 16 && !tokens.empty()) {
            const bool is_signed = type == 1 || type == 2 || type == 3 || type == 4;
            tokens[static_cast<uint64_t>(hostile) % tokens.size()] = is_signed ? -1 : 99;
        }
        if (hostile >= 16 && hostile < 32 && documents > 0) {
            starts[0] = reader.take<int64_t>() >> (hostile % 4 == 0 ? 0 : 56);
            lengths[0] = reader.take<uint8_t>();
            const auto all = static_cast<int64_t>(tokens.size());
            inside =
                lengths[0] == 0 || (starts[0] >= 0 && lengths[0] <= all && starts[0] <= all - lengths[0]);
        }
        for (uint64_t i = 0; inside && i < documents; ++i) {
            texts[i].clear();
            const auto begin = tokens.begin() + (lengths[i] > 0 ? starts[i] : 0);
            texts[i].assign(begin, begin + lengths[i]);
        }
    }

    Spans spans() const { return {starts.data(), lengths.data(), starts.size()}; }

    const std::vector<int64_t>& of(uint64_t i) const { return texts[i]; }

    bool is_legal() const {
        return inside && std::all_of(tokens.begin(), tokens.end(), [](int64_t token) { return token >= 0; });
    }

    void write(fuzz::MemoryFile& file) const {
        Bytes bytes(tokens.size() * kSizes[type]);
        for (uint64_t i = 0; i < tokens.size(); ++i)
            std::memcpy(&bytes[i * kSizes[type]], &tokens[i], kSizes[type]);
        file.resize(bytes.size());
        file.put(0, bytes.data(), bytes.size());
    }

  private:
    void copy(uint64_t document, int edits) {
        const std::vector<int64_t> text = of(document);
        tokens.insert(tokens.end(), text.begin(), text.end());
        for (int e = 0; e < edits && !text.empty(); ++e)
            tokens[tokens.size() - 1 - tokens.size() % text.size()] ^= 1;
    }
};

void check_copies(const Corpus& corpus, const mlfr::SpanReader& reader, uint32_t shingle, double threshold,
                  int threads) {
    const Spans spans = corpus.spans();
    const uint64_t n = spans.n;
    std::vector<uint64_t> hashes(n), again(n);
    std::vector<uint16_t> signatures(n * mlfr::kBins), same(signatures);
    mlfr::sketch_spans(reader, spans, shingle, 1, hashes.data(), signatures.data());
    mlfr::sketch_spans(reader, spans, shingle, threads, again.data(), same.data());
    require(hashes == again && signatures == same, "threads change no sketch");
    std::vector<uint32_t> first(n), count(n), other_first(n), other_count(n);
    mlfr::exact_copies(hashes.data(), n, 1, first.data(), count.data());
    mlfr::exact_copies(hashes.data(), n, threads, other_first.data(), other_count.data());
    require(first == other_first && count == other_count, "threads change no copy");
    for (uint64_t i = 0; i < n; ++i) {
        uint64_t lowest = n, copies = 0;
        for (uint64_t j = 0; j < n; ++j) {
            if (corpus.of(i) != corpus.of(j)) continue;
            lowest = std::min(lowest, j);
            ++copies;
        }
        require(first[i] == lowest && count[i] == copies, "copies are those of equal tokens");
    }
    fuzz::MemoryFile file;
    file.resize(signatures.size() * sizeof(uint16_t));
    file.put(0, reinterpret_cast<const uint8_t*>(signatures.data()), signatures.size() * sizeof(uint16_t));
    std::vector<uint32_t> root(first), other_root(first);
    mlfr::near_copies(file.path(), n, threshold, 1, root.data());
    mlfr::near_copies(file.path(), n, threshold, threads, other_root.data());
    require(root == other_root, "threads change no near copy");
    for (uint64_t i = 0; i < n; ++i) {
        require(root[i] <= first[i] && root[root[i]] == root[i] && root[first[i]] == root[i],
                "the lowest of its kind");
        if (root[i] == first[i]) continue;
        bool resembles = false;  // what is joined resembles something that is joined with the same
        for (uint64_t j = 0; j < n && !resembles; ++j) {
            if (root[j] != root[i] || first[j] == first[i]) continue;
            uint32_t equal = 0;
            for (uint32_t bin = 0; bin < mlfr::kBins; ++bin) {
                equal += signatures[i * mlfr::kBins + bin] == signatures[j * mlfr::kBins + bin];
            }
            resembles = equal >= threshold * mlfr::kBins - 1e-6;
        }
        require(resembles, "what is joined is nearly equal");
    }
}

void check_model(const Corpus& corpus, const mlfr::SpanReader& reader, int log2_slots, uint64_t vocab,
                 bool leave_out, int threads) {
    const Spans spans = corpus.spans();
    const auto all =
        static_cast<uint64_t>(std::accumulate(corpus.lengths.begin(), corpus.lengths.end(), int64_t{0}));
    mlfr::NgramModel model(log2_slots, vocab), other(log2_slots, vocab);
    std::vector<int64_t> read;
    for (uint64_t i = 0; i < spans.n; ++i) {
        const auto& span = corpus.of(i);
        read.insert(read.end(), span.begin(), span.end());
    }
    const bool known = std::all_of(read.begin(), read.end(),
                                   [vocab](int64_t token) { return static_cast<uint64_t>(token) < vocab; });
    require(throws<std::out_of_range>([&] { model.count(reader, spans, 1); }) != known,
            "tokens of the vocabulary");
    if (!known) return;
    other.count(reader, spans, threads);
    require(model.tokens() == all, "as many tokens as the spans have");
    std::vector<float> full(all), unigram(all), again(all), same(all);
    model.score(reader, spans, leave_out, 1, full.data(), unigram.data());
    other.score(reader, spans, leave_out, threads, again.data(), same.data());
    require(full == again && unigram == same, "threads change no likelihood");
    uint64_t at = 0;
    for (uint64_t i = 0; i < spans.n; ++i) {
        const auto& span = corpus.of(i);
        for (const int64_t token : span) {
            const auto times = [token](const std::vector<int64_t>& tokens) {
                return static_cast<double>(std::count(tokens.begin(), tokens.end(), token));
            };
            const double own = leave_out ? times(span) : 0.0,
                         others = static_cast<double>(all - (leave_out ? span.size() : 0));
            const auto size = static_cast<double>(vocab);
            const double probability = (times(read) - own + 0.1) / (others + size / 10);
            require(std::abs(static_cast<double>(unigram[at]) - std::log(probability)) < 1e-5,
                    "smoothed counts of tokens");
            require(std::isfinite(full[at]) && full[at] <= 1e-6f, "the logarithm of a probability");
            ++at;
        }
    }
}

}  // namespace

namespace fuzz {

Bytes make_input(mlfr::Stream& random) { return random_bytes(random, 8, 200); }

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Reader input(data, size);
    const auto shingle = 1u + input.take<uint8_t>() % 7;
    const double threshold = (1 + input.take<uint8_t>()) / 256.0;
    const int spawned = 2 + input.take<uint8_t>() % 3, log2_slots = 1 + input.take<uint8_t>() % 14;
    const auto vocab = 1u + input.take<uint8_t>() % 130u, flags = 0u + input.take<uint8_t>();
    const int threads = flags < 224 ? 1 : spawned;  // to begin threads takes longer than all else
    const Corpus corpus(input);
    fuzz::MemoryFile file;
    corpus.write(file);
    const mlfr::TokenFile tokens(file.path(), kSizes[corpus.type], corpus.tokens.size());
    std::optional<mlfr::SpanReader> reader;
    const bool refused = throws<std::invalid_argument>([&] { reader.emplace(tokens, kCodes[corpus.type]); });
    require(refused == (corpus.type >= 6), "only integers are tokens");
    if (refused) return 0;
    uint32_t largest = 0;
    if (!corpus.inside) {
        require(throws<std::out_of_range>(
                    [&] { largest = mlfr::largest_token(*reader, corpus.spans(), threads); }),
                "spans outside of the file");
        return 0;
    }
    const bool illegal = throws<std::invalid_argument>(
        [&] { largest = mlfr::largest_token(*reader, corpus.spans(), threads); });
    require(illegal != corpus.is_legal(), "negative tokens are refused");
    if (illegal) return 0;
    int64_t expected = 0;
    for (uint64_t i = 0; i < corpus.starts.size(); ++i) {
        for (const int64_t token : corpus.of(i)) expected = std::max(expected, token);
    }
    require(largest == expected, "the largest token");
    check_copies(corpus, *reader, shingle, threshold, threads);
    check_model(corpus, *reader, log2_slots, vocab, flags % 2 == 0, threads);
    return 0;
}
