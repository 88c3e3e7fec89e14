// CPU row of mlr1::swiglu_fp8; the op itself is megatron_mlr1/ops/swiglu_fp8.py.
#include "swiglu_fp8.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/reciprocal.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <tuple>

#include "common/cpu.h"

namespace mlr1 {

// Neighbouring elements of one row; gives the largest magnitude's bits. Functions of one type each
// and not templates: GCC clones no template.
#define MLR1_SWIGLU_FP8_ROW(scalar_t)                                                              \
  MLR1_EVERY_X86 std::uint32_t swiglu_fp8_row(const scalar_t* __restrict gate,                     \
                                              const scalar_t* __restrict up, float scale,          \
                                              std::uint8_t* __restrict out, int64_t count) {       \
    std::uint32_t largest = 0;                                                                     \
    for (int64_t k = 0; k < count; ++k) {                                                          \
      const float value = swiglu_stored<scalar_t>(gate[k], up[k]);                                 \
      const std::uint32_t magnitude = magnitude_of(value);                                         \
      largest = magnitude > largest ? magnitude : largest;                                         \
      out[k] = e4m3_of(value * scale);                                                             \
    }                                                                                              \
    return largest;                                                                                \
  }

MLR1_SWIGLU_FP8_ROW(float)
MLR1_SWIGLU_FP8_ROW(at::BFloat16)
MLR1_SWIGLU_FP8_ROW(at::Half)

namespace {

constexpr int64_t kSide = 64;  // of a square that is turned in cache

void turn(const std::uint8_t* from, std::uint8_t* to, int64_t rows, int64_t width) {
  at::parallel_for(0, (width + kSide - 1) / kSide, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += kSide) {
      const int64_t last = std::min(row + kSide, rows);
      for (int64_t k = begin * kSide; k < std::min(end * kSide, width); ++k) {
        for (int64_t r = row; r < last; ++r) {
          to[k * rows + r] = from[r * width + k];
        }
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> swiglu_fp8_cpu(const at::Tensor& gate_up,
                                                              const at::Tensor& scale,
                                                              const at::Tensor& amax,
                                                              bool transpose) {
  const at::Tensor in = gate_up.contiguous();
  const int64_t width = in.size(-1) / 2;
  at::DimVector shape(in.sizes());
  shape.back() = width;
  const auto bytes = in.options().dtype(at::kByte);
  at::Tensor out = at::empty(shape, bytes);
  const int64_t rows = width == 0 ? 0 : out.numel() / width;
  at::Tensor turned = transpose ? at::empty({width, rows}, bytes) : at::empty({0, 0}, bytes);
  const float factor = *scale.const_data_ptr<float>();
  std::uint8_t* const y = out.mutable_data_ptr<std::uint8_t>();
  std::uint32_t largest = 0;
  std::mutex largest_mutex;
  const auto rows_of = [&](const auto* x) {
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1);
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::uint32_t mine = 0;
      for (int64_t row = begin; row < end; ++row) {
        const auto* const gate = x + row * 2 * width;
        mine = std::max(mine, swiglu_fp8_row(gate, gate + width, factor, y + row * width, width));
      }
      const std::lock_guard<std::mutex> lock(largest_mutex);
      largest = std::max(largest, mine);
    });
  };
  AT_DISPATCH_V2(in.scalar_type(), "swiglu_fp8_cpu",
                 AT_WRAP([&] { rows_of(in.const_data_ptr<scalar_t>()); }), at::kFloat, at::kHalf,
                 at::kBFloat16);
  float* const most = amax.mutable_data_ptr<float>();
  largest = std::max(largest, bits_of(*most));
  std::memcpy(most, &largest, sizeof(largest));
  if (transpose) {
    turn(y, turned.mutable_data_ptr<std::uint8_t>(), rows, width);
  }
  return {out, turned, at::reciprocal(scale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) { m.impl("swiglu_fp8", swiglu_fp8_cpu); }

}  // namespace mlr1
