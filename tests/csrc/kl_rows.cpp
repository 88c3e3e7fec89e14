// Entry points that run the kernels of csrc/kl_rows.cuh on the CPU.
#include "kl_rows.cuh"
#include "row_kernels.h"

using mlr1::KlDirection;
using mlr1::kKlThreads;
using mlr1::kReduceBytes;
using mlr1::wide_t;
using mlr1::emulator::grid_of;
using mlr1::emulator::kRowBlock;
using mlr1::emulator::launch;
using mlr1::emulator::message_of;
using mlr1::emulator::with_flag;
using mlr1::emulator::with_type;
using mlr1::emulator::with_types;
using mlr1::emulator::with_vector;

namespace {

// As csrc/kl_rows.cu has them: rows without vectors always take exponentials at T as their own.
template <int kVector, typename Run>
void with_heat(double temperature, const Run& run) {
  if constexpr (kVector == 1) {
    run(std::true_type{});
  } else {
    with_flag(temperature != 1, run);
  }
}

template <typename Run>
void with_direction(std::int64_t direction, const Run& run) {
  if (direction == 0) {
    run(std::integral_constant<KlDirection, KlDirection::forward>{});
  } else if (direction == 1) {
    run(std::integral_constant<KlDirection, KlDirection::reverse>{});
  } else {
    run(std::integral_constant<KlDirection, KlDirection::jsd>{});
  }
}

}  // namespace

MLR1_ENTRY const char* partials(const void* z, const void* t, const void* labels, void* out,
                                std::int64_t rows, std::int64_t width, double temperature,
                                std::int64_t reverse, std::int64_t type, std::int64_t vectors,
                                std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(vectors, [&](auto vector) {
        with_heat<vector>(temperature, [&](auto hot) {
          with_flag(reverse, [&](auto back) {
            constexpr auto kShared = kReduceBytes<mlr1::KlSums<math_t>, kKlThreads>;
            launch(grid_of(rows), kRowBlock, 1, kShared, order, [&] {
              mlr1::kl_partials_kernel<scalar_t, vector, hot, back>(
                  static_cast<const scalar_t*>(z), static_cast<const scalar_t*>(t),
                  static_cast<const std::int64_t*>(labels), static_cast<math_t*>(out), rows,
                  static_cast<int>(width), static_cast<math_t>(1 / temperature));
            });
          });
        });
      });
    });
  });
}

MLR1_ENTRY const char* jsd(const void* z, const void* t, const void* between, const void* lse,
                           void* out, std::int64_t rows, std::int64_t width, double temperature,
                           double beta, std::int64_t type, std::int64_t vectors,
                           std::int64_t order) {
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(vectors, [&](auto vector) {
        launch(grid_of(rows), kRowBlock, 1, kReduceBytes<mlr1::JsdTerms<math_t>, kKlThreads>, order,
               [&] {
                 mlr1::jsd_partials_kernel<scalar_t, vector>(
                     static_cast<const scalar_t*>(z), static_cast<const scalar_t*>(t),
                     static_cast<const math_t*>(between), static_cast<const math_t*>(lse),
                     static_cast<math_t*>(out), rows, static_cast<int>(width),
                     mlr1::kl_objective<math_t>(temperature, beta));
               });
      });
    });
  });
}

MLR1_ENTRY const char* gradient(void* z, const void* t, const void* labels, const void* numbers,
                                const void* weights, void* out, std::int64_t rows,
                                std::int64_t width, double temperature, std::int64_t direction,
                                double beta, std::int64_t type, std::int64_t gradient_type,
                                std::int64_t vectors, std::int64_t order) {
  return message_of([&] {
    with_types(type, gradient_type, [&](auto zero, auto narrow_zero) {
      using scalar_t = decltype(zero);
      using out_t = decltype(narrow_zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(vectors, [&](auto vector) {
        with_heat<vector>(temperature, [&](auto hot) {
          with_direction(direction, [&](auto known) {
            launch(grid_of(rows), kRowBlock, 1, kReduceBytes<mlr1::KlSplit<math_t>, kKlThreads>,
                   order, [&] {
                     mlr1::kl_gradient_kernel<scalar_t, out_t, vector, hot, known>(
                         static_cast<scalar_t*>(z), static_cast<const scalar_t*>(t),
                         static_cast<const std::int64_t*>(labels),
                         static_cast<const math_t*>(numbers), static_cast<const math_t*>(weights),
                         static_cast<math_t*>(out), rows, static_cast<int>(width),
                         mlr1::kl_objective<math_t>(temperature, beta));
                   });
          });
        });
      });
    });
  });
}

// In blocks of 64 threads, so that short rows have several tiles. `cluster` blocks share a row; where
// keeps_z is 0, that must be one.
MLR1_ENTRY const char* both(void* z, const void* t, const void* labels, const void* weights,
                            void* out, std::int64_t rows, std::int64_t width, double temperature,
                            std::int64_t direction, double beta, double z_loss, std::int64_t type,
                            std::int64_t gradient_type, std::int64_t vectors, std::int64_t cluster,
                            std::int64_t keeps_z, std::int64_t kept_t, std::int64_t order) {
  constexpr unsigned kThreads = 64;
  return message_of([&] {
    with_types(type, gradient_type, [&](auto zero, auto narrow_zero) {
      using scalar_t = decltype(zero);
      using out_t = decltype(narrow_zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(vectors, [&](auto vector) {
        const auto whole = cluster * vector;
        const auto columns = static_cast<int>((width + whole - 1) / whole * vector);
        const mlr1::KlShares shares{columns, keeps_z != 0, static_cast<int>(kept_t)};
        const mlr1::KlPairs<scalar_t> of{
            static_cast<scalar_t*>(z),          static_cast<const scalar_t*>(t),
            static_cast<const std::int64_t*>(labels),
            static_cast<const math_t*>(weights), static_cast<math_t*>(out),
            rows,                               static_cast<int>(width)};
        const auto kept = static_cast<std::size_t>((keeps_z ? columns : 0) + kept_t);
        const auto shared = mlr1::KlRoom<math_t, kThreads>::kBytes + sizeof(scalar_t) * kept;
        const mlr1::KlLoss<math_t> loss{static_cast<math_t>(temperature),
                                        static_cast<math_t>(z_loss)};
        with_heat<vector>(temperature, [&](auto hot) {
          with_direction(direction, [&](auto known) {
            launch(grid_of(rows * cluster), {kThreads, 1, 1}, static_cast<unsigned>(cluster),
                   shared, order, [&] {
                     mlr1::kl_kernel<scalar_t, out_t, vector, kThreads, hot, known>(
                         of, shares, mlr1::kl_objective<math_t>(temperature, beta), loss);
                   });
          });
        });
      });
    });
  });
}
