// The Python module megatron_lfr._C. Every function releases the GIL around its work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <system_error>

#include "cluster.h"
#include "dataset.h"
#include "order.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using mlfr::Scores;
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using ScoreArray = Array<float>;
using Release = py::gil_scoped_release;

Scores view(const ScoreArray& scores) {
    if (scores.ndim() != 1) throw std::invalid_argument("scores: must be fp32 [n_blocks]");
    return {scores.data(), static_cast<uint64_t>(scores.size())};
}

// Makes the ids of an order: uint32 where the number of blocks allows it, uint64 otherwise. make(pointer) fills them.
template <class Make>
py::array make_ids(uint64_t n_blocks, uint64_t draws, Make make) {
    if (n_blocks <= std::numeric_limits<uint32_t>::max()) {
        Array<uint32_t> ids(static_cast<py::ssize_t>(draws));
        uint32_t* out = ids.mutable_data();
        Release release;
        make(out);
        return std::move(ids);
    }
    Array<uint64_t> ids(static_cast<py::ssize_t>(draws));
    uint64_t* out = ids.mutable_data();
    Release release;
    make(out);
    return std::move(ids);
}

py::array permutation(uint64_t n, uint64_t seed, int threads) {
    return make_ids(n, n, [&](auto* out) { mlfr::permutation(n, seed, threads, out); });
}

py::array shuffle_visits(const Array<uint32_t>& visits, uint64_t seed, int threads) {
    const auto n = static_cast<uint64_t>(visits.size());
    const uint32_t* counts = visits.data();
    const uint64_t draws = std::accumulate(counts, counts + n, uint64_t{0});
    return make_ids(n, draws, [&](auto* out) { mlfr::shuffle_visits(counts, n, draws, seed, threads, out); });
}

py::tuple threshold(const ScoreArray& scores, double drop, int threads) {
    const Scores data = view(scores);
    mlfr::Threshold result;
    {
        Release release;
        result = mlfr::threshold(data, drop, threads);
    }
    return py::make_tuple(result.cut, result.tie_quota, result.dropped);
}

py::array order_threshold(const ScoreArray& scores, double drop, bool keep_unseen, uint64_t draws, uint64_t seed,
                          int threads) {
    const Scores data = view(scores);
    return make_ids(data.n, draws, [&](auto* out) {
        mlfr::order_threshold(data, drop, keep_unseen, draws, seed, threads, out);
    });
}

py::array order_visits(const ScoreArray& scores, std::vector<double> cuts, std::vector<double> mass, double unseen_mass,
                       double cap, uint64_t draws, uint64_t seed, int threads) {
    const Scores data = view(scores);
    const mlfr::Weighting weighting{std::move(cuts), std::move(mass), unseen_mass, cap};
    return make_ids(data.n, draws,
                    [&](auto* out) { mlfr::order_visits(data, weighting, draws, seed, threads, out); });
}

py::array order_choice(const ScoreArray& scores, std::vector<double> cuts, std::vector<double> mass, double unseen_mass,
                       double cap, uint64_t draws, uint64_t seed, int threads) {
    const Scores data = view(scores);
    const mlfr::Weighting weighting{std::move(cuts), std::move(mass), unseen_mass, cap};
    return make_ids(data.n, draws,
                    [&](auto* out) { mlfr::order_choice(data, weighting, draws, seed, threads, out); });
}

py::tuple cluster(const ScoreArray& scores, int k, double cap, int bins, int threads) {
    const Scores data = view(scores);
    mlfr::Clusters result;
    {
        Release release;
        result = mlfr::cluster(data, k, bins, cap, threads);
    }
    auto array = [](const auto& values) { return py::array(static_cast<py::ssize_t>(values.size()), values.data()); };
    return py::make_tuple(array(result.cuts), array(result.counts), array(result.mean_perplexity), result.unseen,
                          result.mse);
}

float percentile(const ScoreArray& scores, double q, int threads) {
    const Scores data = view(scores);
    Release release;
    return mlfr::percentile(data, q, threads);
}

