// What GCC's -fsanitize=thread calls for each access to memory, given to the race detector instead
// of a library of the compiler's. Atomic operations are those of the host: a kernel's are in
// cuda_on_cpu.h.
#pragma once

#include <cstddef>

#include "race_detector.h"

#define MLR1_CALLED extern "C" __attribute__((used, no_sanitize_thread)) inline
#define MLR1_TOUCHED(access, at, bytes)                                                      \
  mlr1::emulator::RaceDetector::get().touch<mlr1::emulator::Access::access>(                 \
      at, bytes, __builtin_return_address(0))
#define MLR1_ACCESSES(bytes)                                                                 \
  MLR1_CALLED void __tsan_read##bytes(void* at) { MLR1_TOUCHED(read, at, bytes); }           \
  MLR1_CALLED void __tsan_write##bytes(void* at) { MLR1_TOUCHED(write, at, bytes); }         \
  MLR1_CALLED void __tsan_unaligned_read##bytes(void* at) { MLR1_TOUCHED(read, at, bytes); } \
  MLR1_CALLED void __tsan_unaligned_write##bytes(void* at) { MLR1_TOUCHED(write, at, bytes); }

MLR1_ACCESSES(1)
MLR1_ACCESSES(2)
MLR1_ACCESSES(4)
MLR1_ACCESSES(8)
MLR1_ACCESSES(16)

MLR1_CALLED void __tsan_read_range(void* at, std::size_t bytes) { MLR1_TOUCHED(read, at, bytes); }
MLR1_CALLED void __tsan_write_range(void* at, std::size_t bytes) { MLR1_TOUCHED(write, at, bytes); }

MLR1_CALLED void __tsan_init() {}
MLR1_CALLED void __tsan_vptr_update(void**, void*) {}
MLR1_CALLED void __tsan_vptr_read(void**) {}

// The host's atomic operations, which become calls too.
#define MLR1_ATOMIC_STEP(bits, type, name)                                                   \
  MLR1_CALLED type __tsan_atomic##bits##_##name(volatile type* at, type value, int) {        \
    return __atomic_##name(at, value, __ATOMIC_SEQ_CST);                                     \
  }
#define MLR1_ATOMIC_CHANGE(bits, type, strength, weak)                                       \
  MLR1_CALLED bool __tsan_atomic##bits##_compare_exchange_##strength(                        \
      volatile type* at, type* expected, type value, int, int) {                             \
    return __atomic_compare_exchange_n(at, expected, value, weak, __ATOMIC_SEQ_CST,          \
                                       __ATOMIC_SEQ_CST);                                    \
  }
#define MLR1_ATOMICS(bits, type)                                                             \
  MLR1_CALLED type __tsan_atomic##bits##_load(const volatile type* at, int) {                \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                            \
  }                                                                                          \
  MLR1_CALLED void __tsan_atomic##bits##_store(volatile type* at, type value, int) {         \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                           \
  }                                                                                          \
  MLR1_CALLED type __tsan_atomic##bits##_exchange(volatile type* at, type value, int) {      \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                 \
  }                                                                                          \
  MLR1_ATOMIC_STEP(bits, type, fetch_add)                                                    \
  MLR1_ATOMIC_STEP(bits, type, fetch_sub)                                                    \
  MLR1_ATOMIC_STEP(bits, type, fetch_and)                                                    \
  MLR1_ATOMIC_STEP(bits, type, fetch_or)                                                     \
  MLR1_ATOMIC_STEP(bits, type, fetch_xor)                                                    \
  MLR1_ATOMIC_CHANGE(bits, type, strong, false)                                              \
  MLR1_ATOMIC_CHANGE(bits, type, weak, true)

MLR1_ATOMICS(8, char)
MLR1_ATOMICS(16, short)
MLR1_ATOMICS(32, int)
MLR1_ATOMICS(64, long)

MLR1_CALLED void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
