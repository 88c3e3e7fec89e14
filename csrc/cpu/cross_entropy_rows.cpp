// CPU rows of the ops of megatron_mlr1/ops/cross_entropy_rows.py.
//
// A row belongs to one thread, so the result does not depend on their number. It is read in tiles
// that stay in the first-level cache: each for its top, then for its sum.
#include "cross_entropy_rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "common/cpu.h"
#include "common/logit_types.h"

namespace mlr1 {

constexpr int64_t kTile = 2048;

// At most kTile neighbours of a row. Functions of one type each and not templates: GCC clones no
// template. `out` may lie where `z` does: all is read before the first is written.
#define MLR1_LOGITS(scalar_t)                                                                     \
  MLR1_EVERY_X86 SoftmaxSum<wide_t<scalar_t>> tile_sum(const scalar_t* z, int64_t count) {        \
    using math_t = wide_t<scalar_t>;                                                              \
    math_t wide[kTile];                                                                           \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      wide[k] = static_cast<math_t>(z[k]);                                                        \
    }                                                                                             \
    math_t top = -std::numeric_limits<math_t>::infinity();                                        \
    _Pragma("omp simd reduction(max : top)") for (int64_t k = 0; k < count; ++k) {                \
      top = wide[k] > top ? wide[k] : top;                                                        \
    }                                                                                             \
    const math_t origin = origin_of(top);                                                         \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      wide[k] = exponential_of_any(wide[k] - origin);                                             \
    }                                                                                             \
    math_t sum = 0;                                                                               \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t k = 0; k < count; ++k) {                  \
      sum += wide[k];                                                                             \
    }                                                                                             \
    return {top, sum};                                                                            \
  }
#define MLR1_GRADIENT(scalar_t, gradient_t)                                                       \
  MLR1_EVERY_X86 void tile_gradient(const scalar_t* z, gradient_t* out, int64_t count,            \
                                    const GradientRow<wide_t<scalar_t>>& given) {                 \
    const GradientRow<wide_t<scalar_t>> row = given;                                              \
    wide_t<scalar_t> wide[kTile];                                                                 \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      wide[k] = static_cast<wide_t<scalar_t>>(z[k]);                                              \
    }                                                                                             \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      wide[k] = softmax_pull(row, wide[k]);                                                       \
    }                                                                                             \
    for (int64_t k = 0; k < count; ++k) {                                                         \
      out[k] = static_cast<gradient_t>(wide[k]);                                                  \
    }                                                                                             \
  }

MLR1_LOGITS(double)
MLR1_LOGITS(float)
MLR1_LOGITS(at::BFloat16)
MLR1_LOGITS(at::Half)
MLR1_GRADIENT(double, double)
MLR1_GRADIENT(float, float)
MLR1_GRADIENT(float, at::BFloat16)
MLR1_GRADIENT(float, at::Half)
MLR1_GRADIENT(at::BFloat16, at::BFloat16)
MLR1_GRADIENT(at::Half, at::Half)

namespace {

template <typename scalar_t>
SoftmaxSum<wide_t<scalar_t>> row_sum(const scalar_t* z, int64_t columns) {
  auto row = softmax_sum_of_none<wide_t<scalar_t>>();
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    row = MergeSoftmaxSums{}(row, tile_sum(z + begin, std::min(kTile, columns - begin)));
  }
  return row;
}

template <typename scalar_t>
wide_t<scalar_t> logit_at(const scalar_t* z, int64_t column) {
  return column < 0 ? wide_t<scalar_t>(0) : static_cast<wide_t<scalar_t>>(z[column]);
}

