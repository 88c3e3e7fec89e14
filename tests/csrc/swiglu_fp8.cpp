// Entry points that run the kernel of csrc/swiglu_fp8.cuh on the CPU.
#include "swiglu_fp8.cuh"

#include <type_traits>

using mlr1::emulator::launch;
using mlr1::emulator::message_of;
using mlr1::emulator::with_type;

MLR1_ENTRY const char* swiglu_fp8(const void* x, const float* scale, std::uint8_t* y,
                                  std::uint8_t* yt, float* amax, float* scale_inv,
                                  std::int64_t rows, std::int64_t width, std::int64_t type,
                                  std::int64_t transpose, std::int64_t whole, std::int64_t order) {
  const std::int64_t tile = mlr1::kFp8Tile;
  const std::int64_t blocks = (rows + tile - 1) / tile * ((width + tile - 1) / tile);
  std::uint8_t* const turned = transpose ? yt : nullptr;
  return message_of([&] {
    with_type(type, [&](auto zero) {
      using scalar_t = decltype(zero);
      const auto run = [&](auto is_whole) {
        launch({static_cast<unsigned>(blocks), 1, 1}, {mlr1::kFp8Threads, 1, 1}, 1,
               mlr1::kFp8SharedBytes, order, [&] {
                 mlr1::swiglu_fp8_kernel<scalar_t, is_whole>(static_cast<const scalar_t*>(x), scale,
                                                             y, turned, amax, scale_inv, rows,
                                                             width);
               });
      };
      if (whole) {
        run(std::true_type{});
      } else {
        run(std::false_type{});
      }
    });
  });
}
