// How the entry points of kernels on pairs of logits choose types and launches.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/vector.h"
#include "kl_rows.cuh"

namespace mlr1::emulator {

template <typename scalar_t, typename Run>
void with_vector(bool vectors, const Run& run) {
  constexpr int kVector =
      std::is_same_v<scalar_t, double> ? 1 : kVectorBytes / sizeof(scalar_t);
  if (vectors) {
    run(std::integral_constant<int, kVector>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

template <typename Run>
void with_flag(bool flag, const Run& run) {
  if (flag) {
    run(std::true_type{});
  } else {
    run(std::false_type{});
  }
}

// Calls run(zero of the logits' type, zero of the gradient's).
template <typename Run>
void with_types(std::int64_t type, std::int64_t gradient, const Run& run) {
  with_type(type, [&](auto zero) {
    if (type == gradient) {
      run(zero, zero);
    } else if constexpr (std::is_same_v<decltype(zero), float>) {
      if (gradient == 2) {
        run(zero, c10::BFloat16{});
      } else {
        run(zero, c10::Half{});
      }
    }
  });
}

inline dim3 grid_of(std::int64_t rows) { return {static_cast<unsigned>(rows), 1, 1}; }

inline const dim3 kRowBlock{kKlThreads, 1, 1};

}  // namespace mlr1::emulator
