// CUDA rows of mlr1::kl_partials, jsd_partials and kl_gradient_; the ops themselves are
// megatron_mlr1/ops/kl_rows.py.
#include "kl_rows.cuh"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/kl_tensors.h"
#include "common/logit_types.h"
#include "common/row_launch.h"

namespace mlr1 {
namespace {

template <bool kHot, bool kReverse, typename scalar_t, int kVector>
void launch_kl_partials(const at::Tensor& student, const at::Tensor& teacher,
                        const at::Tensor& label, double temperature, at::Tensor& out) {
  using math_t = wide_t<scalar_t>;
  constexpr auto kShared = kReduceBytes<KlSums<math_t>, kKlThreads>;
  kl_partials_kernel<scalar_t, kVector, kHot, kReverse>
      <<<rows_of(student), kKlThreads, kShared, c10::cuda::getCurrentCUDAStream()>>>(
          student.const_data_ptr<scalar_t>(), teacher.const_data_ptr<scalar_t>(),
          label.const_data_ptr<int64_t>(), out.mutable_data_ptr<math_t>(), student.size(0),
          static_cast<int>(student.size(1)), static_cast<math_t>(1 / temperature));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor kl_partials_cuda(const at::Tensor& student, const at::Tensor& teacher,
                            const at::Tensor& label_C, double temperature, bool reverse) {
  check_pair(student, teacher);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor label = label_C.contiguous();
  at::Tensor out = empty_statistics(student, kKlPartials);
  if (student.size(0) == 0) {
    return out;
  }
  with_logits(student, [&](auto zero) {
    using scalar_t = decltype(zero);
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      with_flag(temperature != 1, [&](auto hot) {
        with_flag(reverse, [&](auto back) {
          launch_kl_partials<hot, back, scalar_t, vector>(student, teacher, label, temperature,
                                                          out);
        });
      });
    });
  });
  return out;
}

at::Tensor jsd_partials_cuda(const at::Tensor& student, const at::Tensor& teacher,
                             const at::Tensor& between_C, const at::Tensor& lse_C,
                             double temperature, double beta) {
  check_pair(student, teacher);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor between = as_statistics(between_C, student);
  const at::Tensor lse = as_statistics(lse_C, student);
  at::Tensor out = empty_statistics(student, 2);
  if (student.size(0) == 0) {
    return out;
  }
  with_logits(student, [&](auto zero) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    constexpr auto kShared = kReduceBytes<JsdTerms<math_t>, kKlThreads>;
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      jsd_partials_kernel<scalar_t, vector>
          <<<rows_of(student), kKlThreads, kShared, c10::cuda::getCurrentCUDAStream()>>>(
              student.const_data_ptr<scalar_t>(), teacher.const_data_ptr<scalar_t>(),
              between.const_data_ptr<math_t>(), lse.const_data_ptr<math_t>(),
              out.mutable_data_ptr<math_t>(), student.size(0), static_cast<int>(student.size(1)),
              kl_objective<math_t>(temperature, beta));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

template <typename scalar_t, typename out_t, int kVector, bool kHot, KlDirection kDirection>
void launch_kl_gradient(const at::Tensor& student, const at::Tensor& teacher,
                        const at::Tensor& label, const at::Tensor& numbers,
                        const at::Tensor& weights, double temperature, double beta,
                        at::Tensor& out) {
  using math_t = wide_t<scalar_t>;
  constexpr auto kShared = kReduceBytes<KlSplit<math_t>, kKlThreads>;
  kl_gradient_kernel<scalar_t, out_t, kVector, kHot, kDirection>
      <<<rows_of(student), kKlThreads, kShared, c10::cuda::getCurrentCUDAStream()>>>(
          student.mutable_data_ptr<scalar_t>(), teacher.const_data_ptr<scalar_t>(),
          label.const_data_ptr<int64_t>(), numbers.const_data_ptr<math_t>(),
          weights.const_data_ptr<math_t>(), out.mutable_data_ptr<math_t>(), student.size(0),
          static_cast<int>(student.size(1)), kl_objective<math_t>(temperature, beta));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor kl_gradient_cuda(const at::Tensor& student, const at::Tensor& teacher,
                            const at::Tensor& label_C, const at::Tensor& rows_4C,
                            const at::Tensor& weights_3C, double temperature,
                            c10::string_view direction, double beta, at::ScalarType dtype) {
  check_pair(student, teacher);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor label = label_C.contiguous();
  const at::Tensor numbers = as_statistics(rows_4C, student);
  const at::Tensor weights = as_statistics(weights_3C, student);
  const KlDirection way = direction_of(direction);
  at::Tensor out = empty_statistics(student, 3);
  if (student.size(0) == 0) {
    return out;
  }
  with_logits_and_gradient(student, dtype, [&](auto zero, auto narrow_zero) {
    using scalar_t = decltype(zero);
    using out_t = decltype(narrow_zero);
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      with_flag(temperature != 1, [&](auto hot) {
        const auto launch = [&](auto known) {
          launch_kl_gradient<scalar_t, out_t, vector, hot, known>(
              student, teacher, label, numbers, weights, temperature, beta, out);
        };
        if (way == KlDirection::forward) {
          launch(std::integral_constant<KlDirection, KlDirection::forward>{});
        } else if (way == KlDirection::reverse) {
          launch(std::integral_constant<KlDirection, KlDirection::reverse>{});
        } else {
          launch(std::integral_constant<KlDirection, KlDirection::jsd>{});
        }
      });
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CUDA, m) {
  m.impl("kl_partials", kl_partials_cuda);
  m.impl("jsd_partials", jsd_partials_cuda);
  m.impl("kl_gradient_", kl_gradient_cuda);
}

}  // namespace mlr1
