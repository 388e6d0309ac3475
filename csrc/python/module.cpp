// The Python extension: build facts, the CPU tier and repeated calls. Importing it loads the
// operator library, which registers every operator.
#include <csrc/core/cpu_tier.h>
#include <csrc/python/repeat.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = TORCHQUANT_TORCH_VERSION;
#ifdef TORCHQUANT_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def("cpu_tiers", &torchquant::cpu_tiers,
        "Every tier that this build and this CPU have, slowest first.");
  m.def("cpu_tier", &torchquant::cpu_tier_name, "The tier in use.");
  m.def("set_cpu_tier", &torchquant::set_cpu_tier, "Use another tier (tests, benchmarks).");
  torchquant::bind_repeat(m);
}
