// The extension module: defines the ops' schemas (schemas.h) and a few plain functions.
// pybind11 binds only these functions. Ops go through torch's stable ABI, so that one build keeps
// working when torch is upgraded.
// The pybind11 in torch 2.11 refuses files that target the stable ABI, so hide the macro from it.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "codebook.h"
#include "cpu/simd/simd.h"
#include "host/common.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(qlora_ext, m) {
  for (const char* schema : qlora_ext::kSchemas) m.def(schema);
}

namespace {

namespace py = pybind11;
using qlora_ext::Codebook;

// {name: its 16 values in fp32} for every named codebook.
py::dict codebooks() {
  py::dict result;
  for (const auto& entry : qlora_ext::kNamedCodebooks) {
    result[entry.name] = std::vector<float>(entry.levels, entry.levels + 16);
  }
  return result;
}

// The effective values and thresholds of a codebook under a companding.
py::tuple resolve_codebook(const std::string& quant_type,
                           const std::optional<std::vector<double>>& levels,
                           const std::string& companding, double companding_k) {
  const Codebook book =
      qlora_ext::host::as_codebook("quantize_4bit", quant_type, levels, companding, companding_k);
  return py::make_tuple(std::vector<float>(book.values, book.values + 16),
                        std::vector<float>(book.thresholds, book.thresholds + 15));
}

std::vector<float> dynamic_map() {
  return std::vector<float>(qlora_ext::kDynamicMap, qlora_ext::kDynamicMap + 256);
}

std::string cpu_path() {
  if (const char* error = qlora_ext::cpu::cpu_path_error()) throw std::runtime_error(error);
  return qlora_ext::cpu::cpu_path();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "qlora_ext's compiled library: registers torch.ops.qlora_ext.* when imported";
  m.def("codebooks", &codebooks, "{quant_type: its 16 values, by code}");
  m.def("resolve_codebook", &resolve_codebook, py::arg("quant_type"), py::arg("codebook"),
        py::arg("companding"), py::arg("companding_k"),
        "(16 effective values by code, 15 ascending decision thresholds)");
  m.def("dynamic_map", &dynamic_map, "The 256 values of the signed dynamic map for 8-bit scales");
  m.def("cpu_path", &cpu_path, "The instruction set that the CPU kernels run on: one of cpu_paths");
  m.attr("cpu_paths") = qlora_ext::cpu::cpu_paths();  // all paths in this build, the best first
  m.attr("torch_target_version") = "2.11";
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = QLORA_EXT_CUDA_ARCHS;  // TORCH_CUDA_ARCH_LIST of the CUDA library, or ""
  m.attr("cuda_version") = QLORA_EXT_CUDA_VERSION;  // CUDA version of its torch, or ""
}
