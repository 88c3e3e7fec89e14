// How kernels of distillation that give a block to each row of logits are launched.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <type_traits>

#include "common/vector.h"

namespace mlr1 {

// Blocks of a launch with one for each row.
inline unsigned rows_of(const at::Tensor& logits) {
  TORCH_CHECK(logits.size(0) <= std::numeric_limits<int>::max(), "there are too many rows");
  return static_cast<unsigned>(logits.size(0));
}

// Calls function(std::true_type or std::false_type).
template <typename Function>
void with_flag(bool flag, const Function& function) {
  if (flag) {
    function(std::true_type{});
  } else {
    function(std::false_type{});
  }
}

// Calls function(integral constant) with the elements that a thread can move at once: 16 bytes
// where all rows of both are aligned, else one. fp64, which no training uses, moves one.
template <typename scalar_t, typename Function>
void with_vector(const at::Tensor& logits, const at::Tensor& others, const Function& function) {
  constexpr int kVector = std::is_same_v<scalar_t, double> ? 1 : kVectorBytes / sizeof(scalar_t);
  if (logits.size(1) % kVector == 0 && is_aligned(logits.const_data_ptr()) &&
      is_aligned(others.const_data_ptr())) {
    function(std::integral_constant<int, kVector>{});
  } else {
    function(std::integral_constant<int, 1>{});
  }
}

}  // namespace mlr1
