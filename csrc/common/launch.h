// How kernels are launched: as grids of blocks, or of clusters of blocks on devices that have them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace mlr1 {

// What the device refuses, and what an earlier kernel did wrong, is an error.
template <typename... Parameters, typename... Arguments>
void launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
            Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "not the kernel's arguments");
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Launches a grid of blocks on the current stream.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  launch(config, kernel, arguments...);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Blocks that share a row so that a few rows fill the device too: two for each multiprocessor.
inline unsigned blocks_of_a_row(std::int64_t rows, unsigned most) {
  const std::int64_t wanted = 2 * device_attribute(cudaDevAttrMultiProcessorCount);
  unsigned blocks = 1;
  while (blocks < most && rows * blocks < wanted) {
    blocks *= 2;
  }
  return blocks;
}

// Columns of one block, a multiple of `vector`, where `blocks` share a row.
inline int share_of(int columns, unsigned blocks, int vector) {
  const int whole = static_cast<int>(blocks) * vector;
  return (columns + whole - 1) / whole * vector;
}

// A launch of `rows` clusters of blocks of `threads`.
struct RowLaunch {
  RowLaunch(std::int64_t rows, unsigned cluster, unsigned threads, std::size_t shared_bytes) {
    TORCH_CHECK(rows <= std::numeric_limits<int>::max() / 8, "too many rows: ", rows);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(rows) * cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = c10::cuda::getCurrentCUDAStream();
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  RowLaunch(const RowLaunch&) = delete;
  RowLaunch& operator=(const RowLaunch&) = delete;

  // Whether the device has room for all blocks of a cluster at a time, as it must.
  template <typename Kernel>
  bool lies_together(Kernel* kernel) const {
    int clusters = 1;
    if (config.numAttrs > 0) {
      C10_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    }
    return clusters > 0;
  }

  // Whether the device can run it. Asks for as much shared memory as a block may have, whatever this
  // launch needs, so that launches of other threads lose none, and for as much of it on a
  // multiprocessor as there is, so that several blocks have theirs.
  template <typename Kernel>
  bool fits(Kernel* kernel) const {
    const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (config.dynamicSmemBytes > static_cast<std::size_t>(limit)) {
      return false;
    }
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    return lies_together(kernel);
  }

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel* kernel, const Arguments&... arguments) const {
    launch(config, kernel, arguments...);
  }

  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
};

// Blocks that a cluster may have: 8 is the most that devices with clusters grant a kernel that does
// not ask for more, and small ones, a part of a device among them, have room for fewer. 1 where this
// kernel's code knows no clusters: a new device may run code of an older one, so its own age says
// nothing.
template <typename Kernel>
unsigned most_blocks(Kernel* kernel, unsigned threads, std::size_t shared_bytes = 0) {
  cudaFuncAttributes attributes{};
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  unsigned blocks = attributes.ptxVersion >= 90 ? 8 : 1;
  while (blocks > 1 && !RowLaunch(1, blocks, threads, shared_bytes).lies_together(kernel)) {
    blocks /= 2;
  }
  return blocks;
}

}  // namespace mlr1
