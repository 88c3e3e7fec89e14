// Types of logits, and of the gradient that takes their place: the same, or of fp32 logits bf16 or
// fp16, in the first half of each row's own memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

namespace mlr1 {

// Calls function(zero of the logits' type).
template <typename Function>
void with_logits(const at::Tensor& logits, const Function& function) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits are not [C, V], contiguous");
  TORCH_CHECK(logits.size(1) <= std::numeric_limits<int>::max() / 2, "rows are too long");
  switch (logits.scalar_type()) {
    case at::kDouble:
      return function(double{});
    case at::kFloat:
      return function(float{});
    case at::kBFloat16:
      return function(at::BFloat16{});
    case at::kHalf:
      return function(at::Half{});
    default:
      TORCH_CHECK(false, "logits of type ", logits.scalar_type());
  }
}

// Calls function(zero of the logits' type, zero of the gradient's).
template <typename Function>
void with_logits_and_gradient(const at::Tensor& logits, at::ScalarType gradient,
                              const Function& function) {
  if (logits.scalar_type() == gradient) {
    with_logits(logits, [&](auto zero) { function(zero, zero); });
    return;
  }
  with_logits(logits, [&](auto) {
    TORCH_CHECK(logits.scalar_type() == at::kFloat &&
                    (gradient == at::kBFloat16 || gradient == at::kHalf),
                "a gradient of type ", gradient, " in the place of logits of type ",
                logits.scalar_type());
  });
  if (gradient == at::kBFloat16) {
    function(float{}, at::BFloat16{});
  } else {
    function(float{}, at::Half{});
  }
}

// Room for `count` statistics of each row, [count, C].
inline at::Tensor empty_statistics(const at::Tensor& logits, int64_t count) {
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return logits.new_empty({count, logits.size(0)}, wide);
}

}  // namespace mlr1
