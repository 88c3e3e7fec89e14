// CPU rows of mlr1::sparse_kl_partials and sparse_kl_gradient_; the ops themselves are
// megatron_mlr1/ops/sparse_kl_rows.py.
#include "sparse_kl_rows.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/cpu.h"
#include "common/kl_tensors.h"
#include "common/logit_types.h"
#include "common/row_blocks.h"

namespace mlr1 {
namespace {

// Leaves e^((z - top) / T) of each element in `hot_block`.
template <bool kHot, typename T>
MLR1_INLINE void add_block(const T* __restrict z, int64_t count, T inverse, T* __restrict hot_block,
                           SparseKlSums<T>& sums) {
  Lanes<T> q, hot;
  const T base = base_of(sums.top);
  const auto add = [&](int64_t i, int k) MLR1_INLINES {
    const T apart = z[i + k] - base;
    const T cold = exponential_of_any(apart);
    const T warm = kHot ? exponential_of_any(apart * inverse) : cold;
    q.at[k] += cold;
    hot.at[k] += warm;
    hot_block[i + k] = warm;
  };
  MLR1_FOR_LANES(count, add)
  sums.q += q.sum();
  sums.hot += hot.sum();
}

template <typename T>
MLR1_INLINE T sum_of_block(const T* x, int64_t count) {
  Lanes<T> lanes;
  const auto add = [&](int64_t i, int k) MLR1_INLINES { lanes.at[k] += x[i + k]; };
  MLR1_FOR_LANES(count, add)
  return lanes.sum();
}

template <bool kHot, typename T>
MLR1_INLINE void gradient_block(const T* __restrict z, T* __restrict out, int64_t count,
                                const SparseKlRow<T>& row) {
  const SparseKlRow<T> own = row;
  const auto write = [&](int64_t i, int k) MLR1_INLINES {
    out[i + k] = sparse_kl_gradient<kHot>(z[i + k], own);
  };
  MLR1_FOR_LANES(count, write)
}

}  // namespace

// Functions of one type each and not templates: GCC clones no template.
#define MLR1_SPARSE_KL_BLOCKS(T)                                                                   \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void sparse_kl_top_block(const T* z, int64_t count, T& top) {    \
    top = top_of_block(z, count);                                                                  \
  }                                                                                                \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void sparse_kl_block(const T* z, int64_t count, bool hot,        \
                                                       T inverse, T* hot_block,                    \
                                                       SparseKlSums<T>& sums) {                    \
    hot ? add_block<true>(z, count, inverse, hot_block, sums)                                      \
        : add_block<false>(z, count, inverse, hot_block, sums);                                    \
  }                                                                                                \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void add_up_block(const T* x, int64_t count, T& sum) {           \
    sum = sum_of_block(x, count);                                                                  \
  }                                                                                                \
  MLR1_EVERY_X86 MLR1_INLINES_ALL void sparse_kl_gradient_block(                                   \
      const T* z, T* out, int64_t count, bool hot, const SparseKlRow<T>& row) {                    \
    hot ? gradient_block<true>(z, out, count, row) : gradient_block<false>(z, out, count, row);    \
  }

MLR1_SPARSE_KL_BLOCKS(float)
MLR1_SPARSE_KL_BLOCKS(double)

