// What the CPU rows share.
#pragma once

#include <cstdint>

// Compiles a function once for each generation of x86-64 and lets the loader choose, so that one
// library uses the machine's widest vectors and runs everywhere. GCC on Linux has that.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MLR1_EVERY_X86 __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MLR1_EVERY_X86
#endif

namespace mlr1 {

// Elements that one task of the thread pool takes at least.
constexpr std::int64_t kGrain = 16384;

}  // namespace mlr1
