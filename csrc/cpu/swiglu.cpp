// CPU row of mlr1::swiglu and mlr1::swiglu_backward; the op itself is megatron_mlr1/ops/swiglu.py.
#include "swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "common/cpu.h"

namespace mlr1 {

// Neighbouring elements of one row. Functions of one type each and not templates: GCC clones no
// template.
#define MLR1_SWIGLU_ROW(scalar_t)                                                                 \
  MLR1_EVERY_X86 void swiglu_row(const scalar_t* __restrict gate, const scalar_t* __restrict up,  \
                                 scalar_t* __restrict out, int64_t count) {                       \
    using math_t = wide_t<scalar_t>;                                                              \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      out[k] = static_cast<scalar_t>(swiglu<math_t>(gate[k], up[k]));                             \
    }                                                                                             \
  }                                                                                               \
  MLR1_EVERY_X86 void swiglu_backward_row(                                                        \
      const scalar_t* __restrict grad_out, const scalar_t* __restrict gate,                       \
      const scalar_t* __restrict up, scalar_t* __restrict grad_gate,                              \
      scalar_t* __restrict grad_up, int64_t count) {                                              \
    using math_t = wide_t<scalar_t>;                                                              \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      const auto d = swiglu_gradient<math_t>(grad_out[k], gate[k], up[k]);                        \
      grad_gate[k] = static_cast<scalar_t>(d.gate);                                               \
      grad_up[k] = static_cast<scalar_t>(d.up);                                                   \
    }                                                                                             \
  }

MLR1_SWIGLU_ROW(double)
MLR1_SWIGLU_ROW(float)
MLR1_SWIGLU_ROW(at::BFloat16)
MLR1_SWIGLU_ROW(at::Half)

namespace {

// Shares the output's elements among the threads and calls row(first element in [gate | up],
// first in the output, count) for each piece that lies within one row.
template <typename Row>
void for_each_row(int64_t numel, int64_t width, const Row& row) {
  at::parallel_for(0, numel, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t column = begin % width;
      const int64_t count = std::min(width - column, end - begin);
      row((begin / width) * 2 * width + column, begin, count);
      begin += count;
    }
  });
}

at::Tensor swiglu_cpu(const at::Tensor& gate_up) {
  const at::Tensor in = gate_up.contiguous();
  const int64_t width = in.size(-1) / 2;
  at::DimVector shape(in.sizes());
  shape.back() = width;
  at::Tensor out = at::empty(shape, in.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "swiglu_cpu", [&] {
    const scalar_t* const x = in.const_data_ptr<scalar_t>();
    scalar_t* const y = out.mutable_data_ptr<scalar_t>();
    for_each_row(out.numel(), width, [&](int64_t i, int64_t o, int64_t count) {
      swiglu_row(x + i, x + i + width, y + o, count);
    });
  });
  return out;
}

at::Tensor swiglu_backward_cpu(const at::Tensor& grad_out, const at::Tensor& gate_up) {
  const at::Tensor in = gate_up.contiguous();
  const at::Tensor grad = grad_out.contiguous();
  const int64_t width = in.size(-1) / 2;
  at::Tensor grad_in = at::empty_like(in);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, in.scalar_type(), "swiglu_backward_cpu", [&] {
        const scalar_t* const x = in.const_data_ptr<scalar_t>();
        const scalar_t* const dy = grad.const_data_ptr<scalar_t>();
        scalar_t* const dx = grad_in.mutable_data_ptr<scalar_t>();
        for_each_row(grad.numel(), width, [&](int64_t i, int64_t o, int64_t count) {
          swiglu_backward_row(dy + o, x + i, x + i + width, dx + i, dx + i + width, count);
        });
      });
  return grad_in;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) {
  m.impl("swiglu", swiglu_cpu);
  m.impl("swiglu_backward", swiglu_backward_cpu);
}

}  // namespace mlr1
