// The Python module megatron_lfr._C. Every function releases the GIL around its work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "bindings/arguments.h"
#include "bindings/commonness.h"
#include "io/dataset.h"
#include "orders/cluster.h"
#include "orders/explore.h"
#include "orders/factors.h"
#include "orders/order.h"
#include "orders/passes.h"
#include "orders/weights.h"

using namespace pybind11::literals;

namespace mlfr {
namespace {

using Release = py::gil_scoped_release;

template <class Item, class Make>
py::array fill_array(uint64_t items, Make make) {
    Array<Item> array(static_cast<py::ssize_t>(items));
    Item* out = array.mutable_data();
    Release release;
    make(out);
    return std::move(array);
}

// Makes the ids of an order: uint32 where the number of blocks allows it, uint64 otherwise. make(pointer)
// fills them.
template <class Make>
py::array make_ids(uint64_t n_blocks, uint64_t samples, Make make) {
    if (n_blocks <= std::numeric_limits<uint32_t>::max()) return fill_array<uint32_t>(samples, make);
    return fill_array<uint64_t>(samples, make);
}

// Runs `work` without the GIL.
template <class Work>
auto released(Work work) {
    Release release;
    return work();
}

// Makes `samples` samples as passes of `size` ids, one pass where `samples` is None, each with its own seed.
// part(seed, count, out) writes the first `count` of a pass.
template <class Part>
py::array make_passes(uint64_t n_blocks, uint64_t size, const py::object& seed, const py::object& samples,
                      Part part) {
    const uint64_t count = samples.is_none() ? size : to_size(samples, "samples");
    if (count > 0 && size == 0) throw py::value_error("samples: there is no block to sample from");
    const std::vector<uint64_t> seeds = to_seeds(seed);
    const uint64_t passes = size == 0 ? 0 : count / size + (count % size != 0);
    if (seeds.size() < passes) {
        throw py::value_error("seed: " + std::to_string(seeds.size()) + " for " + std::to_string(passes) +
                              " passes");
    }
    return make_ids(n_blocks, count, [&](auto* out) {
        fill_passes(
            size, count, [&](uint64_t pass, uint64_t wanted, auto* to) { part(seeds[pass], wanted, to); },
            out);
    });
}

py::array py_permutation(const Integer& n, const py::object& seed, const Integer& num_threads,
                         const py::object& samples) {
    const uint64_t blocks = to_size(n, "n");
    const int threads = to_threads(num_threads);
    return make_passes(blocks, blocks, seed, samples, [&](uint64_t number, uint64_t wanted, auto* out) {
        permutation(blocks, number, threads, wanted, out);
    });
}

py::array py_shuffle_visits(const py::object& visits, const py::object& seed, const Integer& num_threads,
                            const py::object& samples) {
    const Array<uint32_t> counts = to_array<uint32_t>(visits, "visits");
    const uint32_t* data = counts.data();
    const auto n = static_cast<uint64_t>(counts.size());
    const int threads = to_threads(num_threads);
    const uint64_t size = released([&] { return sum_visits(data, n, threads); });
    return make_passes(n, size, seed, samples, [&](uint64_t number, uint64_t wanted, auto* out) {
        shuffle_visits(data, n, size, number, threads, wanted, out);
    });
}

py::tuple py_threshold(const py::object& scores, double drop, const Integer& num_threads,
                       double drop_hardest) {
    const Scores data = to_scores(scores);
    const int threads = to_threads(num_threads);
    const Threshold result = released([&] { return threshold(data, drop, drop_hardest, threads); });
    const auto tail = [](const Tail& end) { return py::make_tuple(end.cut, end.tie_quota, end.dropped); };
    return py::make_tuple(tail(result.lowest), tail(result.highest), result.seen);
}

py::array py_order_threshold(const py::object& scores, double drop, bool keep_unseen, const Integer& samples,
                             const Integer& seed, const Integer& num_threads, double drop_hardest) {
    const Scores data = to_scores(scores);
    const uint64_t count = to_size(samples, "samples"), number = to_unsigned(seed, "seed");
    const int threads = to_threads(num_threads);
    return make_ids(data.n, count, [&](auto* out) {
        order_threshold(data, drop, drop_hardest, keep_unseen, count, number, threads, out);
    });
}

template <class Values>
py::array copied(const Values& values) {
    return py::array(static_cast<py::ssize_t>(values.size()), values.data());
}

WeightRule to_rule(const std::string& name) {
    if (name == "perplexity") return WeightRule::kPerplexity;
    if (name == "uniform") return WeightRule::kUniform;
    if (name == "capped") return WeightRule::kCapped;
    throw py::value_error("rule: must be perplexity, uniform or capped");
}

// The values of factors for `n` blocks: null for None.
const float* to_factors(const py::object& factors, uint64_t n) {
    if (factors.is_none()) return nullptr;
    const Array<float> array = to_array<float>(factors, "factors");
    if (static_cast<uint64_t>(array.size()) != n)
        throw py::value_error("factors: must be one for each block");
    return array.data();
}

// Weights, and the arrays that they refer to.
struct HeldWeights {
    Array<float> scores;
    py::object factors;  // None, or an array
    BlockWeights weights;

