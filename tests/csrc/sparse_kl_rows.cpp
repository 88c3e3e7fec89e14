// Entry points that run the kernels of csrc/sparse_kl_rows.cuh on the CPU.
#include "sparse_kl_rows.cuh"
#include "row_kernels.h"

using mlr1::wide_t;
using mlr1::emulator::grid_of;
using mlr1::emulator::kRowBlock;
using mlr1::emulator::launch;
using mlr1::emulator::message_of;
using mlr1::emulator::with_flag;
using mlr1::emulator::with_type;
using mlr1::emulator::with_types;
using mlr1::emulator::with_vector;

MLR1_ENTRY const char* partials(const void* z, const void* labels, const void* columns,
                                const void* weights, void* out, std::int64_t rows,
                                std::int64_t width, std::int64_t num_columns, double temperature,
                                std::int64_t bucket, std::int64_t type, std::int64_t vectors,
                                std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(vectors, [&](auto vector) {
        with_flag(temperature != 1, [&](auto hot) {
          with_flag(bucket, [&](auto erases) {
            launch(grid_of(rows), kRowBlock, 1,
                   mlr1::sparse_kl_shared<math_t, vector>(static_cast<int>(width), bucket), order,
                   [&] {
                     mlr1::sparse_kl_partials_kernel<scalar_t, vector, hot, erases>(
                         static_cast<const scalar_t*>(z), static_cast<const std::int64_t*>(labels),
                         static_cast<const std::int64_t*>(columns),
                         static_cast<const math_t*>(weights), static_cast<math_t*>(out), rows,
                         static_cast<int>(width), static_cast<int>(num_columns),
                         static_cast<math_t>(1 / temperature));
                   });
          });
        });
      });
    });
  });
}

MLR1_ENTRY const char* gradient(void* z, const void* labels, const void* columns,
                                const void* weights, const void* numbers, const void* factors,
                                void* room, std::int64_t rows, std::int64_t width,
                                std::int64_t num_columns, double temperature, std::int64_t bucket,
                                std::int64_t type, std::int64_t gradient_type,
                                std::int64_t vectors, std::int64_t order) {
  return message_of([&] {
    with_types(type, gradient_type, [&](auto zero, auto narrow_zero) {
      using scalar_t = decltype(zero);
      using out_t = decltype(narrow_zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(vectors, [&](auto vector) {
        with_flag(temperature != 1, [&](auto hot) {
          launch(grid_of(rows), kRowBlock, 1, 0, order, [&] {
            mlr1::sparse_kl_gradient_kernel<scalar_t, out_t, vector, hot>(
                static_cast<scalar_t*>(z), static_cast<const std::int64_t*>(labels),
                static_cast<const std::int64_t*>(columns), static_cast<const math_t*>(weights),
                static_cast<const math_t*>(numbers), static_cast<const math_t*>(factors),
                static_cast<math_t*>(room), rows, static_cast<int>(width),
                static_cast<int>(num_columns), static_cast<math_t>(1 / temperature), bucket);
          });
        });
      });
    });
  });
}
