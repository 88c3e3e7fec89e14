// Finds accesses of a kernel's threads that no barrier orders, whatever order threads run in. The
// compiler calls it for each access (memory_accesses.h); watched are buffers between fences, byte by
// byte. Threads whose barriers come in different orders are beyond it: the machine stops those.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "code_lines.h"
#include "fenced_memory.h"
#include "thread_order.h"
#include "watched_memory.h"

namespace mlr1::emulator {

// Ends the launch with a message; called in a thread.
[[noreturn]] void stop(const std::string& message);

// The shared memory of a block, and the last access of another block's thread to it.
struct SharedMemory {
  std::size_t begin = 0;  // offsets in watched memory
  std::size_t end = 0;
  std::uint32_t visit = 0;  // stamp
};

enum class Access { read, write, atomic };

class RaceDetector {
 public:
  MLR1_UNWATCHED static RaceDetector& get() { return detector; }

  void begin_launch(const dim3& grid, const dim3& block, unsigned cluster) {
    constexpr std::uint32_t kHalfOfAll = 1u << 31;
    grid_ = grid;
    block_ = block;
    cluster_ = cluster;
    order_.begin_launch();
    if (order_.first() > kHalfOfAll) {
      WatchedMemory::get().forget();
      order_.begin_again();
    }
    memory_ = &WatchedMemory::get();
    first_ = order_.first();
  }

  void begin_cluster() {
    first_of_cluster_ = order_.next();
    shared_.clear();
    published_ = 0;
  }
  void add_block(const Fenced& shared) {
    shared_.push_back({memory_->offset_of(shared.begin()), memory_->offset_of(shared.end()), 0});
  }

  // Null where no thread runs: what is touched then, nobody checks.
  void run_as(Runner* runner) { runner_ = runner; }

  // Behind a barrier.
  void pass(unsigned Moment::* count, unsigned line) {
    ++(runner_->*count);
    pass_on(line);
  }
  // `publishes`: what was written before it is seen behind it.
  void pass_cluster(bool publishes) {
    runner_->has_met = true;
    if (publishes) {
      runner_->published = published_ = runner_->cluster_arrivals;
    }
    pass_on(runner_->line);
  }

  // When every thread of a cluster has ended: what another block may have touched too late, or an
  // empty text.
  std::string late_visit() const {
    for (const SharedMemory& shared : shared_) {
      if (shared.visit != 0 && order_.at(shared.visit).cluster_arrivals >= published_) {
        return "no barrier of the cluster lies between the end of block " +
               std::to_string(&shared - shared_.data()) +
               " of a cluster and an access to its shared memory by " +
               name_of(order_.at(shared.visit));
      }
    }
    return "";
  }

  template <Access kAccess>
  MLR1_UNWATCHED void touch(const void* address, std::size_t bytes,
                            const void* code = __builtin_return_address(0)) {
    if (runner_ == nullptr) {
      return;
    }
    const std::size_t offset = memory_->offset_of(address);
    if (offset < WatchedMemory::kBytes) {
      code_ = code;
      check<kAccess>(offset, bytes);
    }
  }

 private:
  static RaceDetector detector;

  void pass_on(unsigned line) {
    runner_->line = line;
    runner_->stamps[0] = runner_->stamps[1] = 0;
  }

