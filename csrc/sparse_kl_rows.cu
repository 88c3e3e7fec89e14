// CUDA rows of mlr1::sparse_kl_partials and sparse_kl_gradient_; the ops themselves are
// megatron_mlr1/ops/sparse_kl_rows.py.
#include "sparse_kl_rows.cuh"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/kl_tensors.h"
#include "common/launch.h"
#include "common/logit_types.h"
#include "common/row_launch.h"

namespace mlr1 {
namespace {

template <bool kHot, bool kBucket, typename scalar_t, int kVector>
void launch_partials(const at::Tensor& logits, const at::Tensor& label, const at::Tensor& columns,
                     const at::Tensor& weights, double temperature, at::Tensor& out) {
  using math_t = wide_t<scalar_t>;
  const int width = static_cast<int>(logits.size(1));
  launch(sparse_kl_partials_kernel<scalar_t, kVector, kHot, kBucket>, rows_of(logits), kKlThreads,
         sparse_kl_shared<math_t, kVector>(width, kBucket), logits.const_data_ptr<scalar_t>(),
         label.const_data_ptr<int64_t>(), columns.const_data_ptr<int64_t>(),
         weights.const_data_ptr<math_t>(), out.mutable_data_ptr<math_t>(), logits.size(0), width,
         static_cast<int>(columns.size(1)), static_cast<math_t>(1 / temperature));
}

at::Tensor sparse_kl_partials_cuda(const at::Tensor& logits, const at::Tensor& label_C,
                                   const at::Tensor& column_CK, const at::Tensor& weight_CK,
                                   double temperature, bool bucket) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor label = label_C.contiguous();
  const at::Tensor columns = column_CK.contiguous();
  const at::Tensor weights = as_statistics(weight_CK, logits);
  at::Tensor out = empty_statistics(logits, kSparseKlPartials);
  if (logits.size(0) == 0) {
    return out;
  }
  with_logits(logits, [&](auto zero) {
    using scalar_t = decltype(zero);
    with_vector<scalar_t>(logits, logits, [&](auto vector) {
      with_flag(temperature != 1, [&](auto hot) {
        with_flag(bucket, [&](auto erases) {
          launch_partials<hot, erases, scalar_t, vector>(logits, label, columns, weights,
                                                         temperature, out);
        });
      });
    });
  });
  return out;
}

void sparse_kl_gradient_cuda(const at::Tensor& logits, const at::Tensor& label_C,
                             const at::Tensor& column_CK, const at::Tensor& weight_CK,
                             const at::Tensor& rows_3C, const at::Tensor& weights_3C,
                             double temperature, bool bucket, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor label = label_C.contiguous();
  const at::Tensor columns = column_CK.contiguous();
  const at::Tensor weights = as_statistics(weight_CK, logits);
  const at::Tensor numbers = as_statistics(rows_3C, logits);
  const at::Tensor factors = as_statistics(weights_3C, logits);
  at::Tensor room = weights.new_empty(weights.sizes());
  if (logits.numel() == 0) {
    return;
  }
  with_logits_and_gradient(logits, dtype, [&](auto zero, auto narrow_zero) {
    using scalar_t = decltype(zero);
    using out_t = decltype(narrow_zero);
    using math_t = wide_t<scalar_t>;
    with_vector<scalar_t>(logits, logits, [&](auto vector) {
      with_flag(temperature != 1, [&](auto hot) {
        launch(sparse_kl_gradient_kernel<scalar_t, out_t, vector, hot>, rows_of(logits),
               kKlThreads, 0, logits.mutable_data_ptr<scalar_t>(),
               label.const_data_ptr<int64_t>(), columns.const_data_ptr<int64_t>(),
               weights.const_data_ptr<math_t>(), numbers.const_data_ptr<math_t>(),
               factors.const_data_ptr<math_t>(), room.mutable_data_ptr<math_t>(), logits.size(0),
               static_cast<int>(logits.size(1)), static_cast<int>(columns.size(1)),
               static_cast<math_t>(1 / temperature), bucket);
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CUDA, m) {
  m.impl("sparse_kl_partials", sparse_kl_partials_cuda);
  m.impl("sparse_kl_gradient_", sparse_kl_gradient_cuda);
}

}  // namespace mlr1
