// CPU row of mlr1::document_rows; the op itself is megatron_mlr1/ops/document_rows.py.
#include "document_rows.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cpu.h"

namespace mlr1 {

// What is the same for every row of a micro-batch.
struct Reading {
  int64_t length;
  int64_t end;
  int64_t num_ids;
};

// Writes a row from its text; functions of one type each and no template: GCC clones no template,
// and makes no vectors of std::min.
#define MLR1_WRITE_ROW(scalar_t)                                                              \
  MLR1_EVERY_X86 Result write_row(const scalar_t* __restrict text, const Reading& reading,    \
                                  const Row& row) {                                           \
    const int64_t length = reading.length;                                                    \
    int64_t* const __restrict tokens = row.tokens;                                            \
    int64_t* const __restrict labels = row.labels;                                            \
    int64_t* const __restrict position_ids = row.position_ids;                                \
    scalar_t smallest = text[0], largest = text[0];                                           \
    for (int64_t i = 0; i <= length; ++i) {                                                   \
      const scalar_t id = text[i];                                                            \
      smallest = id < smallest ? id : smallest;                                               \
      largest = id > largest ? id : largest;                                                  \
    }                                                                                         \
    for (int64_t i = 0; i < length; ++i) tokens[i] = static_cast<int64_t>(text[i]);           \
    for (int64_t i = 0; i < length; ++i) labels[i] = static_cast<int64_t>(text[i + 1]);       \
    std::fill(row.loss_mask, row.loss_mask + length, 1.0f);                                   \
    if (reading.end == kTogether) {                                                           \
      for (int64_t i = 0; i < length; ++i) position_ids[i] = i;                               \
    } else {                                                                                  \
      keep_apart(text, length, reading.end, row);                                             \
    }                                                                                         \
    const auto low = static_cast<int64_t>(smallest), high = static_cast<int64_t>(largest);    \
    if (low >= 0 && high < reading.num_ids) return {};                                        \
    return {kOutside, low < 0 ? low : high};                                                  \
  }

MLR1_WRITE_ROW(uint8_t)
MLR1_WRITE_ROW(int8_t)
MLR1_WRITE_ROW(int16_t)
MLR1_WRITE_ROW(uint16_t)
MLR1_WRITE_ROW(int32_t)
MLR1_WRITE_ROW(int64_t)

namespace {

// Fills `to` with the bytes at `offset`.
Fault read_bytes(int64_t file, char* to, int64_t num_bytes, int64_t offset) {
  while (num_bytes > 0) {
    const ssize_t got = ::pread(static_cast<int>(file), to, num_bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return kUnreadable;
    if (got == 0) return kShort;
    to += got;
    offset += got;
    num_bytes -= got;
  }
  return kFine;
}

// Reads the run, round the ring if it is that long, and writes the row.
template <typename T>
Result make_row(const Run& run, std::vector<int64_t>& memory, const Reading& reading,
                const Row& row) {
  T* const text = reinterpret_cast<T*>(memory.data());
  const int64_t num_tokens = reading.length + 1;
  int64_t place = run.place;
  for (int64_t done = 0; done < num_tokens;) {
    const int64_t count = std::min(num_tokens - done, run.size - place);
    const int64_t token = run.first + place;
    const Fault fault = read_bytes(run.file, reinterpret_cast<char*>(text + done),
                                   count * sizeof(T), token * sizeof(T));
    if (fault != kFine) return {fault, fault == kShort ? token + count : int64_t{errno}};
    done += count;
    place = 0;
  }
  return write_row(text, reading, row);
}

Result make_row_of_any_type(const Run& run, std::vector<int64_t>& memory, const Reading& reading,
                            const Row& row) {
  switch (run.type) {
    case 0: return make_row<uint8_t>(run, memory, reading, row);
    case 1: return make_row<int8_t>(run, memory, reading, row);
    case 2: return make_row<int16_t>(run, memory, reading, row);
    case 3: return make_row<uint16_t>(run, memory, reading, row);
    case 4: return make_row<int32_t>(run, memory, reading, row);
    case 5: return make_row<int64_t>(run, memory, reading, row);
    default: TORCH_CHECK(false, "document_rows: there is no type of tokens ", run.type);
  }
}

template <typename T>
T* pointer(const at::Tensor& rows, int64_t batch, int64_t width) {
  TORCH_CHECK(rows.is_contiguous() && rows.size(0) == batch && rows.numel() == batch * width,
              "document_rows: rows must be contiguous, ", batch, " of ", width, " elements");
  return rows.mutable_data_ptr<T>();
}

template <typename T>
T* pointer(const std::optional<at::Tensor>& rows, int64_t batch, int64_t width) {
  return rows ? pointer<T>(*rows, batch, width) : nullptr;
}

static_assert(sizeof(Run) == 5 * sizeof(int64_t), "a row of the runs is a run");

// In one thread: the loader calls it beside the training's own.
std::tuple<int64_t, int64_t, int64_t> document_rows_cpu(
    const at::Tensor& runs, int64_t begin, int64_t end, int64_t num_ids, const at::Tensor& tokens,
    const at::Tensor& labels, const at::Tensor& loss_mask, const at::Tensor& position_ids,
    const std::optional<at::Tensor>& bounds, const std::optional<at::Tensor>& longest) {
  TORCH_CHECK(runs.is_contiguous() && runs.dim() == 2 && runs.size(1) == 5 && tokens.dim() == 2,
              "document_rows: the runs must be contiguous, of 5 numbers each");
  TORCH_CHECK(end == kTogether || (bounds && longest), "document_rows: there are no bounds");
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  TORCH_CHECK(begin >= 0 && begin + batch <= runs.size(0), "document_rows: there are no runs from ",
              begin, " to ", begin + batch);
  Row row{pointer<int64_t>(tokens, batch, length),    pointer<int64_t>(labels, batch, length),
          pointer<float>(loss_mask, batch, length),   pointer<int64_t>(position_ids, batch, length),
          pointer<int32_t>(bounds, batch, length + 1), pointer<int32_t>(longest, batch, 1)};
  const auto* const run = reinterpret_cast<const Run*>(runs.const_data_ptr<int64_t>()) + begin;
  std::vector<int64_t> memory(length + 1);  // for a text of the widest type
  for (int64_t i = 0; i < batch; ++i) {
    const Result result = make_row_of_any_type(run[i], memory, {length, end, num_ids}, row);
    if (result.fault != kFine) return {result.fault, i, result.value};
    row.tokens += length;
    row.labels += length;
    row.loss_mask += length;
    row.position_ids += length;
    if (row.bounds) row.bounds += length + 1;
    if (row.longest) ++row.longest;
  }
  return {kFine, 0, 0};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) { m.impl("document_rows", document_rows_cpu); }

}  // namespace mlr1