template <class Id>
uint64_t order_hash(const Array<Id>& ids, int threads) {
    const Id* data = ids.data();
    const auto n = static_cast<uint64_t>(ids.size());
    Release release;
    return mlfr::order_hash(data, n, threads);
}

void read_tokens(const mlfr::TokenFile& file, const Array<int64_t>& starts, uint64_t length, Array<int64_t>& out,
                 int dtype_code, int threads) {
    const auto rows = static_cast<uint64_t>(starts.size());
    if (starts.ndim() != 1 || out.ndim() != 2 || static_cast<uint64_t>(out.shape(0)) != rows ||
        static_cast<uint64_t>(out.shape(1)) != length) {
        throw std::invalid_argument("read: starts must be [rows] and out [rows, length]");
    }
    const int64_t* from = starts.data();
    int64_t* to = out.mutable_data();
    Release release;
    file.read(from, rows, length, dtype_code, threads, to);
}

py::array sequence_lengths(const mlfr::IndexFile& index, uint64_t first, uint64_t last) {
    const std::vector<int32_t> lengths = index.sequence_lengths(first, last);
    return py::array(static_cast<py::ssize_t>(lengths.size()), lengths.data());
}

// C++ errors as Python users know them: OSError with its number, ValueError for the rest.
void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const std::out_of_range& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Indexed datasets, phase orders and clustering; see _C.pyi.";
    py::register_local_exception_translator(translate);

    py::class_<mlfr::IndexFile>(module, "IndexFile")
        .def(py::init<const std::string&>(), "path"_a, py::call_guard<Release>())
        .def_property_readonly("dtype_code", &mlfr::IndexFile::dtype_code)
        .def_property_readonly("item_size", &mlfr::IndexFile::item_size)
        .def_property_readonly("num_sequences", &mlfr::IndexFile::num_sequences)
        .def_property_readonly("num_documents", &mlfr::IndexFile::num_documents)
        .def_property_readonly("num_tokens", &mlfr::IndexFile::num_tokens)
        .def("token_offset", &mlfr::IndexFile::token_offset, "document"_a)
        .def("sequence_lengths", &sequence_lengths, "first"_a, "last"_a);
    py::class_<mlfr::TokenFile>(module, "TokenFile")
        .def(py::init<const std::string&, uint64_t, uint64_t>(), "path"_a, "item_size"_a, "num_tokens"_a)
        .def("read", &read_tokens, "starts"_a.noconvert(), "length"_a, "out"_a.noconvert(), "dtype_code"_a,
             "num_threads"_a = 1);

    module.def("permutation", &permutation, "n"_a, "seed"_a, "num_threads"_a = 0);
    module.def("shuffle_visits", &shuffle_visits, "visits"_a, "seed"_a, "num_threads"_a = 0);
    module.def("threshold", &threshold, "scores"_a, "drop"_a, "num_threads"_a = 0);
    module.def("order_threshold", &order_threshold, "scores"_a, "drop"_a, "keep_unseen"_a, "draws"_a, "seed"_a,
               "num_threads"_a = 0);
    module.def("order_visits", &order_visits, "scores"_a, "cuts"_a, "mass"_a, "unseen_mass"_a, "cap"_a, "draws"_a,
               "seed"_a, "num_threads"_a = 0);
    module.def("order_choice", &order_choice, "scores"_a, "cuts"_a, "mass"_a, "unseen_mass"_a, "cap"_a, "draws"_a,
               "seed"_a, "num_threads"_a = 0);
    module.def("cluster", &cluster, "scores"_a, "k"_a = 8, "cap"_a = 700.0, "bins"_a = 4096, "num_threads"_a = 0);
    module.def("percentile", &percentile, "scores"_a, "q"_a, "num_threads"_a = 0);
    module.def("order_hash", &order_hash<uint32_t>, "ids"_a.noconvert(), "num_threads"_a = 0);
    module.def("order_hash", &order_hash<uint64_t>, "ids"_a.noconvert(), "num_threads"_a = 0);
}