    static std::unique_ptr<HeldWeights> make(const py::object& scores, const std::vector<double>& cuts,
                                             double cap, const Integer& num_threads, const std::string& rule,
                                             double low, double high, const py::object& factors) {
        const Scores data = to_scores(scores);
        const Weighing weighing{to_rule(rule), cap, low, high, to_factors(factors, data.n)};
        const int threads = to_threads(num_threads);
        BlockWeights weights = released([&] { return BlockWeights(data, cuts, weighing, threads); });
        return std::make_unique<HeldWeights>(
            HeldWeights{py::reinterpret_borrow<Array<float>>(scores), factors, std::move(weights)});
    }

    std::ptrdiff_t intervals() const { return static_cast<std::ptrdiff_t>(weights.unseen()); }

    py::array counts() const {
        const std::vector<uint64_t>& all = weights.counts();
        return copied(std::vector<int64_t>(all.begin(), all.begin() + intervals()));
    }

    uint64_t unseen() const { return weights.counts()[weights.unseen()]; }

    // Of the intervals and, last, of the blocks without a score.
    py::array mean_weights(const Integer& num_threads) const {
        const int threads = to_threads(num_threads);
        std::vector<double> means = released([&] { return weights.means(threads); });
        means.resize(weights.unseen() + 1);
        return copied(means);
    }
};

py::array py_temper_weights(const py::object& weights, double power, double cap, const Integer& num_threads) {
    const Array<float> from = to_array<float>(weights, "weights");
    const int threads = to_threads(num_threads);
    return fill_array<float>(static_cast<uint64_t>(from.size()), [&](float* out) {
        temper_weights(from.data(), static_cast<uint64_t>(from.size()), power, cap, threads, out);
    });
}

py::array py_take_turns(const py::object& groups, const Integer& turn, bool logarithmic,
                        const py::object& factors) {
    const Array<uint32_t> from = to_array<uint32_t>(groups, "groups");
    const auto n = static_cast<uint64_t>(from.size());
    const uint64_t number = to_unsigned(turn, "turn");
    const float* by_factor = to_factors(factors, n);
    return fill_array<uint32_t>(
        n, [&](uint32_t* out) { take_turns(from.data(), by_factor, n, number, logarithmic, out); });
}

py::array py_visits_in_passes(const py::object& factors, const Integer& first, const Integer& passes,
                              const Integer& seed, const Integer& num_threads) {
    const Array<float> from = to_array<float>(factors, "factors");
    const auto n = static_cast<uint64_t>(from.size());
    const uint64_t begin = to_unsigned(first, "first"), count = to_unsigned(passes, "passes");
    const uint64_t number = to_unsigned(seed, "seed");
    const int threads = to_threads(num_threads);
    return fill_array<uint32_t>(
        n, [&](uint32_t* out) { visits_in_passes(from.data(), n, begin, count, number, threads, out); });
}

// order_visits and order_choice take the same arguments and differ in draw(weights, mass, samples, seed,
// threads, out).
template <class Draw>
auto weighted_order(Draw draw) {
    return [draw](const HeldWeights& held, std::vector<double> mass, double unseen_mass,
                  const Integer& samples, const Integer& seed, const Integer& num_threads) -> py::array {
        const Mass masses{std::move(mass), unseen_mass};
        const uint64_t count = to_size(samples, "samples"), number = to_unsigned(seed, "seed");
        const int threads = to_threads(num_threads);
        return make_ids(held.weights.blocks(), count,
                        [&](auto* out) { draw(held.weights, masses, count, number, threads, out); });
    };
}

py::array py_cluster(const py::object& scores, int k, int bins, const Integer& num_threads) {
    const Scores data = to_scores(scores);
    const int threads = to_threads(num_threads);
    return copied(released([&] { return cluster(data, k, bins, threads); }));
}

py::array py_percentiles(const py::object& scores, const std::vector<double>& q, const Integer& num_threads) {
    const Scores data = to_scores(scores);
    const int threads = to_threads(num_threads);
    return copied(released([&] { return percentiles(data, q, threads); }));
}

// Calls work(ids) for ids of either type.
template <class Work>
auto with_ids(const py::object& ids, Work work) {
    if (Array<uint64_t>::check_(ids)) return work(to_array<uint64_t>(ids, "ids"));
    return work(to_array<uint32_t>(ids, "ids"));
}

py::array py_interleave(const py::object& ids, const std::vector<uint64_t>& counts, const Integer& seed,
                        const Integer& num_threads) {
    const uint64_t number = to_unsigned(seed, "seed");
    const int threads = to_threads(num_threads);
    return with_ids(ids, [&](const auto& items) {
        const auto* data = items.data();
        const auto n = static_cast<uint64_t>(items.size());
        uint64_t left = n;
        for (const uint64_t count : counts) {
            if (count > left) throw py::value_error("counts: add up to more than there are ids");
            left -= count;
        }
        if (left > 0) throw py::value_error("counts: add up to fewer than there are ids");
        using Id = std::decay_t<decltype(*data)>;
        return fill_array<Id>(n, [&](Id* out) { interleave(data, counts, number, threads, out); });
    });
}

py::array py_draw_distinct(const Integer& n, const Integer& count, const Integer& seed,
                           const Integer& num_threads) {
    const uint64_t blocks = to_size(n, "n"), samples = to_unsigned(count, "count", blocks);
    const uint64_t number = to_unsigned(seed, "seed");
    const int threads = to_threads(num_threads);
    return make_ids(blocks, samples,
                    [&](auto* out) { draw_distinct(blocks, samples, number, threads, out); });
}

void py_place_evenly(const py::object& items, const py::object& order, const Integer& num_threads) {
    const int threads = to_threads(num_threads);
    with_ids(items, [&](const auto& array) {
        const auto* from = array.data();
        using Id = std::decay_t<decltype(*from)>;
        Array<Id> to = to_array<Id>(order, "order");
        const auto count = static_cast<uint64_t>(array.size()), samples = static_cast<uint64_t>(to.size());
        Id* out = to.mutable_data();
        Release release;
        place_evenly(from, count, samples, threads, out);
    });
}

py::array py_count_parts(const py::object& ids, const std::vector<uint64_t>& sizes,
                         const Integer& num_threads) {
    const int threads = to_threads(num_threads);
    const auto counts = with_ids(ids, [&](const auto& array) {
        const auto* data = array.data();
        const auto n = static_cast<uint64_t>(array.size());
        return released([&] { return count_parts(data, n, sizes, threads); });
    });
    return copied(counts);
}

uint64_t py_order_hash(const py::object& ids, const Integer& num_threads) {
    const int threads = to_threads(num_threads);
    return with_ids(ids, [&](const auto& array) {
        const auto* data = array.data();
        const auto n = static_cast<uint64_t>(array.size());
        return released([&] { return order_hash(data, n, threads); });
    });
}

void read_tokens(const TokenFile& file, const py::object& starts, const py::object& out,
                 const Integer& num_threads) {
    const Array<int64_t> from = to_array<int64_t>(starts, "starts");
    if (!py::isinstance<py::array>(out)) throw py::value_error("out: must be an array");
    auto to = py::reinterpret_borrow<py::array>(out);
    if (to.ndim() != 2 || !(to.flags() & py::array::c_style) || to.shape(0) != from.size()) {
        throw py::value_error("out: must be a contiguous array [rows, length], with as many rows as starts");
    }
    if (static_cast<uint64_t>(to.itemsize()) != file.item_size()) {
        throw py::value_error("out: its elements must have the " + std::to_string(file.item_size()) +
                              " bytes of a stored token");
    }
    const int64_t* first = from.data();
    void* target = to.mutable_data();
    const auto rows = static_cast<uint64_t>(to.shape(0)), length = static_cast<uint64_t>(to.shape(1));
    const int threads = to_threads(num_threads);
    Release release;
    file.read(first, rows, length, threads, target);
}

py::array sequence_lengths(const IndexFile& index, const Integer& first, const Integer& last) {
    const uint64_t from = to_size(first, "first"), to = to_size(last, "last");
    const std::vector<int32_t> lengths = released([&] { return index.sequence_lengths(from, to); });
    return copied(lengths);
}

// Translates C++ errors for Python: OSError with its errno, ValueError for positions outside of a file.
void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const FileError& error) {
        const py::tuple arguments = py::make_tuple(error.number, error.what(), error.path);
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const std::out_of_range& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
}

void bind_files(py::module_& module) {
    py::class_<IndexFile>(module, "IndexFile")
        .def(py::init<const std::string&>(), "path"_a, py::call_guard<Release>())
        .def_property_readonly("dtype_code", &IndexFile::dtype_code)
        .def_property_readonly("item_size", &IndexFile::item_size)
        .def_property_readonly("num_sequences", &IndexFile::num_sequences)
        .def_property_readonly("num_documents", &IndexFile::num_documents)
        .def_property_readonly("num_tokens", &IndexFile::num_tokens)
        .def(
            "token_offset",
            [](const IndexFile& index, const Integer& document) {
                const uint64_t number = to_size(document, "document");
                return released([&] { return index.token_offset(number); });
            },
            "document"_a)
        .def("sequence_lengths", &sequence_lengths, "first"_a, "last"_a);
    py::class_<TokenFile>(module, "TokenFile")
        .def(py::init([](const std::string& path, const Integer& item_size, const Integer& num_tokens) {
                 return std::make_unique<TokenFile>(path, to_size(item_size, "item_size"),
                                                    to_size(num_tokens, "num_tokens"));
             }),
             "path"_a, "item_size"_a, "num_tokens"_a)
        .def("read", &read_tokens, "starts"_a, "out"_a, "num_threads"_a = 1);
}

void bind_orders(py::module_& module) {
    module.def("permutation", &py_permutation, "n"_a, "seed"_a, "num_threads"_a = 0,
               "samples"_a = py::none());
    module.def("shuffle_visits", &py_shuffle_visits, "visits"_a, "seed"_a, "num_threads"_a = 0,
               "samples"_a = py::none());
    module.def("threshold", &py_threshold, "scores"_a, "drop"_a, "num_threads"_a = 0, "drop_hardest"_a = 0.0);
    module.def("order_threshold", &py_order_threshold, "scores"_a, "drop"_a, "keep_unseen"_a, "samples"_a,
               "seed"_a, "num_threads"_a = 0, "drop_hardest"_a = 0.0);
    py::class_<HeldWeights>(module, "BlockWeights")
        .def(py::init(&HeldWeights::make), "scores"_a, "cuts"_a, "cap"_a, "num_threads"_a = 0,
             "rule"_a = "perplexity", "low"_a = 0.0, "high"_a = 0.0, "factors"_a = py::none())
        .def_property_readonly("counts", &HeldWeights::counts)
        .def_property_readonly("unseen", &HeldWeights::unseen)
        .def("mean_weights", &HeldWeights::mean_weights, "num_threads"_a = 0);
    module.def("temper_weights", &py_temper_weights, "weights"_a, "power"_a, "cap"_a, "num_threads"_a = 0);
    module.def("take_turns", &py_take_turns, "groups"_a, "turn"_a, "logarithmic"_a, "factors"_a = py::none());
    module.def("visits_in_passes", &py_visits_in_passes, "factors"_a, "first"_a, "passes"_a, "seed"_a,
               "num_threads"_a = 0);
    module.def("order_visits", weighted_order([](auto&&... words) { order_visits(words...); }), "weights"_a,
               "mass"_a, "unseen_mass"_a, "samples"_a, "seed"_a, "num_threads"_a = 0);
    module.def("order_choice", weighted_order([](auto&&... words) { order_choice(words...); }), "weights"_a,
               "mass"_a, "unseen_mass"_a, "samples"_a, "seed"_a, "num_threads"_a = 0);
    module.def("cluster", &py_cluster, "scores"_a, "k"_a = 8, "bins"_a = 4096, "num_threads"_a = 0);
    module.def("percentiles", &py_percentiles, "scores"_a, "q"_a, "num_threads"_a = 0);
    module.def("interleave", &py_interleave, "ids"_a, "counts"_a, "seed"_a, "num_threads"_a = 0);
    module.def("draw_distinct", &py_draw_distinct, "n"_a, "count"_a, "seed"_a, "num_threads"_a = 0);
    module.def("place_evenly", &py_place_evenly, "items"_a, "order"_a, "num_threads"_a = 0);
    module.def("count_parts", &py_count_parts, "ids"_a, "sizes"_a, "num_threads"_a = 0);
    module.def("order_hash", &py_order_hash, "ids"_a, "num_threads"_a = 0);
}

}  // namespace
}  // namespace mlfr

PYBIND11_MODULE(_C, module) {
    module.doc() = "Indexed datasets, phase orders, clustering and commonness; see _C.pyi.";
    mlfr::py::register_local_exception_translator(mlfr::translate);
    mlfr::bind_files(module);
    mlfr::bind_orders(module);
    mlfr::bind_commonness(module);
}
