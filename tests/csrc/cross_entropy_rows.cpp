// Entry points that run the kernels of csrc/cross_entropy_rows.cuh on the CPU, with blocks of 64
// threads, so that short rows have several tiles. A cluster of n blocks shares each row.
#include "cross_entropy_rows.cuh"

using mlr1::LogitRows;
using mlr1::wide_t;
using mlr1::emulator::message_of;
using mlr1::emulator::with_type;

namespace {

constexpr unsigned kThreads = 64;

struct Shape {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t cluster;
};

template <typename scalar_t>
LogitRows<scalar_t> rows_of(void* logits, const void* label, const Shape& shape, int vector) {
  const auto columns = static_cast<int>(shape.columns);
  const int whole = static_cast<int>(shape.cluster) * vector;
  return {static_cast<scalar_t*>(logits), static_cast<const std::int64_t*>(label), shape.rows,
          columns, (columns + whole - 1) / whole * vector};
}

void launch(const Shape& shape, std::size_t shared, std::int64_t order,
            const std::function<void()>& kernel) {
  const auto cluster = static_cast<unsigned>(shape.cluster);
  mlr1::emulator::launch({static_cast<unsigned>(shape.rows) * cluster, 1, 1}, {kThreads, 1, 1},
                         cluster, shared, order, kernel);
}

// Calls run(vector) for the widest vectors that the rows allow.
template <typename scalar_t, typename Run>
void with_vector(const void* logits, const Shape& shape, const Run& run) {
  constexpr int kVector = mlr1::kVectorBytes / sizeof(scalar_t);
  if (shape.columns % kVector == 0 && mlr1::is_aligned(logits)) {
    run(std::integral_constant<int, kVector>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

// Calls run(zero of the logits, zero of the gradient) for the pairs that there are.
template <typename Run>
void with_types(std::int64_t type, std::int64_t gradient, const Run& run) {
  with_type(type, [&](auto zero) {
    if (type == gradient) {
      return run(zero, zero);
    }
    if constexpr (std::is_same_v<decltype(zero), float>) {
      if (gradient == 2) {
        return run(zero, c10::BFloat16{});
      }
      if (gradient == 3) {
        return run(zero, c10::Half{});
      }
    }
    throw std::runtime_error("no such pair of types");
  });
}

}  // namespace

MLR1_ENTRY const char* partials(void* logits, const void* label, void* out, std::int64_t rows,
                                std::int64_t columns, std::int64_t type, std::int64_t cluster,
                                std::int64_t order) {
  return message_of([&] {
    const Shape shape{rows, columns, cluster};
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      with_vector<scalar_t>(logits, shape, [&](auto vector) {
        const auto of = rows_of<const scalar_t>(logits, label, shape, vector);
        launch(shape, mlr1::kRowSumBytes<wide_t<scalar_t>, kThreads>, order, [&] {
          mlr1::cross_entropy_partials_kernel<scalar_t, vector, kThreads>(
              of, static_cast<wide_t<scalar_t>*>(out));
        });
      });
    });
  });
}

MLR1_ENTRY const char* gradient(void* logits, const void* label, const void* lse, const void* pull,
                                const void* weight, std::int64_t rows, std::int64_t columns,
                                std::int64_t type, std::int64_t narrow, std::int64_t cluster,
                                std::int64_t order) {
  return message_of([&] {
    const Shape shape{rows, columns, cluster};
    with_types(type, narrow, [&](auto zero, auto small) {
      using scalar_t = decltype(zero);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(logits, shape, [&](auto vector) {
        const auto of = rows_of<scalar_t>(logits, label, shape, vector);
        const mlr1::RowWeights<math_t> weights{static_cast<const math_t*>(lse),
                                               static_cast<const math_t*>(pull),
                                               static_cast<const math_t*>(weight)};
        launch(shape, 0, order, [&] {
          mlr1::cross_entropy_gradient_kernel<scalar_t, decltype(small), vector, kThreads>(of,
                                                                                           weights);
        });
      });
    });
  });
}

MLR1_ENTRY const char* both(void* logits, const void* label, const void* weight, double z_loss,
                            void* out, std::int64_t rows, std::int64_t columns, std::int64_t type,
                            std::int64_t narrow, std::int64_t held, std::int64_t cluster,
                            std::int64_t order) {
  return message_of([&] {
    const Shape shape{rows, columns, cluster};
    with_types(type, narrow, [&](auto zero, auto small) {
      using scalar_t = decltype(zero);
      using gradient_t = decltype(small);
      using math_t = wide_t<scalar_t>;
      with_vector<scalar_t>(logits, shape, [&](auto vector) {
        const auto of = rows_of<scalar_t>(logits, label, shape, vector);
        const auto* const weights = static_cast<const math_t*>(weight);
        const auto z_factor = static_cast<math_t>(z_loss);
        auto* const to = static_cast<math_t*>(out);
        const std::size_t sums = mlr1::kRowSumBytes<math_t, kThreads>;
        if (held != 0) {
          launch(shape, sums + sizeof(scalar_t) * static_cast<std::size_t>(of.share), order, [&] {
            mlr1::cross_entropy_kernel<scalar_t, gradient_t, vector, kThreads, true>(
                of, weights, z_factor, to);
          });
        } else {
          launch(shape, sums, order, [&] {
            mlr1::cross_entropy_kernel<scalar_t, gradient_t, vector, kThreads, false>(
                of, weights, z_factor, to);
          });
        }
      });
    });
  });
}