namespace {

// One of the ids that the target names within this shard.
template <typename T>
struct Named {
  int64_t column;
  T weight;
};

// Those of one row by column; one that comes more than once keeps its order.
template <typename T>
std::vector<Named<T>> named_of(const int64_t* columns, const T* weights, int64_t num_columns,
                               int64_t width) {
  std::vector<Named<T>> named;
  named.reserve(num_columns);
  for (int64_t k = 0; k < num_columns; ++k) {
    if (columns[k] >= 0) {
      TORCH_CHECK_INDEX(columns[k] < width, "column ", columns[k], " of a row of ", width);
      named.push_back({columns[k], weights[k]});
    }
  }
  std::stable_sort(named.begin(), named.end(), [](const Named<T>& a, const Named<T>& b) {
    return a.column < b.column;
  });
  return named;
}

template <typename T, typename scalar_t>
SparseKlSums<T> sums_of_row(const scalar_t* z, int64_t width, const std::vector<Named<T>>& named,
                            bool hot, bool bucket, T inverse) {
  SparseKlSums<T> total = no_sparse_kl_sums<T>();
  Block<T> room, hot_block;
  auto next = named.begin();
  for_each_block(width, [&](int64_t begin, int64_t count) {
    const T* const wide_z = widen(z + begin, count, room);
    SparseKlSums<T> sums = no_sparse_kl_sums<T>();
    sparse_kl_top_block(wide_z, count, sums.top);
    sums.top = larger(sums.top, total.top);
    sparse_kl_block(wide_z, count, hot, inverse, hot_block.at, sums);
    if (bucket) {
      for (; next != named.end() && next->column < begin + count; ++next) {
        hot_block.at[next->column - begin] = 0;
      }
      add_up_block(hot_block.at, count, sums.rest);
    }
    total = hot ? merged_sparse_kl_sums<true>(total, sums, inverse)
                : merged_sparse_kl_sums<false>(total, sums, inverse);
  });
  return total;
}

at::Tensor sparse_kl_partials_cpu(const at::Tensor& logits, const at::Tensor& label_C,
                                  const at::Tensor& column_CK, const at::Tensor& weight_CK,
                                  double temperature, bool bucket) {
  const at::Tensor label = label_C.contiguous();
  const at::Tensor column = column_CK.contiguous();
  const at::Tensor weight = as_statistics(weight_CK, logits);
  const int64_t rows = logits.size(0);
  const int64_t width = logits.size(1);
  const int64_t num_columns = column.size(1);
  at::Tensor out = empty_statistics(logits, kSparseKlPartials);
  with_logits(logits, [&](auto zero) {
    using scalar_t = decltype(zero);
    using math_t = wide_t<scalar_t>;
    const scalar_t* const z = logits.const_data_ptr<scalar_t>();
    const int64_t* const labels = label.const_data_ptr<int64_t>();
    const int64_t* const columns = column.const_data_ptr<int64_t>();
    const math_t* const weights = weight.const_data_ptr<math_t>();
    math_t* const to = out.mutable_data_ptr<math_t>();
    const math_t inverse = static_cast<math_t>(1 / temperature);
    const bool hot = temperature != 1;
    share_rows(logits, [&](int64_t row) {
      const scalar_t* const row_z = z + row * width;
      const auto named = named_of(columns + row * num_columns, weights + row * num_columns,
                                  num_columns, width);
      math_t dot = 0;
      for (const auto& id : named) {
        dot += static_cast<math_t>(row_z[id.column]) * id.weight;
      }
      const bool is_here = labels[row] >= 0 && labels[row] < width;
      write_sparse_kl_partials(
          sums_of_row(row_z, width, named, hot, bucket, inverse), static_cast<int>(width), hot,
          bucket, is_here ? static_cast<math_t>(row_z[labels[row]]) : math_t(0), dot, inverse,
          to + row, rows);
    });
  });
  return out;
}

// Overwrites one row by its gradient, front to back: a block is written when it has been read, and
// a narrower one lies within what has been read.
template <typename out_t, typename T, typename scalar_t>
void overwrite_row(scalar_t* z, int64_t width, const std::vector<Named<T>>& named, int64_t label,
                   bool hot, bool bucket, const SparseKlRow<T>& row) {
  Block<T> room, gradient;
  auto next = named.begin();
  for_each_block(width, [&](int64_t begin, int64_t count) {
    const T* const wide_z = widen(z + begin, count, room);
    sparse_kl_gradient_block(wide_z, gradient.at, count, hot, row);
    while (next != named.end() && next->column < begin + count) {
      const int64_t at = next->column - begin;
      T sum = hot ? named_gradient<true>(wide_z[at], row, bucket)
                  : named_gradient<false>(wide_z[at], row, bucket);
      for (; next != named.end() && next->column == begin + at; ++next) {
        sum += pull_of_weight(wide_z[at], next->weight, row, bucket);
      }
      gradient.at[at] = sum;
    }
    if (label >= begin && label < begin + count) {
      gradient.at[label - begin] -= row.weight;
    }
    narrow(gradient.at, count, reinterpret_cast<out_t*>(z) + begin);
  });
}

void sparse_kl_gradient_cpu(const at::Tensor& logits, const at::Tensor& label_C,
                            const at::Tensor& column_CK, const at::Tensor& weight_CK,
                            const at::Tensor& rows_3C, const at::Tensor& weights_3C,
                            double temperature, bool bucket, at::ScalarType dtype) {
  const at::Tensor label = label_C.contiguous();
  const at::Tensor column = column_CK.contiguous();
  const at::Tensor of_row[] = {as_statistics(weight_CK, logits), as_statistics(rows_3C, logits),
                               as_statistics(weights_3C, logits)};
  const int64_t rows = logits.size(0);
  const int64_t width = logits.size(1);
  const int64_t num_columns = column.size(1);
  if (width == 0) {
    return;
  }
  with_logits_and_gradient(logits, dtype, [&](auto zero, auto narrow_zero) {
    using scalar_t = decltype(zero);
    using out_t = decltype(narrow_zero);
    using math_t = wide_t<scalar_t>;
    scalar_t* const z = logits.mutable_data_ptr<scalar_t>();
    const int64_t* const labels = label.const_data_ptr<int64_t>();
    const int64_t* const columns = column.const_data_ptr<int64_t>();
    const math_t* const weights = of_row[0].const_data_ptr<math_t>();
    const math_t* const numbers = of_row[1].const_data_ptr<math_t>();
    const math_t* const factors = of_row[2].const_data_ptr<math_t>();
    const math_t inverse = static_cast<math_t>(1 / temperature);
    share_rows(logits, [&](int64_t row) {
      const auto named = named_of(columns + row * num_columns, weights + row * num_columns,
                                  num_columns, width);
      overwrite_row<out_t>(z + row * width, width, named, labels[row], temperature != 1, bucket,
                           sparse_kl_row(numbers, factors, row, rows, inverse));
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) {
  m.impl("sparse_kl_partials", sparse_kl_partials_cpu);
  m.impl("sparse_kl_gradient_", sparse_kl_gradient_cpu);
}

}  // namespace mlr1
