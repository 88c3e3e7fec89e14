// Entry points that run the kernels of csrc/qk_norm_rope.cuh on the CPU.
#include "qk_norm_rope.cuh"

using mlr1::emulator::launch;
using mlr1::emulator::message_of;
using mlr1::emulator::with_type;

namespace {

const dim3 kBlock{mlr1::kWarp, mlr1::kQkTokens, 1};

// sizes: tokens, tokens of one position, positions, groups, heads of a group, width, bounds.
mlr1::QkTokens shape_of(const std::int64_t* sizes, const float* angles,
                        const std::int32_t* bounds) {
  mlr1::QkTokens shape{};
  shape.layout = {static_cast<int>(sizes[3]), static_cast<int>(sizes[4]),
                  static_cast<int>(sizes[5])};
  shape.tokens = sizes[0];
  shape.repeats = sizes[1];
  shape.angles = angles;
  shape.positions = sizes[2];
  shape.angles_row = sizes[5] / 2;
  shape.angles_column = 1;
  shape.bounds = sizes[6] > 0 ? bounds : nullptr;
  shape.num_bounds = sizes[6];
  return shape;
}

dim3 grid_of(const mlr1::QkTokens& shape) {
  return {static_cast<unsigned>((shape.tokens + mlr1::kQkTokens - 1) / mlr1::kQkTokens), 1, 1};
}

}  // namespace

MLR1_ENTRY const char* forward(const std::int64_t* sizes, const void* qkv, const float* angles,
                               const std::int32_t* bounds, void* q, void* k, void* v, void* scales,
                               double eps, std::int64_t type, std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      using math_t = mlr1::wide_t<scalar_t>;
      mlr1::QkTokens shape = shape_of(sizes, angles, bounds);
      const mlr1::QkHeads<scalar_t> heads{static_cast<scalar_t*>(q), static_cast<scalar_t*>(k),
                                          static_cast<scalar_t*>(v)};
      mlr1::with_head_split<scalar_t>(shape, [&](auto vector, auto chunks) {
        launch(grid_of(shape), kBlock, 1, 0, order, [&] {
          mlr1::qk_norm_rope_kernel<scalar_t, vector, chunks>(
              static_cast<const scalar_t*>(qkv), heads, static_cast<math_t*>(scales),
              static_cast<math_t>(eps), shape);
        });
      });
    });
  });
}

MLR1_ENTRY const char* backward(const std::int64_t* sizes, const void* gq, const void* gk,
                                const void* gv, const void* q, const void* k, const void* scales,
                                const float* angles, const std::int32_t* bounds, void* grad_in,
                                std::int64_t type, std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      using math_t = mlr1::wide_t<scalar_t>;
      mlr1::QkTokens shape = shape_of(sizes, angles, bounds);
      const mlr1::QkHeads<const scalar_t> grads{static_cast<const scalar_t*>(gq),
                                                static_cast<const scalar_t*>(gk),
                                                static_cast<const scalar_t*>(gv)};
      const mlr1::QkHeads<const scalar_t> outs{static_cast<const scalar_t*>(q),
                                               static_cast<const scalar_t*>(k), nullptr};
      mlr1::with_head_split<scalar_t>(shape, [&](auto vector, auto chunks) {
        launch(grid_of(shape), kBlock, 1, 0, order, [&] {
          mlr1::qk_norm_rope_backward_kernel<scalar_t, vector, chunks>(
              grads, outs, static_cast<const math_t*>(scales), static_cast<scalar_t*>(grad_in),
              shape);
        });
      });
    });
  });
}
