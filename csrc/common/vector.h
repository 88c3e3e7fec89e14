// Loads and stores of 16 bytes, the widest that one thread can ask for.
#pragma once

#include <cstdint>

namespace mlr1 {

constexpr int kVectorBytes = 16;

// `count` neighbours in memory, moved in one instruction; count is 1 where rows are not aligned.
template <typename T, int count>
struct alignas(sizeof(T) * count) Vector {
  T at[count];
};

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}

}  // namespace mlr1
