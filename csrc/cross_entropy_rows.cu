// CUDA rows of the ops of megatron_mlr1/ops/cross_entropy_rows.py.
#include "cross_entropy_rows.cuh"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/launch.h"
#include "common/logit_types.h"

namespace mlr1 {
namespace {

constexpr unsigned kThreads = 512;

// Calls function(number of logits in a vector): 16 bytes where every row is aligned to them, else 1.
template <typename scalar_t, typename Function>
void with_vector(const scalar_t* logits, int64_t columns, const Function& function) {
  constexpr int kVector = kVectorBytes / sizeof(scalar_t);
  if (columns % kVector == 0 && is_aligned(logits)) {
    function(std::integral_constant<int, kVector>{});
  } else {
    function(std::integral_constant<int, 1>{});
  }
}

template <typename scalar_t, typename Pointer>
LogitRows<scalar_t> rows_of(Pointer* z, const at::Tensor& logits, const at::Tensor& label) {
  const int columns = static_cast<int>(logits.size(1));
  return {z, label.const_data_ptr<int64_t>(), logits.size(0), columns, columns};
}

at::Tensor partials_cuda(const at::Tensor& logits, const at::Tensor& labels) {
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor out = empty_statistics(logits, 3);
  if (logits.size(0) == 0) {
    return out;
  }
  const at::Tensor label = labels.contiguous();
  with_logits(logits, [&](auto zero) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    const scalar_t* const z = logits.const_data_ptr<scalar_t>();
    with_vector(z, logits.size(1), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      auto* const kernel = cross_entropy_partials_kernel<scalar_t, kVector, kThreads>;
      auto of = rows_of<const scalar_t>(z, logits, label);
      const unsigned cluster = blocks_of_a_row(of.rows, most_blocks(kernel, kThreads));
      of.share = share_of(of.columns, cluster, kVector);
      RowLaunch(of.rows, cluster, kThreads, kRowSumBytes<math_t, kThreads>)(
          kernel, of, out.mutable_data_ptr<math_t>());
    });
  });
  return out;
}

void gradient_cuda(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& lse,
                   const at::Tensor& pull, const at::Tensor& weight, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(logits.device());
  if (logits.numel() == 0) {
    return;
  }
  const at::Tensor of_row[] = {labels.contiguous(), lse.contiguous(), pull.contiguous(),
                               weight.contiguous()};
  with_logits_and_gradient(logits, dtype, [&](auto zero, auto narrow) {
    using scalar_t = decltype(zero);
    using gradient_t = decltype(narrow);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = logits.mutable_data_ptr<scalar_t>();
    with_vector(z, logits.size(1), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      auto* const kernel =
          cross_entropy_gradient_kernel<scalar_t, gradient_t, kVector, kThreads>;
      auto of = rows_of<scalar_t>(z, logits, of_row[0]);
      const unsigned cluster = blocks_of_a_row(of.rows, most_blocks(kernel, kThreads));
      of.share = share_of(of.columns, cluster, kVector);
      const RowWeights<math_t> weights{of_row[1].const_data_ptr<math_t>(),
                                       of_row[2].const_data_ptr<math_t>(),
                                       of_row[3].const_data_ptr<math_t>()};
      RowLaunch(of.rows, cluster, kThreads, 0)(kernel, of, weights);
    });
  });
}

// Shared memory of a block of which a multiprocessor takes three at a time, so
// that while one waits for its logits others reckon and write. The runtime keeps 1 KB of each.
std::size_t third_of_shared_memory() {
  const int all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return static_cast<std::size_t>(all / 3 - 1024);
}

// The smallest cluster that holds a row with three blocks on a multiprocessor, else the largest, else
// the row is read twice.
template <typename scalar_t, typename gradient_t, int kVector>
void overwrite_rows(LogitRows<scalar_t> of, const wide_t<scalar_t>* weights,
                    wide_t<scalar_t> z_loss, wide_t<scalar_t>* out) {
  constexpr std::size_t kSums = kRowSumBytes<wide_t<scalar_t>, kThreads>;
  auto* const held = cross_entropy_kernel<scalar_t, gradient_t, kVector, kThreads, true>;
  const unsigned most = most_blocks(held, kThreads);
  const std::size_t wanted = third_of_shared_memory();
  for (unsigned cluster = 1; cluster <= most; cluster *= 2) {
    of.share = share_of(of.columns, cluster, kVector);
    const std::size_t shared = kSums + sizeof(scalar_t) * static_cast<std::size_t>(of.share);
    if (shared > wanted && cluster < most) {
      continue;
    }
    const RowLaunch clusters(of.rows, cluster, kThreads, shared);
    if (clusters.fits(held)) {
      clusters(held, of, weights, z_loss, out);
      return;
    }
  }
  auto* const again = cross_entropy_kernel<scalar_t, gradient_t, kVector, kThreads, false>;
  const unsigned cluster = blocks_of_a_row(of.rows, most_blocks(again, kThreads));
  of.share = share_of(of.columns, cluster, kVector);
  RowLaunch(of.rows, cluster, kThreads, kSums)(again, of, weights, z_loss, out);
}

at::Tensor cross_entropy_cuda(const at::Tensor& logits, const at::Tensor& labels,
                              const at::Tensor& weights, double z_loss, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor out = empty_statistics(logits, 2);
  if (logits.size(0) == 0) {
    return out;
  }
  const at::Tensor label = labels.contiguous();
  const at::Tensor weight = weights.contiguous();
  with_logits_and_gradient(logits, dtype, [&](auto zero, auto narrow) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = logits.mutable_data_ptr<scalar_t>();
    with_vector(z, logits.size(1), [&](auto vector) {
      overwrite_rows<scalar_t, decltype(narrow), decltype(vector)::value>(
          rows_of<scalar_t>(z, logits, label), weight.const_data_ptr<math_t>(),
          static_cast<math_t>(z_loss), out.mutable_data_ptr<math_t>());
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CUDA, m) {
  m.impl("cross_entropy_partials", partials_cuda);
  m.impl("cross_entropy_gradient_", gradient_cuda);
  m.impl("cross_entropy_", cross_entropy_cuda);
}

}  // namespace mlr1
