// Commonness (csrc/commonness) as part of the module _C.
#pragma once

#include <pybind11/pybind11.h>

namespace mlfr {

void bind_commonness(pybind11::module_& module);

}  // namespace mlfr
