// torch's own header, but rows of CUDA become rows of mlr1_emulated's ops for tensors of a CPU.
#pragma once

#include_next <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(ns##_emulated, CPU, m, C10_UID)
