// CUDA rows of the ops of megatron_mlr1/ops/kl_rows.py.
#include "kl_rows.cuh"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/kl_tensors.h"
#include "common/launch.h"
#include "common/logit_types.h"
#include "common/row_launch.h"

namespace mlr1 {
namespace {

// Calls function(whether exponentials at T are their own). Rows without vectors, which no training
// has, take them as their own at T = 1 too: half as many kernels.
template <int kVector, typename Function>
void with_heat(double temperature, const Function& function) {
  if constexpr (kVector == 1) {
    function(std::true_type{});
  } else {
    with_flag(temperature != 1, function);
  }
}

// Calls function(integral constant of the direction).
template <typename Function>
void with_direction(KlDirection direction, const Function& function) {
  if (direction == KlDirection::forward) {
    function(std::integral_constant<KlDirection, KlDirection::forward>{});
  } else if (direction == KlDirection::reverse) {
    function(std::integral_constant<KlDirection, KlDirection::reverse>{});
  } else {
    function(std::integral_constant<KlDirection, KlDirection::jsd>{});
  }
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
    using math_t = wide_t<scalar_t>;
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      with_heat<vector>(temperature, [&](auto hot) {
        with_flag(reverse, [&](auto back) {
          launch(kl_partials_kernel<scalar_t, vector, hot, back>, rows_of(student), kKlThreads,
                 kReduceBytes<KlSums<math_t>, kKlThreads>, student.const_data_ptr<scalar_t>(),
                 teacher.const_data_ptr<scalar_t>(), label.const_data_ptr<int64_t>(),
                 out.mutable_data_ptr<math_t>(), student.size(0),
                 static_cast<int>(student.size(1)), static_cast<math_t>(1 / temperature));
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
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      launch(jsd_partials_kernel<scalar_t, vector>, rows_of(student), kKlThreads,
             kReduceBytes<JsdTerms<math_t>, kKlThreads>, student.const_data_ptr<scalar_t>(),
             teacher.const_data_ptr<scalar_t>(), between.const_data_ptr<math_t>(),
             lse.const_data_ptr<math_t>(), out.mutable_data_ptr<math_t>(), student.size(0),
             static_cast<int>(student.size(1)), kl_objective<math_t>(temperature, beta));
    });
  });
  return out;
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
    using math_t = wide_t<scalar_t>;
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      with_heat<vector>(temperature, [&](auto hot) {
        with_direction(way, [&](auto known) {
          launch(kl_gradient_kernel<scalar_t, out_t, vector, hot, known>, rows_of(student),
                 kKlThreads, kReduceBytes<KlSplit<math_t>, kKlThreads>,
                 student.mutable_data_ptr<scalar_t>(), teacher.const_data_ptr<scalar_t>(),
                 label.const_data_ptr<int64_t>(), numbers.const_data_ptr<math_t>(),
                 weights.const_data_ptr<math_t>(), out.mutable_data_ptr<math_t>(),
                 student.size(0), static_cast<int>(student.size(1)),
                 kl_objective<math_t>(temperature, beta));
        });
      });
    });
  });
  return out;
}

// How the blocks of a cluster share a row, and the bytes of shared memory that each takes.
struct KlLayout {
  unsigned cluster;
  KlShares shares;
  std::size_t shared_bytes;
};

// One block, which reads both rows again.
template <typename scalar_t>
KlLayout layout_that_keeps_nothing(int width, int vector) {
  return {1,
          {share_of(width, 1, vector), false, 0},
          KlRoom<wide_t<scalar_t>, kKlThreadsOfOnce>::kBytes};
}

// The smallest cluster that holds a pair of rows while a multiprocessor takes two blocks, of which
// one reckons and writes while the other reads. If none does, the largest one, with as much of t as
// there is room for beside z. If there is no room for z, one block takes all of a multiprocessor's.
template <typename scalar_t>
KlLayout layout_that_keeps(int width, int vector, unsigned most) {
  constexpr std::size_t kSums = KlRoom<wide_t<scalar_t>, kKlThreadsOfOnce>::kBytes;
  // The runtime keeps 1 KB of each block's.
  const int half = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024;
  const int whole = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto room = [&](int bytes) {
    return (bytes - static_cast<int>(kSums)) / static_cast<int>(sizeof(scalar_t));
  };
  unsigned cluster = 1;
  while (cluster < most && 2 * share_of(width, cluster, vector) > room(half)) {
    cluster *= 2;
  }
  const int columns = share_of(width, cluster, vector);
  const int beside_z = room(columns <= room(half) ? half : whole) - columns;
  if (beside_z < 0) {
    return layout_that_keeps_nothing<scalar_t>(width, vector);
  }
  const int kept_t = beside_z < columns ? beside_z / vector * vector : columns;
  const auto kept = static_cast<std::size_t>(columns + kept_t);
  return {cluster, {columns, true, kept_t}, kSums + sizeof(scalar_t) * kept};
}

template <typename scalar_t, typename out_t, int kVector, bool kHot, KlDirection kDirection>
void overwrite_pairs(const KlPairs<scalar_t>& of, const KlObjective<wide_t<scalar_t>>& objective,
                     const KlLoss<wide_t<scalar_t>>& loss) {
  auto* const kernel = kl_kernel<scalar_t, out_t, kVector, kKlThreadsOfOnce, kHot, kDirection>;
  const unsigned most = most_blocks(kernel, kKlThreadsOfOnce);
  const KlLayout kept = layout_that_keeps<scalar_t>(of.width, kVector, most);
  const KlLayout none = layout_that_keeps_nothing<scalar_t>(of.width, kVector);
  const RowLaunch clusters(of.rows, kept.cluster, kKlThreadsOfOnce, kept.shared_bytes);
  if (clusters.fits(kernel)) {
    clusters(kernel, of, kept.shares, objective, loss);
  } else {
    const RowLaunch blocks(of.rows, none.cluster, kKlThreadsOfOnce, none.shared_bytes);
    blocks(kernel, of, none.shares, objective, loss);
  }
}

at::Tensor kl_cuda(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& label_C,
                   const at::Tensor& weights_2C, double temperature, c10::string_view direction,
                   double beta, double z_loss, at::ScalarType dtype) {
  check_pair(student, teacher);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor label = label_C.contiguous();
  const at::Tensor weights = as_statistics(weights_2C, student);
  const KlDirection way = direction_of(direction);
  at::Tensor out = empty_statistics(student, kKlStatistics);
  if (student.size(0) == 0) {
    return out;
  }
  with_logits_and_gradient(student, dtype, [&](auto zero, auto narrow_zero) {
    using scalar_t = decltype(zero);
    using out_t = decltype(narrow_zero);
    using math_t = wide_t<scalar_t>;
    const KlPairs<scalar_t> of{student.mutable_data_ptr<scalar_t>(),
                               teacher.const_data_ptr<scalar_t>(),
                               label.const_data_ptr<int64_t>(),
                               weights.const_data_ptr<math_t>(),
                               out.mutable_data_ptr<math_t>(),
                               student.size(0),
                               static_cast<int>(student.size(1))};
    const KlLoss<math_t> loss{static_cast<math_t>(temperature), static_cast<math_t>(z_loss)};
    with_vector<scalar_t>(student, teacher, [&](auto vector) {
      with_heat<vector>(temperature, [&](auto hot) {
        with_direction(way, [&](auto known) {
          overwrite_pairs<scalar_t, out_t, vector, hot, known>(
              of, kl_objective<math_t>(temperature, beta), loss);
        });
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
  m.impl("kl_", kl_cuda);
}

}  // namespace mlr1
