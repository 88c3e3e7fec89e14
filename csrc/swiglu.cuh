// Kernels of mlr1::swiglu and mlr1::swiglu_backward.
//
// Bound by memory: forward reads 2F and writes F numbers a row, backward reads 3F and writes 2F, each
// once. A warp takes 32 neighbouring 16-byte vectors of a row, a block eight rows at a time, and
// the grid strides over the rows, so no thread divides to find its place.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/vector.h"
#include "swiglu.h"

namespace mlr1 {

constexpr int kSwigluRows = 8;  // rows that a block of kWarp x kSwigluRows threads takes at a time

template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kWarp* kSwigluRows)
    swiglu_kernel(const scalar_t* __restrict__ x, scalar_t* __restrict__ y, std::int64_t rows,
                  std::int64_t width) {
  using math_t = wide_t<scalar_t>;
  using vector_t = Vector<scalar_t, kVector>;
  const std::int64_t column = (std::int64_t(blockIdx.x) * kWarp + threadIdx.x) * kVector;
  if (column >= width) {
    return;
  }
  const std::int64_t stride = std::int64_t(gridDim.y) * kSwigluRows;
  for (std::int64_t row = std::int64_t(blockIdx.y) * kSwigluRows + threadIdx.y; row < rows;
       row += stride) {
    const scalar_t* const in = x + row * 2 * width + column;
    const vector_t gate = *reinterpret_cast<const vector_t*>(in);
    const vector_t up = *reinterpret_cast<const vector_t*>(in + width);
    vector_t out;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      out.at[k] = static_cast<scalar_t>(
          swiglu(static_cast<math_t>(gate.at[k]), static_cast<math_t>(up.at[k])));
    }
    store_whole(reinterpret_cast<vector_t*>(y + row * width + column), out);
  }
}

template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kWarp* kSwigluRows)
    swiglu_backward_kernel(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x,
                           scalar_t* __restrict__ dx, std::int64_t rows, std::int64_t width) {
  using math_t = wide_t<scalar_t>;
  using vector_t = Vector<scalar_t, kVector>;
  const std::int64_t column = (std::int64_t(blockIdx.x) * kWarp + threadIdx.x) * kVector;
  if (column >= width) {
    return;
  }
  const std::int64_t stride = std::int64_t(gridDim.y) * kSwigluRows;
  for (std::int64_t row = std::int64_t(blockIdx.y) * kSwigluRows + threadIdx.y; row < rows;
       row += stride) {
    const std::int64_t at = row * 2 * width + column;
    const vector_t gate = *reinterpret_cast<const vector_t*>(x + at);
    const vector_t up = *reinterpret_cast<const vector_t*>(x + at + width);
    const vector_t grad = *reinterpret_cast<const vector_t*>(dy + row * width + column);
    vector_t grad_gate;
    vector_t grad_up;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const auto d = swiglu_gradient(static_cast<math_t>(grad.at[k]),
                                     static_cast<math_t>(gate.at[k]),
                                     static_cast<math_t>(up.at[k]));
      grad_gate.at[k] = static_cast<scalar_t>(d.gate);
      grad_up.at[k] = static_cast<scalar_t>(d.up);
    }
    store_whole(reinterpret_cast<vector_t*>(dx + at), grad_gate);
    store_whole(reinterpret_cast<vector_t*>(dx + at + width), grad_up);
  }
}

}  // namespace mlr1