// Overwrites a row by its gradient.
template <typename gradient_t, typename scalar_t>
void row_gradient(scalar_t* z, int64_t columns, int64_t label,
                  const GradientRow<wide_t<scalar_t>>& row) {
  auto* const out = reinterpret_cast<gradient_t*>(z);
  if (row.pull == 0 && row.weight == 0) {
    std::fill_n(out, columns, gradient_t(0));
    return;
  }
  const auto z_label = logit_at(z, label);
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    tile_gradient(z + begin, out + begin, std::min(kTile, columns - begin), row);
  }
  if (label >= 0) {
    out[label] = static_cast<gradient_t>(softmax_pull(row, z_label) - row.weight);
  }
}

// Calls function(row) for each row, shared among the threads.
template <typename Function>
void for_each_row(const at::Tensor& logits, const Function& function) {
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(logits.size(1), 1), 1);
  at::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      function(row);
    }
  });
}

at::Tensor partials_cpu(const at::Tensor& logits, const at::Tensor& labels) {
  at::Tensor out = empty_statistics(logits, 3);
  const int64_t rows = logits.size(0);
  const int64_t columns = logits.size(1);
  const at::Tensor label = labels.contiguous();
  const int64_t* const labels_at = label.const_data_ptr<int64_t>();
  with_logits(logits, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* const z = logits.const_data_ptr<scalar_t>();
    auto* const to = out.mutable_data_ptr<wide_t<scalar_t>>();
    for_each_row(logits, [&](int64_t row) {
      const scalar_t* const begin = z + row * columns;
      const auto sum = row_sum(begin, columns);
      to[row] = sum.top;
      to[rows + row] = sum.sum;
      to[2 * rows + row] = logit_at(begin, labels_at[row]);
    });
  });
  return out;
}

void gradient_cpu(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& lse,
                  const at::Tensor& pull, const at::Tensor& weight, at::ScalarType dtype) {
  const int64_t columns = logits.size(1);
  const at::Tensor of_row[] = {labels.contiguous(), lse.contiguous(), pull.contiguous(),
                               weight.contiguous()};
  with_logits_and_gradient(logits, dtype, [&](auto zero, auto narrow) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = logits.mutable_data_ptr<scalar_t>();
    const int64_t* const labels_at = of_row[0].const_data_ptr<int64_t>();
    const math_t* const lse_at = of_row[1].const_data_ptr<math_t>();
    const math_t* const pull_at = of_row[2].const_data_ptr<math_t>();
    const math_t* const weight_at = of_row[3].const_data_ptr<math_t>();
    for_each_row(logits, [&](int64_t row) {
      row_gradient<decltype(narrow)>(z + row * columns, columns, labels_at[row],
                                     {lse_at[row], pull_at[row], weight_at[row]});
    });
  });
}

at::Tensor cross_entropy_cpu(const at::Tensor& logits, const at::Tensor& labels,
                             const at::Tensor& weights, double z_loss, at::ScalarType dtype) {
  at::Tensor out = empty_statistics(logits, 2);
  const int64_t rows = logits.size(0);
  const int64_t columns = logits.size(1);
  const at::Tensor label = labels.contiguous();
  const at::Tensor weight = weights.contiguous();
  const int64_t* const labels_at = label.const_data_ptr<int64_t>();
  with_logits_and_gradient(logits, dtype, [&](auto zero, auto narrow) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = logits.mutable_data_ptr<scalar_t>();
    const math_t* const weight_at = weight.const_data_ptr<math_t>();
    math_t* const to = out.mutable_data_ptr<math_t>();
    for_each_row(logits, [&](int64_t row) {
      scalar_t* const begin = z + row * columns;
      const auto sum = row_sum(begin, columns);
      to[row] = lse_of(sum);
      to[rows + row] = logit_at(begin, labels_at[row]);
      row_gradient<decltype(narrow)>(
          begin, columns, labels_at[row],
          gradient_row(sum, weight_at[row], static_cast<math_t>(z_loss)));
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) {
  m.impl("cross_entropy_partials", partials_cpu);
  m.impl("cross_entropy_gradient_", gradient_cpu);
  m.impl("cross_entropy_", cross_entropy_cpu);
}

}  // namespace mlr1
