// CUDA row of mlr1::qk_norm_rope and mlr1::qk_norm_rope_backward; the op itself is
// megatron_mlr1/ops/qk_norm_rope.py.
#include "qk_norm_rope.cuh"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "common/launch.h"

namespace mlr1 {
namespace {

// The angles and bounds as the kernels read them, kept alive for as long as they are.
struct Positions {
  Positions(const at::Tensor& given, const std::optional<at::Tensor>& bounds)
      : angles(given.scalar_type() == at::kFloat ? given : given.to(at::kFloat)) {
    if (bounds) {
      this->bounds = bounds->contiguous();
    }
  }

  QkTokens tokens(const HeadLayout& layout, std::int64_t rows, std::int64_t tokens) const {
    QkTokens shape{};
    shape.layout = layout;
    shape.tokens = tokens;
    shape.repeats = tokens / rows;
    shape.angles = angles.const_data_ptr<float>();
    shape.positions = angles.size(0);
    shape.angles_row = angles.stride(0);
    shape.angles_column = angles.stride(1);
    if (bounds.defined()) {
      shape.bounds = bounds.const_data_ptr<std::int32_t>();
      shape.num_bounds = bounds.numel();
    }
    return shape;
  }

  at::Tensor angles, bounds;
};

// Contiguous, and where vectors of 16 bytes may be loaded: only what begins within another tensor is
// not.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return is_aligned(contiguous.const_data_ptr()) ? contiguous : contiguous.clone();
}

dim3 grid_of(std::int64_t tokens) {
  const std::int64_t blocks = (tokens + kQkTokens - 1) / kQkTokens;
  TORCH_CHECK(blocks <= std::numeric_limits<std::int32_t>::max(), tokens, " tokens are too many");
  return dim3(static_cast<unsigned>(blocks));
}

const dim3 kBlock(kWarp, kQkTokens);

at::DimVector with(at::IntArrayRef leading, std::initializer_list<std::int64_t> last) {
  at::DimVector shape(leading);
  shape.append(last.begin(), last.end());
  return shape;
}

HeadLayout layout_of(std::int64_t heads, std::int64_t groups, std::int64_t width) {
  TORCH_CHECK(width <= 256, "heads of ", width, " are wider than 256");
  return {static_cast<int>(groups), static_cast<int>(heads / groups), static_cast<int>(width)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qk_norm_rope_cuda(
    const at::Tensor& qkv, const at::Tensor& angles, const std::optional<at::Tensor>& bounds,
    std::int64_t groups, double eps) {
  const at::Tensor in = aligned(qkv);
  const c10::cuda::CUDAGuard guard(in.device());
  const std::int64_t width = 2 * angles.size(1);
  const HeadLayout layout = layout_of(in.size(-1) / width - 2 * groups, groups, width);
  const auto leading = in.sizes().slice(0, in.dim() - 1);
  at::Tensor q = at::empty(with(leading, {layout.query_heads(), width}), in.options());
  at::Tensor k = at::empty(with(leading, {groups, width}), in.options());
  at::Tensor v = at::empty_like(k);
  at::Tensor scales = at::empty(with(leading, {layout.scaled_heads()}),
                                in.options().dtype(at::toOpMathType(in.scalar_type())));
  if (in.numel() == 0) {
    return {q, k, v, scales};
  }
  const std::int64_t tokens = c10::multiply_integers(leading);
  const Positions positions(angles, bounds);
  QkTokens shape = positions.tokens(layout, in.size(0), tokens);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, in.scalar_type(), "qk_norm_rope_cuda", [&] {
        using math_t = wide_t<scalar_t>;
        const scalar_t* const x = in.const_data_ptr<scalar_t>();
        const QkHeads<scalar_t> heads{q.mutable_data_ptr<scalar_t>(),
                                      k.mutable_data_ptr<scalar_t>(),
                                      v.mutable_data_ptr<scalar_t>()};
        with_head_split<scalar_t>(shape, [&](auto vector, auto chunks, auto known_width) {
          launch(qk_norm_rope_kernel<scalar_t, vector, chunks, known_width>, grid_of(tokens),
                 kBlock, 0, x, heads, scales.mutable_data_ptr<math_t>(), static_cast<math_t>(eps),
                 shape);
        });
      });
  return {q, k, v, scales};
}

at::Tensor qk_norm_rope_backward_cuda(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                      const at::Tensor& grad_v, const at::Tensor& q,
                                      const at::Tensor& k, const at::Tensor& scales,
                                      const at::Tensor& angles,
                                      const std::optional<at::Tensor>& bounds) {
  const c10::cuda::CUDAGuard guard(q.device());
  const std::int64_t width = q.size(-1);
  const HeadLayout layout = layout_of(q.size(-2), k.size(-2), width);
  const auto leading = q.sizes().slice(0, q.dim() - 2);
  at::Tensor grad_in = at::empty(with(leading, {layout.heads() * width}), q.options());
  if (grad_in.numel() == 0) {
    return grad_in;
  }
  const at::Tensor gq = aligned(grad_q), gk = aligned(grad_k), gv = aligned(grad_v);
  const at::Tensor yq = aligned(q), yk = aligned(k), scale = scales.contiguous();
  const std::int64_t tokens = c10::multiply_integers(leading);
  const Positions positions(angles, bounds);
  QkTokens shape = positions.tokens(layout, q.size(0), tokens);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "qk_norm_rope_backward_cuda", [&] {
        using math_t = wide_t<scalar_t>;
        const QkHeads<const scalar_t> grads{gq.const_data_ptr<scalar_t>(),
                                            gk.const_data_ptr<scalar_t>(),
                                            gv.const_data_ptr<scalar_t>()};
        const QkHeads<const scalar_t> outs{yq.const_data_ptr<scalar_t>(),
                                           yk.const_data_ptr<scalar_t>(), nullptr};
        with_head_split<scalar_t>(shape, [&](auto vector, auto chunks, auto known_width) {
          launch(qk_norm_rope_backward_kernel<scalar_t, vector, chunks, known_width>,
                 grid_of(tokens), kBlock, 0, grads, outs, scale.const_data_ptr<math_t>(),
                 grad_in.mutable_data_ptr<scalar_t>(), shape);
        });
      });
  return grad_in;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CUDA, m) {
  m.impl("qk_norm_rope", qk_norm_rope_cuda);
  m.impl("qk_norm_rope_backward", qk_norm_rope_backward_cuda);
}

}  // namespace mlr1
