// CPU row of mlr1::qk_norm_rope and mlr1::qk_norm_rope_backward; the op itself is
// megatron_mlr1/ops/qk_norm_rope.py.
#include "qk_norm_rope.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cpu.h"

namespace mlr1 {

// Partial sums of a head: in a fixed order, and enough of them to fill a vector.
constexpr int64_t kPartialSums = 16;

// One head. Functions of one type each and not templates: GCC clones no template.
#define MLR1_QK_HEAD(scalar_t, math_t)                                                            \
  MLR1_EVERY_X86 math_t qk_sum_of_products(const scalar_t* __restrict a,                             \
                                        const scalar_t* __restrict b, int64_t width) {            \
    math_t sums[kPartialSums] = {};                                                               \
    int64_t k = 0;                                                                                \
    for (; k + kPartialSums <= width; k += kPartialSums) {                                        \
      for (int64_t i = 0; i < kPartialSums; ++i) {                                                \
        sums[i] += static_cast<math_t>(a[k + i]) * static_cast<math_t>(b[k + i]);                 \
      }                                                                                           \
    }                                                                                             \
    for (int64_t i = 0; k + i < width; ++i) {                                                     \
      sums[i] += static_cast<math_t>(a[k + i]) * static_cast<math_t>(b[k + i]);                   \
    }                                                                                             \
    for (int64_t step = kPartialSums / 2; step > 0; step /= 2) {                                  \
      for (int64_t i = 0; i < step; ++i) {                                                        \
        sums[i] += sums[i + step];                                                                \
      }                                                                                           \
    }                                                                                             \
    return sums[0];                                                                               \
  }                                                                                               \
  MLR1_EVERY_X86 void qk_turn(const scalar_t* __restrict x, const math_t* __restrict cos,       \
                                const math_t* __restrict sin, scalar_t* __restrict y,             \
                                math_t scale, int64_t width) {                                    \
    for (int64_t i = 0; i < width / 2; ++i) {                                                     \
      const auto n = turn<math_t>({scale * static_cast<math_t>(x[2 * i]),                         \
                                   scale * static_cast<math_t>(x[2 * i + 1])},                    \
                                  {cos[i], sin[i]});                                              \
      y[2 * i] = static_cast<scalar_t>(n.even);                                                   \
      y[2 * i + 1] = static_cast<scalar_t>(n.odd);                                                \
    }                                                                                             \
  }                                                                                               \
  MLR1_EVERY_X86 void qk_turn_back(const scalar_t* __restrict dy, const scalar_t* __restrict y, \
                                     const math_t* __restrict cos, const math_t* __restrict sin,  \
                                     scalar_t* __restrict dx, math_t mean, math_t scale,          \
                                     int64_t width) {                                             \
    for (int64_t i = 0; i < width / 2; ++i) {                                                     \
      const auto d = qk_norm_rope_gradient<math_t>(                                               \
          {static_cast<math_t>(dy[2 * i]), static_cast<math_t>(dy[2 * i + 1])},                   \
          {static_cast<math_t>(y[2 * i]), static_cast<math_t>(y[2 * i + 1])}, mean, scale,        \
          {cos[i], sin[i]});                                                                      \
      dx[2 * i] = static_cast<scalar_t>(d.even);                                                  \
      dx[2 * i + 1] = static_cast<scalar_t>(d.odd);                                               \
    }                                                                                             \
  }

MLR1_QK_HEAD(double, double)
MLR1_QK_HEAD(float, float)
MLR1_QK_HEAD(at::BFloat16, float)
MLR1_QK_HEAD(at::Half, float)

namespace {

// The angles' cosines and sines, and the row of them that a token takes.
struct Turns {
  Turns(const at::Tensor& angles, const std::optional<at::Tensor>& bounds, int64_t rows,
        int64_t tokens, at::ScalarType math)
      : cos(angles.to(math).cos().contiguous()),
        sin(angles.to(math).sin().contiguous()),
        repeats(rows == 0 ? 1 : tokens / rows) {
    if (bounds) {
      this->bounds = bounds->contiguous();
      const auto* const at = this->bounds.const_data_ptr<int32_t>();
      const int64_t last = this->bounds.numel() - 1;
      TORCH_CHECK(last >= 0 && at[0] == 0 && at[last] == rows, "bounds do not reach from 0 to ",
                  rows);
      int32_t longest = 0;
      for (int64_t i = 0; i < last; ++i) {
        longest = std::max(longest, at[i + 1] - at[i]);
      }
      TORCH_CHECK(longest <= angles.size(0), "a document of ", longest, " tokens has ",
                  angles.size(0), " rows of angles");
    }
  }

  int64_t position(int64_t token) const {
    const int64_t row = token / repeats;
    return bounds.defined() ? position_in_document(bounds.const_data_ptr<int32_t>(),
                                                   bounds.numel(), row)
                            : row;
  }

