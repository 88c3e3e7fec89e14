// What csrc/*.cu asks of CUDA's runtime, answered for a device that a test describes, so that these
// files run whole on a CPU: a launch executes its kernel on the machine of fiber_machine.h. What the
// described device would refuse is refused, with CUDA's error, and each launch is written down.
//
// Limits: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications, and
// "Thread Block Clusters"; those that differ between devices are in tests/csrc/devices.py. Registers
// are not counted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/device.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

struct cudaFuncAttributes {
  int ptxVersion;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace mlr1::emulator {

// As in tests/csrc/devices.py; bytes.
struct DescribedDevice {
  std::int64_t multiprocessors;
  std::int64_t largest_cluster;  // 1 where there are none
  std::int64_t shared_of_block;
  std::int64_t shared_of_multiprocessor;
  std::int64_t threads_of_multiprocessor;
  std::int64_t blocks_of_multiprocessor;
  std::int64_t code;   // of the PTX that kernels were compiled from, 90 for sm_90
  std::int64_t order;  // in which threads run, as Machine::launch has it
};

struct Launch {
  dim3 grid;
  dim3 block;
  unsigned cluster;
  std::size_t shared_bytes;
};

// The described device, and what its driver would know.
struct Driver {
  DescribedDevice device{};
  std::vector<Launch> launches;
  std::map<const void*, std::size_t> granted;  // shared bytes that a kernel's blocks may ask for
  int guards = 0;                              // of c10::cuda that live
  std::string refusal;

  static Driver& get() {
    static Driver driver;
    return driver;
  }

  cudaError_t refuse(cudaError_t error, const std::string& reason) {
    refusal = reason;
    return error;
  }

  cudaError_t check_extent(const char* name, const dim3& at, const dim3& most) {
    if (at.x == 0 || at.y == 0 || at.z == 0 || at.x > most.x || at.y > most.y || at.z > most.z) {
      return refuse(cudaErrorInvalidConfiguration, std::string("a ") + name + " of " +
                                                       text_of(at) + "; it may have 1 to " +
                                                       text_of(most));
    }
    return cudaSuccess;
  }

  cudaError_t check_shared(const void* kernel, std::size_t bytes) {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    const auto found = granted.find(kernel);
    const std::size_t most =
        std::max(kWithoutAsking, found == granted.end() ? std::size_t{0} : found->second);
    if (bytes > most) {
      return refuse(cudaErrorInvalidValue, std::to_string(bytes) +
                                               " bytes of shared memory; this kernel may have " +
                                               std::to_string(most));
    }
    return cudaSuccess;
  }

  cudaError_t check_cluster(const Launch& launch) {
    if (launch.cluster == 1) {
      return cudaSuccess;
    }
    if (launch.cluster == 0 || launch.grid.x % launch.cluster != 0) {
      return refuse(cudaErrorInvalidConfiguration,
                    "a grid of " + text_of(launch.grid) + " has no clusters of " +
                        std::to_string(launch.cluster) + " blocks");
    }
    constexpr unsigned kPortable = 8;
    if (launch.cluster > kPortable || device.code < 90 || clusters_of(launch) == 0) {
      return refuse(cudaErrorInvalidClusterSize,
                    "no room for clusters of " + std::to_string(launch.cluster) + " blocks");
    }
    return cudaSuccess;
  }

  // How many clusters run at a time. A block's shared memory has 1 KB more that the runtime keeps.
  std::int64_t clusters_of(const Launch& launch) const {
    const auto threads = std::int64_t{launch.block.x} * launch.block.y * launch.block.z;
    const auto shared = static_cast<std::int64_t>(launch.shared_bytes) + 1024;
    const std::int64_t blocks =
        std::min({device.blocks_of_multiprocessor, device.threads_of_multiprocessor / threads,
                  device.shared_of_multiprocessor / shared});
    const bool possible = launch.cluster <= device.largest_cluster;
    return possible ? device.multiprocessors * blocks / launch.cluster : 0;
  }

  cudaError_t check(const void* kernel, const Launch& launch) {
    if (guards == 0) {
      return refuse(cudaErrorInvalidDevice, "no CUDAGuard says on which device");
    }
    const auto threads = std::uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    if (threads > 1024) {
      return refuse(cudaErrorInvalidConfiguration,
                    "a block of " + std::to_string(threads) + " threads; it may have 1024");
    }
    cudaError_t error = check_extent("grid", launch.grid, {0x7fffffffu, 65535, 65535});
    if (error == cudaSuccess) {
      error = check_extent("block", launch.block, {1024, 1024, 64});
    }
    if (error == cudaSuccess) {
      error = check_shared(kernel, launch.shared_bytes);
    }
    return error == cudaSuccess ? check_cluster(launch) : error;
  }
};

inline Launch launch_of(const cudaLaunchConfig_t& config) {
  Launch launch{config.gridDim, config.blockDim, 1, config.dynamicSmemBytes};
  if (config.numAttrs > 0) {
    launch.cluster = config.attrs->val.clusterDim.x;
  }
  return launch;
}

}  // namespace mlr1::emulator

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = mlr1::emulator::Driver::get().device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(device.multiprocessors);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device.shared_of_multiprocessor);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(device.shared_of_block);
      break;
  }
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = static_cast<int>(mlr1::emulator::Driver::get().device.code);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  auto& driver = mlr1::emulator::Driver::get();
  const bool is_bytes = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (value < 0 || value > (is_bytes ? driver.device.shared_of_block : 100)) {
    return driver.refuse(cudaErrorInvalidValue,
                         std::to_string(value) + " is more than a block's shared memory");
  }
  if (is_bytes) {
    driver.granted[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(value);
  }
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel,
                                           const cudaLaunchConfig_t* config) {
  auto& driver = mlr1::emulator::Driver::get();
  const auto launch = mlr1::emulator::launch_of(*config);
  *clusters = static_cast<int>(driver.clusters_of(launch));
  return driver.check_shared(reinterpret_cast<const void*>(kernel), launch.shared_bytes);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto& driver = mlr1::emulator::Driver::get();
  const auto launch = mlr1::emulator::launch_of(*config);
  const cudaError_t error = driver.check(reinterpret_cast<const void*>(kernel), launch);
  if (error != cudaSuccess) {
    return error;
  }
  driver.launches.push_back(launch);
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  mlr1::emulator::launch(launch.grid, launch.block, launch.cluster, launch.shared_bytes,
                         driver.device.order, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
