// Memory between two pages that nobody may touch, and faults that become exceptions: an access
// behind a buffer, a misaligned vector, a division by zero end in a message.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "watched_memory.h"

namespace mlr1::emulator {

inline std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

// Its end lies at the second page, up to the rest that the alignment of its begin leaves.
class Fenced {
 public:
  explicit Fenced(std::size_t bytes, std::size_t alignment = 16, bool shared = false)
      : bytes_(bytes), shared_(shared) {
    inner_ = (bytes + alignment + page_bytes() - 1) / page_bytes() * page_bytes();
    first_ = WatchedMemory::get().take(inner_ + 2 * page_bytes(), shared) + page_bytes();
    begin_ = first_ + (inner_ - bytes) / alignment * alignment;
    open(true);
  }
  ~Fenced() {
    WatchedMemory::get().give_back(first_ - page_bytes(), inner_ + 2 * page_bytes(), shared_);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  void open(bool opened) { mprotect(first_, inner_, opened ? PROT_READ | PROT_WRITE : PROT_NONE); }
  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + bytes_; }
  bool has_near(const unsigned char* address) const {
    return address >= first_ - page_bytes() && address < first_ + inner_ + page_bytes();
  }

 private:
  std::size_t bytes_;
  bool shared_;
  std::size_t inner_;
  unsigned char* first_;
  unsigned char* begin_;
};

// The buffers that tests hand to kernels.
inline std::map<unsigned char*, std::unique_ptr<Fenced>>& buffers() {
  static std::map<unsigned char*, std::unique_ptr<Fenced>> all;
  return all;
}

inline std::string place_of(const unsigned char* address) {
  for (const auto& [begin, buffer] : buffers()) {
    if (buffer->has_near(address)) {
      return std::to_string(address - begin) + " bytes from the begin of a buffer of " +
             std::to_string(buffer->end() - begin);
    }
  }
  return "in no buffer: shared memory, of this block or of one that has not begun or has ended, or "
         "a wild pointer";
}

// While it lives, a fault ends in a jump to `landing`, which the caller must have set.
class Faults {
 public:
  Faults() {
    alternative_.resize(std::size_t{1} << 16);
    stack_t stack{};
    stack.ss_sp = alternative_.data();
    stack.ss_size = alternative_.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = [](int number, siginfo_t* info, void*) {
      signal_number = number;
      address = static_cast<unsigned char*>(info->si_addr);
      siglongjmp(landing, 1);
    };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (std::size_t k = 0; k < kSignals; ++k) {
      sigaction(kNumbers[k], &action, &old_[k]);
    }
  }
  ~Faults() {
    for (std::size_t k = 0; k < kSignals; ++k) {
      sigaction(kNumbers[k], &old_[k], nullptr);
    }
    sigaltstack(&old_stack_, nullptr);
  }
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;

  static std::string story() {
    if (signal_number == SIGILL) {
      return "undefined behaviour: a misaligned access, a shift or an overflow";
    }
    if (signal_number == SIGFPE) {
      return "an integer division by zero";
    }
    return "an access outside of memory: " + place_of(address);
  }

  static inline sigjmp_buf landing;

 private:
  static constexpr std::size_t kSignals = 4;
  static constexpr int kNumbers[kSignals] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  static inline volatile int signal_number = 0;
  static inline unsigned char* volatile address = nullptr;
  std::vector<unsigned char> alternative_;
  stack_t old_stack_{};
  struct sigaction old_[kSignals] {};
};

}  // namespace mlr1::emulator
