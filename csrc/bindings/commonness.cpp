// Exact and near copies, and the 4-gram model, for Python.
#include "bindings/commonness.h"

#include <limits>
#include <memory>
#include <string>

#include "bindings/arguments.h"
#include "commonness/copies.h"
#include "commonness/ngrams.h"
#include "commonness/sketch.h"
#include "commonness/spans.h"

using namespace pybind11::literals;

namespace mlfr {
namespace {

using Release = py::gil_scoped_release;

// Spans of a file, with the arrays that hold them.
struct HeldSpans {
    Array<int64_t> starts, lengths;
    SpanReader reader;
    Spans spans;

    HeldSpans(const TokenFile& file, const Integer& dtype_code, const py::object& from,
              const py::object& sizes)
        : starts(to_array<int64_t>(from, "starts")),
          lengths(to_array<int64_t>(sizes, "lengths")),
          reader(file, static_cast<int>(to_unsigned(dtype_code, "dtype_code", 255))),
          spans{starts.data(), lengths.data(), static_cast<uint64_t>(starts.size())} {
        if (lengths.size() != starts.size()) throw py::value_error("lengths: must be as many as starts");
        for (uint64_t i = 0; i < spans.n; ++i) {
            if (spans.lengths[i] < 0) throw py::value_error("lengths: must not be negative");
        }
    }
};

// The number of ids, each of which must fit into u32.
uint64_t check_ids(py::ssize_t n) {
    if (static_cast<uint64_t>(n) >= std::numeric_limits<uint32_t>::max()) {
        throw py::value_error("there must be fewer than 2^32 - 1 documents and blocks");
    }
    return static_cast<uint64_t>(n);
}

template <class T>
T* to_output(const py::object& array, const char* name, py::ssize_t dimensions, uint64_t size) {
    auto out = to_array<T>(array, name, dimensions);
    if (static_cast<uint64_t>(out.size()) != size) {
        throw py::value_error(std::string(name) + ": must have " + std::to_string(size) + " elements");
    }
    return out.mutable_data();
}

uint32_t py_largest_token(const TokenFile& file, const Integer& dtype_code, const py::object& starts,
                          const py::object& lengths, const Integer& num_threads) {
    const HeldSpans held(file, dtype_code, starts, lengths);
    const int threads = to_threads(num_threads);
    Release release;
    return largest_token(held.reader, held.spans, threads);
}

void py_sketch_spans(const TokenFile& file, const Integer& dtype_code, const py::object& starts,
                     const py::object& lengths, const Integer& shingle, const py::object& hashes,
                     const py::object& signatures, const Integer& num_threads) {
    const HeldSpans held(file, dtype_code, starts, lengths);
    const auto size = static_cast<uint32_t>(to_unsigned(shingle, "shingle", 1 << 16));
    if (size == 0) throw py::value_error("shingle: must be at least 1");
    auto* hash_out = to_output<uint64_t>(hashes, "hashes", 1, held.spans.n);
    auto* signature_out = to_output<uint16_t>(signatures, "signatures", 2, held.spans.n * kBins);
    const int threads = to_threads(num_threads);
    Release release;
    sketch_spans(held.reader, held.spans, size, threads, hash_out, signature_out);
}

py::tuple py_exact_copies(const py::object& hashes, const Integer& num_threads) {
    const Array<uint64_t> keys = to_array<uint64_t>(hashes, "hashes");
    const uint64_t n = check_ids(keys.size());
    const int threads = to_threads(num_threads);
    Array<uint32_t> representative(keys.size()), count(keys.size());
    const uint64_t* data = keys.data();
    uint32_t *first = representative.mutable_data(), *copies = count.mutable_data();
    {
        Release release;
        exact_copies(data, n, threads, first, copies);
    }
    return py::make_tuple(representative, count);
}

py::array py_near_copies(const std::string& signatures, const py::object& representative, double threshold,
                         const Integer& num_threads) {
    const Array<uint32_t> exact = to_array<uint32_t>(representative, "representative");
    const uint64_t n = check_ids(exact.size());
    if (!(threshold > 0 && threshold <= 1)) throw py::value_error("threshold: must be in (0, 1]");
    for (uint64_t i = 0; i < n; ++i) {
        const uint32_t first = exact.data()[i];
        if (first > i || exact.data()[first] != first) {
            throw py::value_error("representative: must be what exact_copies returns");
        }
    }
    const int threads = to_threads(num_threads);
    Array<uint32_t> root(exact.size(), exact.data());
    uint32_t* out = root.mutable_data();
    {
        Release release;
        near_copies(signatures, n, threshold, threads, out);
    }
    return std::move(root);
}

void count_spans(NgramModel& model, const TokenFile& file, const Integer& dtype_code,
                 const py::object& starts, const py::object& lengths, const Integer& num_threads) {
    const HeldSpans held(file, dtype_code, starts, lengths);
    const int threads = to_threads(num_threads);
    Release release;
    model.count(held.reader, held.spans, threads);
}

py::tuple score_spans(const NgramModel& model, const TokenFile& file, const Integer& dtype_code,
                      const py::object& starts, const py::object& lengths, bool leave_out,
                      const Integer& num_threads) {
    const HeldSpans held(file, dtype_code, starts, lengths);
    const int threads = to_threads(num_threads);
    int64_t tokens = 0;
    for (uint64_t i = 0; i < held.spans.n; ++i) tokens += held.spans.lengths[i];
    Array<float> full(tokens), unigram(tokens);
    float *data = full.mutable_data(), *first = unigram.mutable_data();
    {
        Release release;
        model.score(held.reader, held.spans, leave_out, threads, data, first);
    }
    return py::make_tuple(full, unigram);
}

}  // namespace

void bind_commonness(py::module_& module) {
    module.attr("SIGNATURE_BINS") = kBins;
    module.attr("NEAR_COPY_BYTES") = kNearCopyBytes;
    module.def("largest_token", &py_largest_token, "file"_a, "dtype_code"_a, "starts"_a, "lengths"_a,
               "num_threads"_a = 0);
    module.def("sketch_spans", &py_sketch_spans, "file"_a, "dtype_code"_a, "starts"_a, "lengths"_a,
               "shingle"_a, "hashes"_a, "signatures"_a, "num_threads"_a = 0);
    module.def("exact_copies", &py_exact_copies, "hashes"_a, "num_threads"_a = 0);
    module.def("near_copies", &py_near_copies, "signatures"_a, "representative"_a, "threshold"_a,
               "num_threads"_a = 0);
    py::class_<NgramModel>(module, "NgramModel")
        .def(py::init([](const Integer& log2_slots, const Integer& vocab_size) {
                 const auto bits = static_cast<int>(to_unsigned(log2_slots, "log2_slots", 31));
                 if (bits == 0) throw py::value_error("log2_slots: must be at least 1");
                 const uint64_t vocab = to_unsigned(vocab_size, "vocab_size", uint64_t{1} << 31);
                 if (vocab == 0) throw py::value_error("vocab_size: must be at least 1");
                 return std::make_unique<NgramModel>(bits, vocab);
             }),
             "log2_slots"_a, "vocab_size"_a)
        .def_property_readonly("tokens", &NgramModel::tokens)
        .def("count", &count_spans, "file"_a, "dtype_code"_a, "starts"_a, "lengths"_a, "num_threads"_a = 0)
        .def("score", &score_spans, "file"_a, "dtype_code"_a, "starts"_a, "lengths"_a, "leave_out"_a,
             "num_threads"_a = 0);
}

}  // namespace mlfr
