// CPU row of mlr1::sample_order; the op itself is megatron_mlr1/ops/sample_order.py.
#include "sample_order.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace mlr1 {

namespace {

static_assert(sizeof(BlendNode) == 3 * sizeof(std::int64_t), "a row of the tree is a node");

// In one thread: the loader calls it beside the training's own.
std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_order_cpu(
    const at::Tensor& tree, const at::Tensor& drawn, const at::Tensor& num_items,
    const at::Tensor& keys, std::int64_t root, std::int64_t first, std::int64_t count) {
  const at::Tensor nodes = tree.contiguous(), before = drawn.contiguous(),
                   sizes = num_items.contiguous(), seeds = keys.contiguous();
  const auto* const node = reinterpret_cast<const BlendNode*>(nodes.const_data_ptr<std::int64_t>());
  const auto* const drawn_of = before.const_data_ptr<std::int64_t>();
  const auto* const size_of = sizes.const_data_ptr<std::int64_t>();
  const auto* const key_of = seeds.const_data_ptr<std::int64_t>();
  std::vector<int> bits(sizes.numel());
  for (std::size_t i = 0; i < bits.size(); ++i) {
    bits[i] = network_bits(static_cast<std::uint64_t>(size_of[i]));
  }
  at::Tensor stream = at::empty({count}, before.options().dtype(at::kInt));
  at::Tensor epoch = at::empty({count}, before.options());
  at::Tensor item = at::empty({count}, before.options());
  auto* const streams = stream.mutable_data_ptr<std::int32_t>();
  auto* const epochs = epoch.mutable_data_ptr<std::int64_t>();
  auto* const items = item.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < count; ++i) {
    const Leaf leaf = find_leaf(node, root, static_cast<std::uint64_t>(first + i));
    const auto size = static_cast<std::uint64_t>(size_of[leaf.stream]);
    const std::uint64_t number = static_cast<std::uint64_t>(drawn_of[leaf.stream]) + leaf.number;
    const std::uint64_t through = number / size;
    const auto key = static_cast<std::uint64_t>(key_of[leaf.stream]);
    const Permutation permutation(size, bits[leaf.stream], splitmix64(key, through));
    streams[i] = static_cast<std::int32_t>(leaf.stream);
    epochs[i] = static_cast<std::int64_t>(through);
    items[i] = static_cast<std::int64_t>(permutation(number - through * size));
  }
  return {stream, epoch, item};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlr1, CPU, m) { m.impl("sample_order", sample_order_cpu); }

}  // namespace mlr1
