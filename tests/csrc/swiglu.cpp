// Entry points that run the kernels of csrc/swiglu.cuh on the CPU.
#include "swiglu.cuh"

using mlr1::emulator::launch;
using mlr1::emulator::message_of;
using mlr1::emulator::with_type;

namespace {

template <typename scalar_t, typename Run>
void with_vector(bool vectors, const Run& run) {
  constexpr int kVector = mlr1::kVectorBytes / sizeof(scalar_t);
  if (vectors) {
    run(std::integral_constant<int, kVector>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

dim3 grid_of(std::int64_t width, int vector) {
  const std::int64_t columns = std::int64_t{mlr1::kWarp} * vector;
  return {static_cast<unsigned>((width + columns - 1) / columns), 2, 1};
}

const dim3 kBlock{mlr1::kWarp, mlr1::kSwigluRows, 1};

}  // namespace

MLR1_ENTRY const char* forward(const void* x, void* y, std::int64_t rows, std::int64_t width,
                               std::int64_t type, std::int64_t vectors, std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      with_vector<scalar_t>(vectors, [&](auto vector) {
        launch(grid_of(width, vector), kBlock, 1, 0, order, [&] {
          mlr1::swiglu_kernel<scalar_t, vector>(static_cast<const scalar_t*>(x),
                                                static_cast<scalar_t*>(y), rows, width);
        });
      });
    });
  });
}

MLR1_ENTRY const char* backward(const void* dy, const void* x, void* dx, std::int64_t rows,
                                std::int64_t width, std::int64_t type, std::int64_t vectors,
                                std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      with_vector<scalar_t>(vectors, [&](auto vector) {
        launch(grid_of(width, vector), kBlock, 1, 0, order, [&] {
          mlr1::swiglu_backward_kernel<scalar_t, vector>(
              static_cast<const scalar_t*>(dy), static_cast<const scalar_t*>(x),
              static_cast<scalar_t*>(dx), rows, width);
        });
      });
    });
  });
}
