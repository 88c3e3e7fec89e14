// Executes the body of a CUDA kernel on a CPU, so that its indexing, reductions, barriers, shuffles,
// shared memory and clusters are tested where there is no GPU. csrc/common/device.h includes it in
// programs that define MLR1_EMULATED and has the rules that a kernel must keep. The code that launches
// kernels runs on cuda_host/.
//
// Every thread is a fiber with a stack of its own; the blocks of a cluster run together, clusters
// one after the other. A fiber runs until it waits for others, and warps run as far ahead of each
// other as barriers let them, in an order that the caller chooses. What ends in a message instead of
// a hang, a crash or a result that is right by chance:
//   - a barrier or a shuffle that some thread never reaches, or reaches at another line;
//   - an access before or behind a buffer of mlr1_allocate() or behind shared memory, or to the
//     shared memory of a block that has not begun or has ended;
//   - a race, in whatever order threads run: two accesses to a byte of a buffer or of shared memory,
//     one of them a write, that no barrier orders. Threads of a warp are ordered by __syncwarp(), of
//     a block by __syncthreads(), of a cluster by its barrier, from cluster_arrive() of one to
//     cluster_wait() of the other; a shuffle orders nothing, and nothing orders two clusters. Atomic
//     operations are no races with each other (race_detector.h);
//   - a read of shared memory that no thread of the block or its cluster wrote;
//   - an access to another block's shared memory without a barrier of the cluster before it, by which
//     that block has begun, and one after it, before which it has not ended; in every order, too;
//   - a misaligned vector and other undefined behaviour (GCC's -fsanitize, with traps).
// Shared memory begins as bytes of 0xff, which are not a number.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "fenced_memory.h"
#include "fiber_machine.h"
#include "memory_accesses.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
// What tests call: of C's linkage, and in the library though nothing in it calls it.
#define MLR1_ENTRY extern "C" __attribute__((visibility("default"), used))

namespace mlr1::emulator {

// What an entry point returns: null, or why its body stopped.
template <typename Body>
const char* message_of(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Calls function(zero of the type) for the number that tests/csrc/conftest.py gives to a dtype.
template <typename Function>
void with_type(std::int64_t number, const Function& function) {
  switch (number) {
    case 0:
      return function(double{});
    case 1:
      return function(float{});
    case 2:
      return function(c10::BFloat16{});
    case 3:
      return function(c10::Half{});
    default:
      throw std::runtime_error("there is no type " + std::to_string(number));
  }
}

}  // namespace mlr1::emulator

// What CUDA has without a namespace.

inline void __syncthreads(int line = __builtin_LINE()) {
  mlr1::emulator::Machine::get().meet_block(line);
}

inline void __syncwarp(unsigned = 0xffffffffu, int line = __builtin_LINE()) {
  mlr1::emulator::Machine::get().meet_warp(line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane, int width = 32, int line = __builtin_LINE()) {
  return mlr1::emulator::Machine::get().shuffle(mask, value, lane, width, "__shfl_sync()", line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                  int line = __builtin_LINE()) {
  auto& machine = mlr1::emulator::Machine::get();
  return machine.shuffle(mask, value, machine.lane() ^ lanes, width, "__shfl_xor_sync()", line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   int line = __builtin_LINE()) {
  auto& machine = mlr1::emulator::Machine::get();
  const unsigned source = machine.lane() + by < 32 ? machine.lane() + by : machine.lane();
  return machine.shuffle(mask, value, source, width, "__shfl_down_sync()", line);
}

// *at = merge(*at, value), indivisible: no race with others of its kind.
template <typename T, typename Merge>
MLR1_UNWATCHED T atomic_update(T* at, T value, const Merge& merge) {
  mlr1::emulator::RaceDetector::get().touch<mlr1::emulator::Access::atomic>(at, sizeof(T));
  const T before = *at;
  *at = merge(before, value);
  return before;
}

inline unsigned atomicMax(unsigned* at, unsigned value) {
  return atomic_update(at, value, [](unsigned a, unsigned b) { return a < b ? b : a; });
}

inline unsigned atomicOr(unsigned* at, unsigned value) {
  return atomic_update(at, value, [](unsigned a, unsigned b) { return a | b; });
}

#define MLR1_SHARED(name) \
  unsigned char* const name = mlr1::emulator::Machine::get().block().shared->begin()

namespace mlr1 {

inline unsigned cluster_rank() { return emulator::Machine::get().rank(); }

inline unsigned cluster_size() { return emulator::Machine::get().num_blocks(); }

inline void cluster_arrive(int line = __builtin_LINE()) {
  emulator::Machine::get().cluster_arrive(line);
}

inline void cluster_wait() { emulator::Machine::get().cluster_wait(); }

inline void cluster_sync(int line = __builtin_LINE()) {
  cluster_arrive(line);
  cluster_wait();
}

template <typename T>
T* cluster_shared(T* pointer, unsigned rank) {
  return reinterpret_cast<T*>(emulator::Machine::get().shared_of(pointer, rank));
}

template <typename T>
T load_streaming(const T* from) {
  return *from;
}

template <typename T>
void store_streaming(T* to, const T& value) {
  *to = value;
}

template <typename T>
void store_together(T* to, const T& value) {
  atomic_update(to, value, [](const T&, const T& stored) { return stored; });
}

}  // namespace mlr1

// For the tests: memory for a kernel's arguments.
MLR1_ENTRY inline unsigned char* mlr1_allocate(std::int64_t bytes, std::int64_t alignment) {
  auto buffer = std::make_unique<mlr1::emulator::Fenced>(static_cast<std::size_t>(bytes),
                                                         static_cast<std::size_t>(alignment));
  unsigned char* const begin = buffer->begin();
  mlr1::emulator::buffers().emplace(begin, std::move(buffer));
  return begin;
}

MLR1_ENTRY inline void mlr1_free(unsigned char* begin) { mlr1::emulator::buffers().erase(begin); }