  at::Tensor cos, sin, bounds;
  int64_t repeats;  // tokens of one position: sequences of the batch
};

// Calls head(cursor) for the heads of a row.
template <typename Head>
void for_each_head(const HeadLayout& layout, const Head& head) {
  for (HeadCursor at{0, 0, 0}; at.number < layout.heads(); at.advance(1, layout)) {
    head(at);
  }
}

HeadLayout layout_of(int64_t heads, int64_t groups, int64_t width) {
  return {static_cast<int>(groups), static_cast<int>(heads / groups), static_cast<int>(width)};
}

int64_t tokens_in_task(const HeadLayout& layout) {
  return std::max<int64_t>(kGrain / (layout.heads() * layout.width), 1);
}

at::DimVector with(at::IntArrayRef leading, std::initializer_list<int64_t> last) {
  at::DimVector shape(leading);
  shape.append(last.begin(), last.end());
  return shape;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qk_norm_rope_cpu(
    const at::Tensor& qkv, const at::Tensor& angles, const std::optional<at::Tensor>& bounds,
    int64_t groups, double eps) {
  const at::Tensor in = qkv.contiguous();
  const int64_t width = 2 * angles.size(1);
  const HeadLayout layout = layout_of(in.size(-1) / width - 2 * groups, groups, width);
  const auto leading = in.sizes().slice(0, in.dim() - 1);
  const int64_t tokens = c10::multiply_integers(leading);
  at::Tensor q = at::empty(with(leading, {layout.query_heads(), width}), in.options());
  at::Tensor k = at::empty(with(leading, {groups, width}), in.options());
  at::Tensor v = at::empty_like(k);
  const auto math = at::toOpMathType(in.scalar_type());
  at::Tensor scales = at::empty(with(leading, {layout.scaled_heads()}), in.options().dtype(math));
  const Turns turns(angles, bounds, in.size(0), tokens, math);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, in.scalar_type(), "qk_norm_rope_cpu", [&] {
        using math_t = at::opmath_type<scalar_t>;
        const scalar_t* const x = in.const_data_ptr<scalar_t>();
        const math_t* const cos = turns.cos.const_data_ptr<math_t>();
        const math_t* const sin = turns.sin.const_data_ptr<math_t>();
        scalar_t* const to[] = {q.mutable_data_ptr<scalar_t>(), k.mutable_data_ptr<scalar_t>(),
                                v.mutable_data_ptr<scalar_t>()};
        math_t* const scale = scales.mutable_data_ptr<math_t>();
        const auto heads = [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token) {
            const scalar_t* const row = x + token * layout.heads() * width;
            const int64_t angle = turns.position(token) * (width / 2);
            for_each_head(layout, [&](const HeadCursor& at) {
              const Kind kind = at.kind(layout);
              const scalar_t* const from = row + at.number * width;
              scalar_t* const out =
                  to[static_cast<int>(kind)] + at.of_kind(layout, token) * width;
              if (kind == Kind::kValue) {
                std::copy(from, from + width, out);
                return;
              }
              const math_t mean = qk_sum_of_products(from, from, width) / static_cast<math_t>(width);
              const math_t r = inverse_root(mean + static_cast<math_t>(eps));
              qk_turn(from, cos + angle, sin + angle, out, r, width);
              scale[at.scale(layout, token)] = r;
            });
          }
        };
        at::parallel_for(0, tokens, tokens_in_task(layout), heads);
      });
  return {q, k, v, scales};
}

at::Tensor qk_norm_rope_backward_cpu(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                     const at::Tensor& grad_v, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& scales,
                                     const at::Tensor& angles,
                                     const std::optional<at::Tensor>& bounds) {
  const int64_t width = q.size(-1), groups = k.size(-2);
  const HeadLayout layout = layout_of(q.size(-2), groups, width);
  const auto leading = q.sizes().slice(0, q.dim() - 2);
  const int64_t tokens = c10::multiply_integers(leading);
  at::Tensor grad_in = at::empty(with(leading, {layout.heads() * width}), q.options());
  const at::Tensor grads[] = {grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()};
  const at::Tensor outs[] = {q.contiguous(), k.contiguous()};
  const at::Tensor scale = scales.contiguous();
  const Turns turns(angles, bounds, q.size(0), tokens, scale.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "qk_norm_rope_backward_cpu", [&] {
        using math_t = at::opmath_type<scalar_t>;
        const scalar_t* const dy[] = {grads[0].const_data_ptr<scalar_t>(),
                                      grads[1].const_data_ptr<scalar_t>(),
                                      grads[2].const_data_ptr<scalar_t>()};
        const scalar_t* const y[] = {outs[0].const_data_ptr<scalar_t>(),
                                     outs[1].const_data_ptr<scalar_t>()};
        const math_t* const r = scale.const_data_ptr<math_t>();
        const math_t* const cos = turns.cos.const_data_ptr<math_t>();
        const math_t* const sin = turns.sin.const_data_ptr<math_t>();
        scalar_t* const dx = grad_in.mutable_data_ptr<scalar_t>();
        const auto heads = [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token) {
            scalar_t* const row = dx + token * layout.heads() * width;
            const int64_t angle = turns.position(token) * (width / 2);
            for_each_head(layout, [&](const HeadCursor& at) {
              const Kind kind = at.kind(layout);
              const int64_t source = at.of_kind(layout, token) * width;
              const scalar_t* const grad = dy[static_cast<int>(kind)] + source;
              scalar_t* const to = row + at.number * width;
              if (kind == Kind::kValue) {
                std::copy(grad, grad + width, to);
                return;
              }
              const scalar_t* const out = y[static_cast<int>(kind)] + source;
              const math_t mean = qk_sum_of_products(grad, out, width) / static_cast<math_t>(width);
              qk_turn_back(grad, out, cos + angle, sin + angle, to, mean,
                             r[at.scale(layout, token)], width);
            });
          }
        };
        at::parallel_for(0, tokens, tokens_in_task(layout), heads);
      });
  return grad_in;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) {
  m.impl("qk_norm_rope", qk_norm_rope_cpu);
  m.impl("qk_norm_rope_backward", qk_norm_rope_backward_cpu);
}

}  // namespace mlr1
