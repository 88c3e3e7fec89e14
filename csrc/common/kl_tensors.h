// What the CPU and the CUDA rows of distillation ask of their tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "kl_rows.h"

namespace mlr1 {

inline void check_pair(const at::Tensor& student, const at::Tensor& teacher) {
  TORCH_CHECK(teacher.is_contiguous() && student.sizes() == teacher.sizes() &&
                  student.scalar_type() == teacher.scalar_type(),
              "logits of the student are ", student.scalar_type(), student.sizes(),
              " and of the teacher ", teacher.scalar_type(), teacher.sizes(),
              "; they must be of one type and shape, contiguous.");
}

// Numbers of each row in the type in which they are reckoned with.
inline at::Tensor as_statistics(const at::Tensor& numbers, const at::Tensor& logits) {
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return numbers.to(wide).contiguous();
}

inline KlDirection direction_of(c10::string_view name) {
  if (name == "forward") {
    return KlDirection::forward;
  }
  if (name == "reverse") {
    return KlDirection::reverse;
  }
  TORCH_CHECK(name == "jsd", "direction is '", name, "'; it must be forward, reverse or jsd.");
  return KlDirection::jsd;
}

}  // namespace mlr1
