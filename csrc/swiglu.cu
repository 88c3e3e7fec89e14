// CUDA row of mlr1::swiglu and mlr1::swiglu_backward; the op itself is megatron_mlr1/ops/swiglu.py.
#include "swiglu.cuh"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "common/launch.h"

namespace mlr1 {
namespace {

constexpr int64_t kMaxGridY = 65535;
// Blocks of 256 threads for each multiprocessor: enough to fill it many times, and few enough that a
// thread of a long tensor sees several rows.
constexpr int64_t kBlocks = 256;

const dim3 kBlock(kWarp, kSwigluRows);

dim3 grid_of(int64_t rows, int64_t width, int vector) {
  const int64_t x = (width / vector + kWarp - 1) / kWarp;
  const int64_t y = (rows + kSwigluRows - 1) / kSwigluRows;
  const int64_t blocks = kBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t wanted = std::max<int64_t>(blocks / x, 1);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min({y, wanted, kMaxGridY})));
}

at::Tensor swiglu_cuda(const at::Tensor& gate_up) {
  const at::Tensor in = gate_up.contiguous();
  const c10::cuda::CUDAGuard guard(in.device());
  const int64_t width = in.size(-1) / 2;
  at::DimVector shape(in.sizes());
  shape.back() = width;
  at::Tensor out = at::empty(shape, in.options());
  if (out.numel() == 0) {
    return out;
  }
  const int64_t rows = out.numel() / width;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "swiglu_cuda", [&] {
    constexpr int kVector = kVectorBytes / sizeof(scalar_t);
    const scalar_t* const x = in.const_data_ptr<scalar_t>();
    scalar_t* const y = out.mutable_data_ptr<scalar_t>();
    if (width % kVector == 0 && is_aligned(x)) {
      launch(swiglu_kernel<scalar_t, kVector>, grid_of(rows, width, kVector), kBlock, 0, x, y, rows,
             width);
    } else {
      launch(swiglu_kernel<scalar_t, 1>, grid_of(rows, width, 1), kBlock, 0, x, y, rows, width);
    }
  });
  return out;
}

at::Tensor swiglu_backward_cuda(const at::Tensor& grad_out, const at::Tensor& gate_up) {
  const at::Tensor in = gate_up.contiguous();
  const at::Tensor grad = grad_out.contiguous();
  const c10::cuda::CUDAGuard guard(in.device());
  const int64_t width = in.size(-1) / 2;
  at::Tensor grad_in = at::empty_like(in);
  if (grad.numel() == 0) {
    return grad_in;
  }
  const int64_t rows = grad.numel() / width;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, in.scalar_type(), "swiglu_backward_cuda", [&] {
        constexpr int kVector = kVectorBytes / sizeof(scalar_t);
        const scalar_t* const dy = grad.const_data_ptr<scalar_t>();
        const scalar_t* const x = in.const_data_ptr<scalar_t>();
        scalar_t* const dx = grad_in.mutable_data_ptr<scalar_t>();
        if (width % kVector == 0 && is_aligned(x) && is_aligned(dy)) {
          launch(swiglu_backward_kernel<scalar_t, kVector>, grid_of(rows, width, kVector), kBlock,
                 0, dy, x, dx, rows, width);
        } else {
          launch(swiglu_backward_kernel<scalar_t, 1>, grid_of(rows, width, 1), kBlock, 0, dy, x,
                 dx, rows, width);
        }
      });
  return grad_in;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CUDA, m) {
  m.impl("swiglu", swiglu_cuda);
  m.impl("swiglu_backward", swiglu_backward_cuda);
}

}  // namespace mlr1
