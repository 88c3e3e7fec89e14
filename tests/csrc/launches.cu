// Launches that a test chooses, of a kernel that writes what it knows of its place.
#include <c10/cuda/CUDAGuard.h>

#include <cstdint>
#include <optional>

#include "common/launch.h"

namespace {

// out[thread of the grid] = first * rank in the cluster + second * blocks of the cluster.
__global__ void write_places(float first, int second, float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      first * static_cast<float>(mlr1::cluster_rank()) +
      static_cast<float>(second * static_cast<int>(mlr1::cluster_size()));
}

}  // namespace

// asked: bytes of shared memory that the kernel is granted first, if more than zero.
MLR1_ENTRY const char* run_launch(float* out, std::int64_t blocks, std::int64_t threads,
                                  std::int64_t cluster, std::int64_t shared_bytes,
                                  std::int64_t asked, std::int64_t guarded, std::int64_t) {
  return mlr1::emulator::message_of([&] {
    std::optional<c10::cuda::CUDAGuard> guard;
    if (guarded != 0) {
      guard.emplace(c10::Device(c10::kCPU));
    }
    if (asked > 0) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(write_places, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(asked)));
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    mlr1::launch(config, write_places, 2, 10.0, out);
  });
}
