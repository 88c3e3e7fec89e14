// The machine of cuda_on_cpu.h: threads of a kernel as fibers, and where they wait for each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fenced_memory.h"
#include "fiber.h"
#include "race_detector.h"
#include "thread_order.h"

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace mlr1::emulator {

// Where threads wait for each other, once and again.
struct Meeting {
  unsigned expected = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  const char* call = "";
  int line = 0;

  std::string place() const { return std::string(call) + " in line " + std::to_string(line); }
};

struct Block {
  dim3 index;
  unsigned threads = 0;
  unsigned ended = 0;
  bool begun = false;
  Meeting barrier;
  std::unique_ptr<Fenced> shared;
};

struct Warp {
  Block* block = nullptr;
  unsigned begin = 0;  // its threads among all
  unsigned end = 0;
  Meeting meeting;
  // Two sets, as a lane may reach the next shuffle while another has yet to read this one's.
  std::uint64_t slots[2][32] = {};
};

struct Thread {
  Fiber fiber;
  Runner runner;
  dim3 index;
  unsigned lane = 0;
  Warp* warp = nullptr;
  bool ended = false;
  const Meeting* waits = nullptr;
  unsigned generation = 0;  // of the meeting that it waits for
  bool has_arrived = false;  // at the cluster's barrier, between its two halves
  bool publishes = true;  // what it wrote before, by that barrier
  unsigned cluster_generation = 0;
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // Runs body() as each thread of the grid. order: 0 first things first, 1 last things first, else
  // the seed of a random order.
  void launch(const dim3& grid, const dim3& block, unsigned cluster, std::size_t shared_bytes,
              std::int64_t order, const std::function<void()>& body) {
    if (cluster == 0 || grid.x % cluster != 0) {
      throw std::runtime_error("a grid of " + text_of(grid) + " has no clusters of " +
                               std::to_string(cluster) + " blocks");
    }
    body_ = &body;
    gridDim = grid;
    blockDim = block;
    order_ = order;
    random_.seed(static_cast<std::uint64_t>(order));
    std::vector<std::uint64_t> clusters(std::uint64_t{grid.x} * grid.y * grid.z / cluster);
    std::iota(clusters.begin(), clusters.end(), 0);
    arrange(clusters);
    const Faults faults;
    races().begin_launch(grid, block, cluster);
    for (const std::uint64_t index : clusters) {
      prepare(index, cluster, shared_bytes);
      run();
    }
  }

  // The rest is what threads call.

  void meet(Meeting& meeting, const char* call, int line) {
    const unsigned generation = meeting.generation;
    arrive(meeting, call, line);
    wait(meeting, generation);
  }

  void meet_warp(int line) {
    meet(current_->warp->meeting, "__syncwarp()", line);
    races().pass(&Moment::warp_barriers, line);
  }

  void meet_block(int line) {
    meet(block().barrier, "__syncthreads()", line);
    races().pass(&Moment::block_barriers, line);
  }

  // `publishes`: whether it orders memory, or only tells that all blocks have begun.
  void cluster_arrive(int line, bool publishes = true) {
    if (current_->has_arrived) {
      fail("cluster_arrive() twice without cluster_wait()");
    }
    current_->has_arrived = true;
    current_->publishes = publishes;
    current_->cluster_generation = cluster_barrier_.generation;
    arrive(cluster_barrier_, "a barrier of the cluster", line);
    races().pass(&Moment::cluster_arrivals, line);
  }

  void cluster_wait() {
    if (!current_->has_arrived) {
      fail("cluster_wait() without cluster_arrive()");
    }
    wait(cluster_barrier_, current_->cluster_generation);
    current_->has_arrived = false;
    races().pass_cluster(current_->publishes);
  }

  template <typename T>
  T shuffle(unsigned mask, T value, unsigned source, int width, const char* call, int line) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle moves 8 bytes at most");
    Warp& warp = *current_->warp;
    if (mask != 0xffffffffu || width != 32 || warp.end - warp.begin != 32) {
      fail(std::string(call) +
           " without the full mask, of a narrower width, or in a warp of less than 32 lanes");
    }
    std::uint64_t(&slots)[32] = warp.slots[warp.meeting.generation % 2];
    std::memcpy(&slots[current_->lane], &value, sizeof(T));
    meet(warp.meeting, call, line);
    std::memcpy(&value, &slots[source % 32], sizeof(T));
    return value;
  }

  unsigned char* shared_of(const void* pointer, unsigned other) {
    const auto* const at = static_cast<const unsigned char*>(pointer);
    const Fenced& own = *block().shared;
    if (other >= blocks_.size() || at < own.begin() || at > own.end()) {
      fail("cluster_shared() of rank " + std::to_string(other) +
           ": no such rank, or no pointer to this block's shared memory");
    }
    return blocks_[other].shared->begin() + (at - own.begin());
  }

  [[noreturn]] void fail(const std::string& message) {
    error_ = message;
    for (;;) {
      current_->fiber.give_way();
    }
  }

  Block& block() { return *current_->warp->block; }
  unsigned lane() const { return current_->lane; }
  unsigned rank() { return static_cast<unsigned>(&block() - blocks_.data()); }
  unsigned num_blocks() const { return static_cast<unsigned>(blocks_.size()); }

 private:
  static RaceDetector& races() { return RaceDetector::get(); }

  void arrive(Meeting& meeting, const char* call, int line) {
    if (meeting.arrived == 0) {
      meeting.call = call;
      meeting.line = line;
    } else if (meeting.line != line || std::strcmp(meeting.call, call) != 0) {
      fail(std::string(call) + " in line " + std::to_string(line) +
           " while other threads wait at " + meeting.place());
    }
    if (++meeting.arrived == meeting.expected) {
      meeting.arrived = 0;
      ++meeting.generation;
    }
  }

  void wait(const Meeting& meeting, unsigned generation) {
    Thread& self = *current_;
    self.waits = &meeting;
    self.generation = generation;
    while (meeting.generation == generation) {
      current_->fiber.give_way();
    }
    self.waits = nullptr;
  }

  template <typename T>
  void arrange(std::vector<T>& things) {
    if (order_ == 1) {
      std::reverse(things.begin(), things.end());
    } else if (order_ > 1) {
      std::shuffle(things.begin(), things.end(), random_);
    }
  }

  void prepare(std::uint64_t index, unsigned cluster, std::size_t shared_bytes) {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    const unsigned warps = (threads + 31) / 32;
    error_.clear();
    blocks_ = std::vector<Block>(cluster);
    warps_ = std::vector<Warp>(std::size_t{cluster} * warps);
    threads_.resize(std::size_t{cluster} * threads);
    stacks_.resize(std::max(stacks_.size(), threads_.size()));
    cluster_barrier_ = Meeting{};
    cluster_barrier_.expected = cluster * threads;
    races().begin_cluster();
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& block = blocks_[rank];
      block.index = place_in(gridDim, index * cluster + rank);
      block.threads = block.barrier.expected = threads;
      block.shared = std::make_unique<Fenced>(shared_bytes, 16, true);
      std::memset(block.shared->begin(), 0xff, shared_bytes);
      block.shared->open(false);
      races().add_block(*block.shared);
      for (unsigned thread = 0; thread < threads; ++thread) {
        Warp& warp = warps_[std::size_t{rank} * warps + thread / 32];
        const unsigned number = rank * threads + thread;
        if (thread % 32 == 0) {
          warp.block = &block;
          warp.begin = number;
        }
        warp.end = number + 1;
        ++warp.meeting.expected;
        prepare_thread(number, thread, warp);
        Moment& begin = threads_[number].runner = {};
        begin.cluster = static_cast<unsigned>(index);
        begin.block = rank;
        begin.warp = static_cast<unsigned>(&warp - warps_.data());
        begin.thread = number;
      }
    }
  }

  void prepare_thread(unsigned number, unsigned of_block, Warp& warp) {
    if (!stacks_[number]) {
      stacks_[number].reset(new unsigned char[Fiber::kStackBytes]);
    }
    Thread& thread = threads_[number];
    thread.index = place_in(blockDim, of_block);
    thread.lane = of_block % 32;
    thread.warp = &warp;
    thread.ended = thread.has_arrived = false;
    thread.waits = nullptr;
    thread.fiber.prepare(stacks_[number].get(), [] { get().run_thread(); });
  }

  [[noreturn]] void run_thread() {
    (*body_)();
    Thread& self = *current_;
    if (self.has_arrived) {
      fail("a thread ends between cluster_arrive() and cluster_wait()");
    }
    self.ended = true;
    if (++block().ended == block().threads) {
      block().shared->open(false);
    }
    for (;;) {
      current_->fiber.give_way();
    }
  }

  void run() {
    line_up_.clear();
    for (Warp& warp : warps_) {
      line_up_.push_back(&warp);
    }
    arrange(line_up_);
    if (sigsetjmp(Faults::landing, 1) != 0) {
      races().run_as(nullptr);
      throw std::runtime_error(Faults::story() + here());
    }
    while (run_warps()) {
    }
    for (const Thread& thread : threads_) {
      if (!thread.ended) {
        throw std::runtime_error(story_of_the_stuck());
      }
    }
    const std::string late = races().late_visit();
    if (!late.empty()) {
      throw std::runtime_error(late);
    }
  }

  // Each warp in turn as far as it comes, or in a random order not always that far.
  bool run_warps() {
    if (order_ > 1) {
      arrange(line_up_);
    }
    bool progress = false;
    for (const Warp* const warp : line_up_) {
      while (run_lanes(*warp)) {
        progress = true;
        if (order_ > 1 && random_() % 4 == 0) {
          break;
        }
      }
    }
    return progress;
  }

  bool run_lanes(const Warp& warp) {
    lanes_.resize(warp.end - warp.begin);
    std::iota(lanes_.begin(), lanes_.end(), warp.begin);
    arrange(lanes_);
    bool progress = false;
    for (const unsigned lane : lanes_) {
      Thread& thread = threads_[lane];
      const bool waits = thread.waits != nullptr && thread.waits->generation == thread.generation;
      if (!thread.ended && !waits) {
        resume(thread);
        progress = true;
      }
    }
    return progress;
  }

  void resume(Thread& thread) {
    Block& block = *thread.warp->block;
    if (!block.begun) {
      block.begun = true;
      block.shared->open(true);
    }
    current_ = &thread;
    threadIdx = thread.index;
    blockIdx = block.index;
    races().run_as(&thread.runner);
    thread.fiber.resume();
    races().run_as(nullptr);
    if (!error_.empty()) {
      throw std::runtime_error(error_ + here());
    }
  }

  std::string here() const {
    return " [thread " + text_of(current_->index) + " of block " +
           text_of(current_->warp->block->index) + "]";
  }

  std::string story_of_the_stuck() const {
    std::size_t ended = 0;
    const Meeting* waits = nullptr;
    for (const Thread& thread : threads_) {
      ended += thread.ended;
      waits = thread.ended ? waits : thread.waits;
    }
    return "threads wait for ever at " + waits->place() + ": " + std::to_string(waits->arrived) +
           " of " + std::to_string(waits->expected) + " are there, and of the cluster's threads " +
           std::to_string(ended) + " have ended";
  }

  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::vector<Warp*> line_up_;
  std::vector<unsigned> lanes_;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  Meeting cluster_barrier_;
  Thread* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::int64_t order_ = 0;
  std::mt19937_64 random_;
  std::string error_;
};

[[noreturn]] inline void stop(const std::string& message) { Machine::get().fail(message); }

inline void launch(const dim3& grid, const dim3& block, unsigned cluster, std::size_t shared_bytes,
                   std::int64_t order, const std::function<void()>& body) {
  Machine::get().launch(grid, block, cluster, shared_bytes, order, body);
}

}  // namespace mlr1::emulator
