// One csrc/*.cu, MLR1_SOURCE, as a library that runs on a CPU; tests/csrc/conftest.py builds it.
#include MLR1_SOURCE

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace mlr1::emulator {
namespace {

// Gives tensors memory between fences, full of bytes that are not a number.
struct FencedAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, c10::Device(c10::kCPU)};
    }
    unsigned char* const begin = mlr1_allocate(static_cast<std::int64_t>(bytes), 16);
    std::memset(begin, 0xff, bytes);
    const auto free = [](void* pointer) { mlr1_free(static_cast<unsigned char*>(pointer)); };
    return {begin, begin, free, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace
}  // namespace mlr1::emulator

// Describes the device; from here to mlr1_end() every tensor is made between fences.
MLR1_ENTRY void mlr1_begin(const mlr1::emulator::DescribedDevice* device) {
  static mlr1::emulator::FencedAllocator allocator;
  auto& driver = mlr1::emulator::Driver::get();
  driver = {};
  driver.device = *device;
  c10::SetCPUAllocator(&allocator);
}

// Gives the number of launches; writes the grid, the block, the cluster and the shared bytes of the
// first ones, eight numbers each, to `launches`, which has room for so many.
MLR1_ENTRY std::int64_t mlr1_end(std::int64_t* launches, std::int64_t room) {
  c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
  const auto& made = mlr1::emulator::Driver::get().launches;
  for (const auto& [grid, block, cluster, shared_bytes] : made) {
    if (--room < 0) {
      break;
    }
    for (const std::size_t number :
         {std::size_t{grid.x}, std::size_t{grid.y}, std::size_t{grid.z}, std::size_t{block.x},
          std::size_t{block.y}, std::size_t{block.z}, std::size_t{cluster}, shared_bytes}) {
      *launches++ = static_cast<std::int64_t>(number);
    }
  }
  return static_cast<std::int64_t>(made.size());
}
