// Stand-in for c10's header, for the device of cuda_runtime.h.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(call)                                                          \
  do {                                                                                \
    const cudaError_t status = (call);                                                \
    TORCH_CHECK(status == cudaSuccess, "CUDA error ", static_cast<int>(status), ": ", \
                mlr1::emulator::Driver::get().refusal);                               \
  } while (false)
