// Memory of which every byte has a note: which threads of a kernel wrote it last, and read it since.
#pragma once

#include <sys/mman.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

// Code whose own accesses nobody checks.
#define MLR1_UNWATCHED __attribute__((no_sanitize_thread))

namespace mlr1::emulator {

// Numbers of stamps (thread_order.h). Those of an earlier launch, and 0, are of no thread.
struct Note {
  std::uint32_t written;
  std::uint32_t read;  // since it was written, or changed by atomic operations
};

// A range of addresses, shared memory in its first part, out of which Fenced takes places. A note's
// address follows from the byte's, and notes are never wiped: stamps of earlier launches grow stale.
class WatchedMemory {
 public:
  static constexpr std::size_t kSharedBytes = std::size_t{1} << 30;
  static constexpr std::size_t kBytes = std::size_t{1} << 34;

  // Never destroyed: buffers outlive what is, at the end of a program.
  static WatchedMemory& get() {
    static auto& memory = *new WatchedMemory;
    return memory;
  }

  // Offset of an address; kBytes or more of one that is not watched.
  MLR1_UNWATCHED std::size_t offset_of(const void* address) const {
    return reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(begin_);
  }
  unsigned char* address_of(std::size_t offset) const { return begin_ + offset; }
  MLR1_UNWATCHED Note* notes_of(std::size_t offset) const { return notes_ + offset; }

  // A place of that many bytes, whole pages, that nobody may touch yet.
  unsigned char* take(std::size_t bytes, bool shared) {
    const std::size_t room = std::bit_ceil(bytes);
    auto& free = free_[shared][std::bit_width(room)];
    if (!free.empty()) {
      unsigned char* const place = begin_ + free.back();
      free.pop_back();
      return place;
    }
    std::size_t& top = top_[shared];
    const std::size_t offset = top;
    if (room > (shared ? kSharedBytes : kBytes) - offset) {
      throw std::runtime_error("no addresses are left for buffers between fences");
    }
    mprotect(notes_of(offset), room * sizeof(Note), PROT_READ | PROT_WRITE);
    top += room;
    return begin_ + offset;
  }

  void give_back(unsigned char* place, std::size_t bytes, bool shared) {
    mmap(place, bytes, PROT_NONE, kReserved | MAP_FIXED, -1, 0);
    free_[shared][std::bit_width(std::bit_ceil(bytes))].push_back(offset_of(place));
  }

  // Makes every note that of no thread.
  void forget() { madvise(notes_, kBytes * sizeof(Note), MADV_DONTNEED); }

 private:
  static constexpr int kReserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  WatchedMemory()
      : begin_(static_cast<unsigned char*>(reserve(kBytes))),
        notes_(static_cast<Note*>(reserve(kBytes * sizeof(Note)))) {}

  static void* reserve(std::size_t bytes) {
    void* const all = mmap(nullptr, bytes, PROT_NONE, kReserved, -1, 0);
    if (all == MAP_FAILED) {
      throw std::runtime_error("no addresses for buffers between fences");
    }
    return all;
  }

  unsigned char* begin_;
  Note* notes_;
  std::size_t top_[2] = {kSharedBytes, 0};
  std::vector<std::size_t> free_[2][64];
};

}  // namespace mlr1::emulator
