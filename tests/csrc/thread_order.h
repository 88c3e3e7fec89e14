// Which accesses of a kernel's threads are ordered by barriers, whatever order threads run in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "watched_memory.h"

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}

  unsigned x, y, z;
};

namespace mlr1::emulator {

inline std::string text_of(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}

inline dim3 place_in(const dim3& extent, std::uint64_t number) {
  return {static_cast<unsigned>(number % extent.x),
          static_cast<unsigned>(number / extent.x % extent.y),
          static_cast<unsigned>(number / extent.x / extent.y)};
}

// For a name: of more than one.
constexpr unsigned kSeveral = 0xffffffffu;

// When a thread did something: who it is, and how many barriers it has passed. A shuffle is none: it
// orders no memory. Of what several threads did, `thread` is kSeveral, and so are `warp`, `block`
// and `cluster` where they differ.
struct Moment {
  unsigned cluster = 0;  // of the grid
  unsigned block = 0;    // of the cluster, as are the warp and the thread
  unsigned warp = 0;
  unsigned thread = 0;
  unsigned warp_barriers = 0;
  unsigned block_barriers = 0;
  unsigned cluster_arrivals = 0;
  unsigned line = 0;  // of the last barrier; 0 for none
};

// A thread as it runs.
struct Runner : Moment {
  unsigned published = 0;  // the last barrier of the cluster behind it that orders memory; 0 for none
  bool has_met = false;    // its cluster, so that all blocks have begun
  std::uint32_t stamps[2] = {};  // of this moment: of ordinary accesses, and of atomic ones; 0 for none
};

struct Stamp : Moment {
  bool atomic = false;
  std::uint32_t also = 0;  // another stamp, whose cluster_arrivals differ; 0 for none
};

// The moments of one launch, by number, and what follows from barriers.
class ThreadOrder {
 public:
  // Forgets all moments. Numbers go on, so that none means two things.
  void begin_launch() {
    first_ += static_cast<std::uint32_t>(stamps_.size());
    stamps_.clear();
    joined_.clear();
  }
  void begin_again() {
    begin_launch();
    first_ = 1;
  }

  std::uint32_t first() const { return first_; }
  std::uint32_t next() const { return first_ + static_cast<std::uint32_t>(stamps_.size()); }
  MLR1_UNWATCHED const Stamp& at(std::uint32_t number) const { return all_[number - first_]; }

  MLR1_UNWATCHED std::uint32_t stamp_of(Runner& runner, bool atomic) {
    std::uint32_t& stamp = runner.stamps[atomic];
    if (stamp == 0) {
      stamp = add({runner, atomic, 0});
    }
    return stamp;
  }

  // Whether what was done then is seen by what `runner` does now.
  MLR1_UNWATCHED bool is_before(std::uint32_t number, const Runner& runner) const {
    const Stamp& then = at(number);
    return is_before(then, runner) && (then.also == 0 || is_before(at(then.also), runner));
  }

  // The stamp of what others did and `runner` does now: who is behind both is behind this.
  //
  // Exact: of what is not before now, a block's threads have passed the same barriers of the block,
  // and a warp's the same of the warp. Two of one warp are both before a third moment by a barrier of
  // the warp, the block or the cluster, as one of them is, where they arrived at as many barriers of
  // the cluster; so they become one of their warp, their block or their cluster. Arrivals of threads
  // that no barrier orders differ by one at most; by two, and then it is too strict by one barrier,
  // where a barrier of the cluster orders no memory.
  MLR1_UNWATCHED std::uint32_t joined(std::uint32_t others, Runner& runner, bool atomic) {
    const std::uint32_t mine = stamp_of(runner, atomic);
    if (others == mine || has(at(others), runner)) {
      return others;
    }
    const auto [place, is_new] = joined_.try_emplace(std::uint64_t{others} << 32 | mine, 0);
    if (is_new) {
      place->second = join(others, mine, runner);
    }
    return place->second;
  }

 private:
  MLR1_UNWATCHED static bool is_before(const Stamp& then, const Runner& now) {
    return then.cluster == now.cluster &&
           (then.thread == now.thread ||
            (then.warp == now.warp && then.warp_barriers < now.warp_barriers) ||
            (then.block == now.block && then.block_barriers < now.block_barriers) ||
            then.cluster_arrivals < now.published);
  }

  // Whether a stamp of several threads speaks of this moment too.
  MLR1_UNWATCHED static bool has(const Stamp& then, const Runner& now) {
    if (then.thread != kSeveral || then.also != 0) {
      return false;
    }
    if (then.cluster != now.cluster) {
      return then.cluster == kSeveral;
    }
    const bool is_of_block =
        then.block == now.block && then.block_barriers == now.block_barriers;
    const bool is_of_warp =
        is_of_block && then.warp == now.warp && then.warp_barriers == now.warp_barriers;
    return then.cluster_arrivals == now.cluster_arrivals &&
           (then.block == kSeveral || (then.warp == kSeveral ? is_of_block : is_of_warp));
  }

  std::uint32_t join(std::uint32_t others, std::uint32_t mine, const Runner& runner) {
    Stamp now = at(mine);
    Stamp rest;
    bool has_rest = false;
    for (std::uint32_t number = others; number != 0; number = at(number).also) {
      const Stamp& then = at(number);
      if (is_before(then, runner)) {
        continue;
      }
      if (then.cluster != now.cluster || then.cluster_arrivals == now.cluster_arrivals) {
        now = together(then, now);
      } else {
        rest = has_rest ? together(then, rest) : then;
        has_rest = true;
      }
    }
    if (has_rest) {
      rest.also = 0;
      now.also = add(rest);
    }
    return add(now);
  }

  static Stamp together(const Stamp& then, Stamp now) {
    now.thread = kSeveral;
    now.warp = then.warp == now.warp ? now.warp : kSeveral;
    now.block = then.block == now.block ? now.block : kSeveral;
    now.cluster_arrivals = std::max(now.cluster_arrivals, then.cluster_arrivals);
    if (then.cluster != now.cluster) {
      now.cluster = now.block = now.warp = kSeveral;
    }
    return now;
  }

  std::uint32_t add(const Stamp& stamp) {
    const std::uint32_t number = next();
    stamps_.push_back(stamp);
    all_ = stamps_.data();
    return number;
  }

  std::uint32_t first_ = 1;
  std::vector<Stamp> stamps_;
  const Stamp* all_ = nullptr;  // stamps_.data()
  std::unordered_map<std::uint64_t, std::uint32_t> joined_;
};

}  // namespace mlr1::emulator
