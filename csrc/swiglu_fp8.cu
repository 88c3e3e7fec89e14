// CUDA row of mlr1::swiglu_fp8; the op itself is megatron_mlr1/ops/swiglu_fp8.py.
#include "swiglu_fp8.cuh"

#include <ATen/Dispatch_v2.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/reciprocal.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "common/launch.h"

namespace mlr1 {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> swiglu_fp8_cuda(const at::Tensor& gate_up,
                                                               const at::Tensor& scale,
                                                               const at::Tensor& amax,
                                                               bool transpose) {
  const at::Tensor in = gate_up.contiguous();
  const c10::cuda::CUDAGuard guard(in.device());
  const int64_t width = in.size(-1) / 2;
  at::DimVector shape(in.sizes());
  shape.back() = width;
  const auto bytes = in.options().dtype(at::kByte);
  at::Tensor out = at::empty(shape, bytes);
  if (out.numel() == 0) {
    return {out, at::empty({transpose ? width : 0, 0}, bytes), at::reciprocal(scale)};
  }
  at::Tensor scale_inv = at::empty(scale.sizes(), scale.options());
  const int64_t rows = out.numel() / width;
  at::Tensor turned = transpose ? at::empty({width, rows}, bytes) : at::empty({0, 0}, bytes);
  const int64_t blocks = (rows + kFp8Tile - 1) / kFp8Tile * ((width + kFp8Tile - 1) / kFp8Tile);
  TORCH_CHECK(blocks <= INT32_MAX, "mlr1::swiglu_fp8: ", rows, " x ", width, " is too large");
  const bool whole =
      width % kFp8Columns == 0 && rows % kFp8Rows == 0 && is_aligned(in.const_data_ptr());
  AT_DISPATCH_V2(
      in.scalar_type(), "swiglu_fp8_cuda", AT_WRAP([&] {
        launch(whole ? swiglu_fp8_kernel<scalar_t, true> : swiglu_fp8_kernel<scalar_t, false>,
               static_cast<unsigned>(blocks), kFp8Threads, kFp8SharedBytes,
               in.const_data_ptr<scalar_t>(), scale.const_data_ptr<float>(),
               out.mutable_data_ptr<uint8_t>(),
               transpose ? turned.mutable_data_ptr<uint8_t>() : nullptr,
               amax.mutable_data_ptr<float>(), scale_inv.mutable_data_ptr<float>(), rows, width);
      }),
      at::kFloat, at::kHalf, at::kBFloat16);
  return {out, turned, scale_inv};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CUDA, m) { m.impl("swiglu_fp8", swiglu_fp8_cuda); }

}  // namespace mlr1
