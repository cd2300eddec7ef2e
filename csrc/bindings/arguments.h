// Checks arguments from Python: a ValueError names the argument and the legal values.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "orders/scores.h"

namespace mlfr {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Integer = py::object;

// An integer in [0, limit].
inline uint64_t to_unsigned(const Integer& value, const char* name, uint64_t limit = UINT64_MAX) {
    const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) throw py::error_already_set();
    const uint64_t number = PyLong_AsUnsignedLongLong(index.ptr());
    const bool outside = PyErr_Occurred() != nullptr;
    if (outside) PyErr_Clear();
    if (outside || number > limit) {
        throw py::value_error(std::string(name) + ": " + std::string(py::str(index)) + " is not in 0 ... " +
                              std::to_string(limit));
    }
    return number;
}

inline uint64_t to_size(const Integer& value, const char* name) {
    return to_unsigned(value, name, INT64_MAX);
}

inline int to_threads(const Integer& value) {
    return static_cast<int>(to_unsigned(value, "num_threads", 4096));
}

// One seed, or a sequence of them.
inline std::vector<uint64_t> to_seeds(const py::object& value) {
    if (!py::isinstance<py::sequence>(value)) return {to_unsigned(value, "seed")};
    std::vector<uint64_t> seeds;
    for (const auto& item : py::reinterpret_borrow<py::sequence>(value)) {
        seeds.push_back(to_unsigned(py::reinterpret_borrow<py::object>(item), "seed"));
    }
    return seeds;
}

// A contiguous array of exactly this type and number of dimensions: nothing is converted or copied.
template <class T>
Array<T> to_array(const py::handle& value, const char* name, py::ssize_t dimensions = 1) {
    if (!Array<T>::check_(value) || py::reinterpret_borrow<py::array>(value).ndim() != dimensions) {
        throw py::value_error(std::string(name) + ": must be a contiguous array of type " +
                              std::string(py::str(py::dtype::of<T>())) + " with " +
                              std::to_string(dimensions) + (dimensions == 1 ? " dimension" : " dimensions"));
    }
    return py::reinterpret_borrow<Array<T>>(value);
}

inline Scores to_scores(const py::handle& value) {
    const Array<float> scores = to_array<float>(value, "scores");
    return {scores.data(), static_cast<uint64_t>(scores.size())};
}

}  // namespace mlfr
