// A function that runs on a stack of its own until it gives way, and goes on from there.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>

namespace mlr1::emulator {

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = std::size_t{1} << 16;

  // The next resume() calls body(), which must not return.
  void prepare(unsigned char* stack, void (*body)()) {
    has_begun_ = false;
    getcontext(&begin_);
    begin_.uc_stack.ss_sp = stack;
    begin_.uc_stack.ss_size = kStackBytes;
    begin_.uc_link = nullptr;
    makecontext(&begin_, body, 0);
  }

  // By jumps: swapcontext() asks the system for the mask of signals, which takes ten times as long.
  void resume() {
    if (_setjmp(caller_) == 0) {
      if (has_begun_) {
        _longjmp(place_, 1);
      }
      has_begun_ = true;
      setcontext(&begin_);
    }
  }

  void give_way() {
    if (_setjmp(place_) == 0) {
      _longjmp(caller_, 1);
    }
  }

 private:
  ucontext_t begin_;
  jmp_buf place_;
  jmp_buf caller_;
  bool has_begun_ = false;
};

}  // namespace mlr1::emulator
