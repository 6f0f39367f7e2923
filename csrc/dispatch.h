// Runtime dtype -> compile-time type, by one visitor for every backend.
#pragma once

#include "params.h"

namespace qlora_ext {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with the backend's own T for the dtype:
//   visit_dtype<float, half_t, bfloat16_t>(dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <class Float32, class Float16, class BFloat16, class F>
decltype(auto) visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16: return f(TypeTag<Float16>{});
    case DType::kBFloat16: return f(TypeTag<BFloat16>{});
    default: return f(TypeTag<Float32>{});
  }
}

}  // namespace qlora_ext
