// The order of samples, one sample; megatron_mlr1/ops/sample_order.py has the formulas and their
// sources.
#pragma once

#include <array>
#include <cstdint>

namespace mlr1 {

constexpr int kRounds = 8;
constexpr int kLeastBits = 6;

// One node of the blend's tree, as the tensor has it; a child c is the node c, or the stream ~c
// where c < 0.
struct BlendNode {
  std::uint64_t share;  // of the left child, times 2^64
  std::int64_t left;
  std::int64_t right;
};

struct Leaf {
  std::int64_t stream;
  std::uint64_t number;  // of the sample among those of the stream
};

inline Leaf find_leaf(const BlendNode* tree, std::int64_t root, std::uint64_t sample) {
  constexpr std::uint64_t kHalf = std::uint64_t{1} << 63;
  std::int64_t child = root;
  while (child >= 0) {
    const BlendNode& node = tree[child];
    const auto product = static_cast<unsigned __int128>(node.share) * sample + kHalf;
    const auto before = static_cast<std::uint64_t>(product >> 64);
    const bool goes_left = static_cast<std::uint64_t>(product) > ~node.share;
    sample = goes_left ? before : sample - before;
    child = goes_left ? node.left : node.right;
  }
  return {~child, sample};
}

// SplitMix64: output `number` + 1 of the generator that `seed` begins.
inline std::uint64_t splitmix64(std::uint64_t seed, std::uint64_t number) {
  std::uint64_t state = seed + (number + 1) * 0x9E3779B97F4A7C15u;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

// The finalizer of MurmurHash3.
inline std::uint32_t fmix32(std::uint32_t word) {
  word = (word ^ (word >> 16)) * 0x85EBCA6Bu;
  word = (word ^ (word >> 13)) * 0xC2B2AE35u;
  return word ^ (word >> 16);
}

inline int network_bits(std::uint64_t size) {
  int bits = 0;
  for (std::uint64_t last = size - 1; last != 0; last >>= 1) {
    ++bits;
  }
  return size > 1 && bits < kLeastBits ? kLeastBits : bits;
}

// The permutation of one epoch of one stream: 0 to size - 1.
class Permutation {
 public:
  // In a network of `bits`, by `network_bits`.
  Permutation(std::uint64_t size, int bits, std::uint64_t seed)
      : size_(size),
        right_bits_((bits + 1) / 2),
        masks_{(std::uint32_t{1} << (bits - right_bits_)) - 1,
               (std::uint32_t{1} << right_bits_) - 1} {
    for (int i = 0; i < kRounds; i += 2) {
      const std::uint64_t word = splitmix64(seed, i / 2);
      keys_[i] = static_cast<std::uint32_t>(word >> 32);
      keys_[i + 1] = static_cast<std::uint32_t>(word);
    }
  }

  std::uint64_t operator()(std::uint64_t place) const {
    do {
      place = once(place);
    } while (place >= size_);
    return place;
  }

 private:
  std::uint64_t once(std::uint64_t place) const {
    auto left = static_cast<std::uint32_t>(place >> right_bits_);
    auto right = static_cast<std::uint32_t>(place) & masks_[1];
    for (int i = 0; i < kRounds; i += 2) {
      left ^= fmix32(right ^ keys_[i]) & masks_[0];
      right ^= fmix32(left ^ keys_[i + 1]) & masks_[1];
    }
    return (static_cast<std::uint64_t>(left) << right_bits_) | right;
  }

  std::uint64_t size_;
  int right_bits_;
  std::array<std::uint32_t, 2> masks_;
  std::array<std::uint32_t, kRounds> keys_{};
};

static_assert(kRounds % 2 == 0, "a pass turns both halves equally often");

}  // namespace mlr1
