// One row of a micro-batch from a run of length + 1 tokens:
//   tokens[i] = text[i]    labels[i] = text[i + 1]    loss[i] = 1, but 0 at an end of document
//   positions count from the last end;  bounds are 0, every end, then length up to the last entry
// Without ends (`kTogether`) positions count from 0, and bounds and longest are left alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mlr1 {

constexpr std::int64_t kTogether = -1;

// A run of tokens in a file, as the rows of the op's first argument name it.
struct Run {
  std::int64_t file;   // descriptor
  std::int64_t type;   // number in TOKEN_TYPES of megatron_mlr1/ops/document_rows.py
  std::int64_t first;  // token of the file that the ring begins with
  std::int64_t size;   // tokens of the ring
  std::int64_t place;  // token of the ring that the run begins at
};

enum Fault : std::int64_t { kFine, kUnreadable, kShort, kOutside };

// What became of a row, and the number that says more: see `Outcome` in the op's Python.
struct Result {
  Fault fault = kFine;
  std::int64_t value = 0;
};

struct Row {
  std::int64_t* tokens;
  std::int64_t* labels;
  float* loss_mask;
  std::int64_t* position_ids;
  std::int32_t* bounds;
  std::int32_t* longest;
};

// Places that are looked through at once for an end: few of them hold one.
constexpr std::int64_t kStretch = 64;

// Writes `bounds`, `longest` and `position_ids`, and takes the loss of the ends away.
template <typename T>
inline void keep_apart(const T* text, std::int64_t length, std::int64_t end, const Row& row) {
  std::int64_t begin = 0, number = 1, longest = 0;
  row.bounds[0] = 0;
  const auto close = [&](std::int64_t next) {
    for (std::int64_t i = begin; i < next; ++i) row.position_ids[i] = i - begin;
    longest = std::max(longest, next - begin);
    row.bounds[number++] = static_cast<std::int32_t>(next);
    begin = next;
  };
  const T sought = static_cast<T>(end);
  // An end that the type cannot hold is in no text of that type.
  if (static_cast<std::int64_t>(sought) == end) {
    for (std::int64_t from = 0; from < length; from += kStretch) {
      const std::int64_t to = std::min(from + kStretch, length);
      int found = 0;
      for (std::int64_t i = from; i < to; ++i) found |= text[i] == sought;
      for (std::int64_t i = from; found && i < to; ++i) {
        if (text[i] == sought) {
          row.loss_mask[i] = 0.0f;
          close(i + 1);
        }
      }
    }
  }
  if (begin < length) close(length);
  std::fill(row.bounds + number, row.bounds + length + 1, static_cast<std::int32_t>(length));
  *row.longest = static_cast<std::int32_t>(longest);
}

}  // namespace mlr1
