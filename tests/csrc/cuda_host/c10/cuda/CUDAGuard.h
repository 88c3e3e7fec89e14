// Stand-in for c10's header: counts the guards that live, without which nothing may be launched.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) { ++mlr1::emulator::Driver::get().guards; }
  ~CUDAGuard() { --mlr1::emulator::Driver::get().guards; }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;
};

}  // namespace c10::cuda
