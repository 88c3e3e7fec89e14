// What a kernel needs beyond C++, so that a kernel and the code that launches it have two compilers:
// nvcc, for a GPU, and with MLR1_EMULATED a plain C++ compiler, whose program executes both on a CPU,
// the kernel thread by thread (tests/csrc/cuda_on_cpu.h; of the host's code, tests/csrc/cuda_host/).
// What keeps these rules runs in both:
//   - shared memory is dynamic alone, taken once by MLR1_SHARED(name): unsigned char*, aligned to 16;
//   - lanes of a warp exchange by __shfl_xor_sync, __shfl_down_sync and __shfl_sync, with the full
//     mask and from all 32 lanes;
//   - __syncthreads() is reached by all threads of a block, the calls below by all of a cluster;
//   - what the block of another rank wrote is read through cluster_shared();
//   - what several threads write at a time they write by atomicMax, atomicOr or store_together(): all
//     else that no barrier orders is a race, and ends a test;
//   - a .cu launches by launch() or RowLaunch of common/launch.h, on the device of a CUDAGuard, and
//     registers its rows by TORCH_LIBRARY_IMPL(mlr1, CUDA, m). What it asks of CUDA's runtime beyond
//     that, the stand-ins in tests/csrc/cuda_host/ must learn.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#if defined(MLR1_EMULATED)

#include "cuda_on_cpu.h"

#else

#include <cuda_runtime.h>

#define MLR1_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#endif

namespace mlr1 {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if !defined(MLR1_EMULATED)

// Before Hopper there are no clusters: there a block is a cluster of its own.

__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}

__device__ inline unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return __clusterSizeInBlocks();
#else
  return 1;
#endif
}

// The two halves of cluster_sync(): what a thread does between them waits for nobody.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}

// The first half, of a thread that has written nothing yet that another block reads: it says that this
// block has begun, without the fence of the other.
__device__ inline void cluster_arrive_unwritten() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}

// A barrier of all threads of the cluster; what they wrote before, to shared or to global memory, is
// seen behind it.
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where the block of that rank has what `pointer` shows in this block's shared memory. That block
// must have started, and must not end before it is read or written: a barrier on either side.
template <typename T>
__device__ inline T* cluster_shared(T* pointer, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(pointer, rank));
#else
  return pointer;
#endif
}

template <std::size_t bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// A T of 2, 4, 8 or 16 bytes as it lies in registers. Compilers take a T itself apart, element by
// element, where a branch or a loop decides which one it is, and join it again; a word they leave.
template <typename T>
struct Packed {
  typename Word<sizeof(T)>::type word;

  __device__ T value() const {
    T value;
    memcpy(&value, &word, sizeof(T));
    return value;
  }
};

template <typename T>
__device__ inline Packed<T> packed_of(const T& value) {
  Packed<T> packed;
  memcpy(&packed.word, &value, sizeof(T));
  return packed;
}

// Loads and stores of 2, 4, 8 or 16 bytes, of which no cache need keep the streaming ones.
template <typename T>
__device__ inline Packed<T> load_packed(const T* from) {
  return {*reinterpret_cast<const typename Word<sizeof(T)>::type*>(from)};
}

template <typename T>
__device__ inline Packed<T> load_packed_streaming(const T* from) {
  return {__ldcs(reinterpret_cast<const typename Word<sizeof(T)>::type*>(from))};
}

template <typename T>
__device__ inline T load_streaming(const T* from) {
  return load_packed_streaming(from).value();
}

template <typename T>
__device__ inline void store_streaming(T* to, const T& value) {
  using word_t = typename Word<sizeof(T)>::type;
  word_t word;
  memcpy(&word, &value, sizeof(T));
  __stcs(reinterpret_cast<word_t*>(to), word);
}

// A store of 2, 4 or 8 bytes that several threads may do at a time, of the same value.
template <typename T>
__device__ inline void store_together(T* to, const T& value) {
  using word_t =
      std::conditional_t<sizeof(T) == 2, unsigned short,
                         std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>>;
  static_assert(sizeof(T) == sizeof(word_t), "2, 4 or 8 bytes");
  word_t word;
  memcpy(&word, &value, sizeof(T));
  *reinterpret_cast<volatile word_t*>(to) = word;
}

// A store of 2, 4, 8 or 16 bytes to global memory in one instruction: of `*to = value` compilers make
// several narrower ones where the value was made element by element.
template <typename T>
__device__ inline void store_whole(T* to, const T& value) {
  using word_t = typename Word<sizeof(T)>::type;
  word_t word;
  memcpy(&word, &value, sizeof(T));
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  } else {
    *reinterpret_cast<word_t*>(to) = word;
  }
}

#else

inline void cluster_arrive_unwritten(int line = __builtin_LINE()) {
  emulator::Machine::get().cluster_arrive(line, false);
}

template <typename T>
struct Packed {
  T word;

  T value() const { return word; }
};

template <typename T>
Packed<T> packed_of(const T& value) {
  return {value};
}

template <typename T>
Packed<T> load_packed(const T* from) {
  return {*from};
}

template <typename T>
Packed<T> load_packed_streaming(const T* from) {
  return {load_streaming(from)};
}

template <typename T>
void store_whole(T* to, const T& value) {
  *to = value;
}

#endif

}  // namespace mlr1