  // An atomic change counts among the reads, which it is no race with if they are such changes too.
  // `fine`, `known` and `joined`: what was found out about the byte before, mostly the same.
  template <Access kAccess>
  MLR1_UNWATCHED void check(std::size_t offset, std::size_t bytes) {
    const bool is_shared = offset < WatchedMemory::kSharedBytes;
    if (is_shared) {
      visit(offset);
    }
    Runner& runner = *runner_;
    const std::uint32_t first = is_shared ? first_of_cluster_ : first_;
    constexpr bool is_atomic = kAccess == Access::atomic;
    const std::uint32_t mine = order_.stamp_of(runner, is_atomic);
    std::uint32_t fine = mine, known = mine, joined = mine;
    Note* const end = memory_->notes_of(offset + bytes);
    for (Note* note = end - bytes; note != end; ++note) {
      if (note->written != fine) {
        fine = note->written;
        if (fine >= first && !order_.is_before(fine, runner)) {
          stop_at(kAccess, "wrote", fine, offset, bytes);
        }
        if (kAccess != Access::write && is_shared && fine < first) {
          stop_at_unwritten(offset + bytes - (end - note));
        }
      }
      if (note->read != known) {
        known = note->read;
        joined = mine;
        if (known >= first) {
          const bool disagree = kAccess == Access::write || order_.at(known).atomic != is_atomic;
          if (disagree && !order_.is_before(known, runner)) {
            stop_at(kAccess, order_.at(known).atomic ? "changed" : "read", known, offset, bytes);
          }
          if constexpr (kAccess != Access::write) {
            joined = order_.joined(known, runner, is_atomic);
          }
        }
      }
      if constexpr (kAccess == Access::write) {
        *note = {mine, 0};
      } else {
        note->read = joined;
      }
    }
  }

  // Of shared memory: whether it is another block's, which must have begun.
  MLR1_UNWATCHED void visit(std::size_t offset) {
    const SharedMemory& own = shared_[runner_->block];
    if (offset - own.begin < own.end - own.begin) {
      return;
    }
    for (SharedMemory& shared : shared_) {
      if (offset >= shared.begin && offset < shared.end) {
        if (!runner_->has_met) {
          stop("an access to the shared memory of block " +
               std::to_string(&shared - shared_.data()) +
               " of the cluster, which may not have begun: no barrier of the cluster lies before" +
               line_of(code_));
        }
        const std::uint32_t mine = order_.stamp_of(*runner_, false);
        if (shared.visit == 0 ||
            order_.at(shared.visit).cluster_arrivals < runner_->cluster_arrivals) {
          shared.visit = mine;
        }
      }
    }
  }

  [[noreturn]] void stop_at_unwritten(std::size_t offset) {
    stop("a read of what no thread wrote, " + place_of(offset) + line_of(code_));
  }

  [[noreturn]] void stop_at(Access access, const char* did, std::uint32_t other,
                            std::size_t offset, std::size_t bytes) {
    const Stamp& then = order_.at(other);
    constexpr const char* kDoes[] = {"reads ", "writes ", "changes "};
    stop(std::string("a race: it ") + kDoes[static_cast<int>(access)] +
         std::to_string(bytes) + " bytes " + place_of(offset) + ", that " + name_of(then) + " " +
         did + (then.line == 0 ? std::string(" before any barrier")
                               : " behind the barrier in line " + std::to_string(then.line)) +
         ", and no barrier orders the two" + line_of(code_));
  }

  std::string place_of(std::size_t offset) const {
    for (const SharedMemory& shared : shared_) {
      if (offset >= shared.begin && offset < shared.end) {
        return std::to_string(offset - shared.begin) + " bytes from the begin of shared memory";
      }
    }
    return emulator::place_of(memory_->address_of(offset));
  }

  std::string name_of(const Moment& moment) const {
    if (moment.cluster == kSeveral) {
      return "threads of several clusters";
    }
    const auto block_of = [&](unsigned rank) {
      const std::uint64_t number = std::uint64_t{moment.cluster} * cluster_ + rank;
      return "block " + text_of(place_in(grid_, number));
    };
    if (moment.block == kSeveral) {
      return "threads of the cluster of " + block_of(0);
    }
    if (moment.thread == kSeveral) {
      return "threads of " + block_of(moment.block);
    }
    const unsigned threads = block_.x * block_.y * block_.z;
    return "thread " + text_of(place_in(block_, moment.thread % threads)) + " of " +
           block_of(moment.block);
  }

  dim3 grid_, block_;
  unsigned cluster_ = 1;
  WatchedMemory* memory_ = nullptr;
  const void* code_ = nullptr;  // of the access
  Runner* runner_ = nullptr;
  std::uint32_t first_ = 0;
  std::uint32_t first_of_cluster_ = 0;
  unsigned published_ = 0;  // the cluster's last barrier that orders memory
  ThreadOrder order_;
  std::vector<SharedMemory> shared_;
};

inline RaceDetector RaceDetector::detector;

}  // namespace mlr1::emulator
