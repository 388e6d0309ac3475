#pragma once
#include <pybind11/pybind11.h>

namespace torchquant {

void bind_repeat(pybind11::module_& m);

}  // namespace torchquant
